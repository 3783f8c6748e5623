"""Train the autoencoder of the quick start, a small `AutoencoderKL`, on an image folder.

    python -m examples.glyphs.train_autoencoder --data-path data/glyphs-base --out examples/glyphs/vae

The loss is half absolute error and half squared error, plus KL_WEIGHT times the KL divergence (nats per latent value).
The scale that gives the latents unit variance is saved in config.json; the weights are saved in fp16.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional as F

from runtime.cli import Parser, run_command
from runtime.progress import progress_bar

KL_WEIGHT = 1e-3
SCALE_IMAGES = 512  # images that the latents' scale is measured on
CONFIG = dict(
    block_out_channels=(8, 16, 32, 64),  # 64 pixels -> 8 x 8 latents
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
    sample_size=64,
)
EXAMPLES = """
    python -m examples.glyphs.train_autoencoder --data-path data/glyphs-base --out vae
    python -m examples.glyphs.train_autoencoder --data-path data/glyphs-base --out vae --max-steps 500 --batch-size 32
"""


def load_images(folder: str | os.PathLike) -> torch.Tensor:
    """Load all PNG files below a folder in grey: uint8 (N, H, W). Raises ValueError if there are none."""
    paths = sorted(Path(folder).rglob("*.png"))
    if not paths:
        raise ValueError(f"{folder} has no PNG files in it, expected a folder of images: check the path.")
    return torch.stack([torch.from_numpy(np.asarray(Image.open(p).convert("L"))) for p in paths])


def make_batch(images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the images of some rows, float32 (n, 3, H, W) in [-1, 1]."""
    x = images[rows].float().div(127.5).sub(1)
    return x[:, None].expand(-1, 3, -1, -1).contiguous()


def train(vae: AutoencoderKL, images: torch.Tensor, steps: int, batch_size: int, lr: float):
    """Train the autoencoder in place, with AdamW and a one-cycle learning rate."""
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    bar = progress_bar(range(steps), unit="step")
    for _ in bar:
        x = make_batch(images, torch.randint(len(images), (batch_size,)))
        posterior = vae.encode(x).latent_dist
        out = vae.decode(posterior.sample()).sample
        error = 0.5 * F.l1_loss(out, x) + 0.5 * F.mse_loss(out, x)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(error=f"{error.item():.4f}", kl=f"{kl.item():.2f}")


@torch.no_grad()
def measure(vae: AutoencoderKL, images: torch.Tensor) -> tuple[float, float]:
    """Return the mean absolute error, 0..2, and the scale that gives the latents unit variance."""
    x = make_batch(images, torch.randint(len(images), (SCALE_IMAGES,)))
    latents = vae.encode(x).latent_dist.sample()
    rebuilt = vae.decode(latents).sample
    return F.l1_loss(rebuilt, x).item(), round(1 / latents.std().item(), 5)


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument
    add("--data-path", required=True, help="folder of PNG images, 64 x 64 pixels, in any folders below it")
    add("--out", required=True, help="folder for the autoencoder, in diffusers' form")
    add("--max-steps", type=int, default=2000, help="training steps")
    add("--batch-size", type=int, default=16, help="images per step")
    add("--lr", type=float, default=2e-3, help="largest learning rate")
    add("--seed", type=int, default=0, help="seed of weights, batches and noise")
    return parser.parse_args()


def main():
    args = parse_args()
    torch.manual_seed(args.seed)
    images = load_images(args.data_path)
    vae = AutoencoderKL(**CONFIG)
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {len(images):,} images")
    start = time.time()
    train(vae, images, args.max_steps, args.batch_size, args.lr)
    error, scale = measure(vae, images)
    vae.register_to_config(scaling_factor=scale)
    vae.half().save_pretrained(args.out)
    seconds = time.time() - start
    print(f"{args.max_steps} steps in {seconds:.0f} s; mean absolute error {error:.4f} of 2, scale {scale}")


if __name__ == "__main__":
    run_command(main)
