"""Train the quick start's autoencoder, a small `AutoencoderKL`, on an image folder.

    python -m examples.glyphs.train_autoencoder --data-path data/glyphs-base --out examples/glyphs/vae

Half of the loss is absolute error, half is squared error, plus KL_WEIGHT times the KL divergence (nats per latent
number). The scale that brings the latents to unit variance goes into config.json, the weights are stored in fp16.
"""

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from runtime.cli import Parser, run_command

KL_WEIGHT = 1e-3
CONFIG = dict(
    block_out_channels=(8, 16, 32, 64),  # 64 pixels -> 8 x 8 latents
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    latent_channels=4,
    norm_num_groups=4,
    sample_size=64,
)


def load_images(folder):
    """All PNG under `folder`: uint8 (N, H, W), grey."""
    paths = sorted(Path(folder).rglob("*.png"))
    if not paths:
        raise ValueError(f"{folder} has no PNG files in it, expected a folder of images: check the path.")
    return torch.stack([torch.from_numpy(np.asarray(Image.open(p).convert("L"))) for p in paths])


def batch_of(images, rows):
    x = images[rows].float().div(127.5).sub(1)
    return x[:, None].expand(-1, 3, -1, -1).contiguous()


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images = load_images(args.data_path)
    vae = AutoencoderKL(**CONFIG)
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {len(images):,} images")
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.max_steps, pct_start=0.05)
    bar, start = tqdm(range(args.max_steps), unit="step"), time.time()
    for _ in bar:
        x = batch_of(images, torch.randint(len(images), (args.batch_size,)))
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

    with torch.no_grad():
        x = batch_of(images, torch.randint(len(images), (512,)))
        posterior = vae.encode(x).latent_dist
        latents = posterior.sample()
        rebuilt = vae.decode(latents).sample
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.half().save_pretrained(args.out)
    print(
        f"{args.max_steps} steps in {time.time() - start:.0f} s; mean absolute error {F.l1_loss(rebuilt, x):.4f} of 2, "
        f"scale {vae.config.scaling_factor}"
    )


if __name__ == "__main__":
    run_command(main)
