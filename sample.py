"""Sample images of chosen classes from a fine-tuned DiT.

    python sample.py --ckpt models/FineDiffusion-iNat.pt --image-size 256 --num-classes 10000 --num-super-classes 11
    python sample.py --ckpt results/000-DiT-XL-2-finediffusion/adapters/0200000.safetensors --classes "Vulpes vulpes" 7

Writes `<sample-dir>/<class>/<position>.png` and a labelled `grid.png`. The noise of a picture, at every step, is set by
seed, class and position alone: batch size and other classes change it no more than floating-point sums differ
(sample_ddp.py's pictures are the same bit for bit on a CPU, since it gives the network one at a time).
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from guidance import ALL_TIMESTEPS
from hierarchy.layouts import folder_names
from runtime.cli import Parser, check_range, run_command
from runtime.device import check_gpu
from sampling.grid import caption, labelled_grid
from sampling.load import build_guidance, load_model
from sampling.options import add_options, check_options
from sampling.samplers import check_finite_images, sample_keyed, sample_latents_official, to_uint8

DEFAULT_CLASSES = 8  # without --classes: so many, evenly spread


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_options(add)
    add("--classes", nargs="+", help='indices or names, such as 207 or "Vulpes vulpes", or all')
    add("--per-class", type=int, default=1)
    add("--seed", type=int, default=0)
    add(
        "--seed-mode",
        choices=["image", "official"],
        default="image",
        help="official: the official code's random stream",
    )
    add("--batch-size", type=int, default=16)
    add("--sample-dir", default="samples")
    return parser.parse_args()


def check_settings(args):
    check_options(args)
    check_range(args, per_class=(1, 10**9), batch_size=(1, 10**9), seed=(0, 2**63 - 1))
    if args.seed_mode == "official":
        found = args.sampler, args.guidance, *args.guidance_interval
        if found != ("ddpm", "superclass", *ALL_TIMESTEPS):
            raise ValueError(
                f"--seed-mode official is ddpm under superclass guidance at every timestep, found {' '.join(map(str, found))}: "
                "drop the other flags."
            )


def select_labels(args, hierarchy):
    """Labels of --classes."""
    if args.classes is None:
        count = min(DEFAULT_CLASSES, hierarchy.num_classes)
        return np.linspace(0, hierarchy.num_classes - 1, count).round().astype(int).tolist()
    if args.classes == ["all"]:
        return list(range(hierarchy.num_classes))
    return [hierarchy.find(query) for query in args.classes]


def sample(args):
    check_settings(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_gpu(device)
    model, description, autoencoder = load_model(args, device)
    if args.compile:
        model.compile_blocks()
    guidance = build_guidance(args, model)
    hierarchy = description.hierarchy
    labels = select_labels(args, hierarchy)

    # one batch of the official stream is one class: the official code sets its seed anew for each
    jobs = [(label, position) for label in labels for position in range(args.per_class)]
    size = args.per_class if args.seed_mode == "official" else args.batch_size
    official = dict(seed=args.seed, cfg_scale=guidance.scale, cfg_channels=guidance.channels)
    folder, folders, pictures = Path(args.sample_dir), folder_names(hierarchy.classes), []
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(jobs), unit="image") as bar:
        for i in range(0, len(jobs), size):
            batch = jobs[i : i + size]
            y = [label for label, _ in batch]
            if args.seed_mode == "official":
                latents = sample_latents_official(model, y, steps=args.num_sampling_steps, **official)
            else:
                keys = [(args.seed, label, position) for label, position in batch]
                latents = sample_keyed(model, y, keys, guidance, sampler=args.sampler, steps=args.num_sampling_steps)
            images = autoencoder.decode(latents)
            check_finite_images(
                images, [f"Image {position} of class {label} of seed {args.seed}" for label, position in batch]
            )
            images = to_uint8(images)
            for image, (label, position) in zip(images, batch):
                path = folder / folders[label] / f"{position:06d}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
            pictures.append(images)
            bar.update(len(batch))
    columns = args.per_class if args.per_class > 1 else min(4, len(jobs))
    captions = [caption(hierarchy.classes[label]) for label, _ in jobs]
    labelled_grid(torch.cat(pictures), captions, columns).save(folder / "grid.png")
    print(f"{len(jobs)} images and grid.png in {folder}")


def main():
    sample(parse_args())


if __name__ == "__main__":
    run_command(main)
