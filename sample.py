"""Sample images of chosen classes from a fine-tuned DiT.

    python sample.py --ckpt models/FineDiffusion-iNat.pt --image-size 256 --num-classes 10000 --num-super-classes 11
    python sample.py --ckpt results/000-DiT-XL-2-finediffusion/adapters/0200000.safetensors --classes "Vulpes vulpes" 7

Writes `<sample-dir>/<class>/<position>.png` and a labelled `grid.png`. Seed, class and position alone determine the noise of
an image, at every step. Batch size and other classes change an image only by rounding errors; sample_ddp.py on a CPU
avoids these too, since it gives the network one image at a time.
"""

import runtime.quick_help  # noqa: F401, I001 - first: --help does not wait for the imports below
import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from autoencoder import Autoencoder
from checkpoint.description import ModelDescription
from checkpoint.rows import find_row, nodes
from guidance import ALL_TIMESTEPS, Guidance
from hierarchy import names
from hierarchy.layouts import folder_names
from models import DiT
from runtime.cli import Parser, check_range, run_command
from runtime.device import (
    best_device,
    check_gpu,
    describe_computation,
    explain_full_memory,
    half_dtype,
    resolve_compile,
    resolve_precision,
    set_tf32,
)
from runtime.progress import progress_bar
from sampling.grid import caption, cell_size, grid_layout, labelled_grid
from sampling.load import SWAPPING, build_guidance, find_hierarchy, load_model
from sampling.options import add_options, advise_smaller, check_options, parse_with_preset
from sampling.samplers import check_finite_images, sample_keyed, sample_latents_official, to_uint8
from sampling.speed import speed_up

EXAMPLES = """
python sample.py --ckpt results/inat/adapters/0200000.safetensors --classes "Vulpes vulpes" 207 --per-class 4
python sample.py --ckpt models/FineDiffusion-iNat.pt --sampler unipc --num-sampling-steps 25 --sample-dir foxes
"""
DEFAULT_CLASSES = 8


# ---- flags ---------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """Parse the command line. Raises ValueError for an unknown or malformed flag."""
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add_options(parser)
    add = parser.add_argument_group("images").add_argument
    add(
        "--classes",
        nargs="+",
        help=f'indices or names, such as 207 or "Vulpes vulpes", nodes of a rank that has rows, such as Canidae or '
        f"family=Canidae, or all; if not given, {DEFAULT_CLASSES} evenly spaced classes",
    )
    add(
        "--list",
        metavar="TEXT",
        help="print the classes with TEXT in a name, such as fox or Canidae, and exit; without --ckpt iNaturalist's",
    )
    add("--per-class", type=int, default=1, help="images of each class")
    add("--seed", type=int, default=0, help="seed of the noise")
    add(
        "--seed-mode",
        choices=["image", "official"],
        default="image",
        help="image: a noise stream for each image; official: the one stream of the official code, for each class",
    )
    add("--batch-size", type=int, default=16, help="images per forward pass; --seed-mode official uses --per-class")
    add = parser.add_argument_group("output").add_argument
    add("--sample-dir", default="samples", help="folder for the images")
    return parse_with_preset(parser)


def check_settings(args: argparse.Namespace):
    """Raise ValueError if a flag is invalid or contradicts another."""
    check_options(args)
    check_range(args, per_class=(1, 10**9), batch_size=(1, 10**9), seed=(0, 2**63 - 1))
    expected = "ddpm", "superclass", *ALL_TIMESTEPS
    found = args.sampler, args.guidance, *args.guidance_interval
    if args.seed_mode == "official" and (found != expected or args.guide):
        raise ValueError(
            f"--seed-mode is official, expected --sampler ddpm, --guidance superclass and all timesteps, found "
            f"{' '.join(map(str, found))}: drop the other flags."
        )
    if args.seed_mode == "official" and args.mixed_precision in ("fp16", "bf16"):
        raise ValueError(
            f"--seed-mode is official and --mixed-precision {args.mixed_precision}, expected float32, in which the official "
            "code computes: drop one of the two."
        )


# ---- sampling ------------------------------------------------------------------------------------


def select_labels(classes: list[str] | None, description: ModelDescription) -> list[int]:
    """Return the rows of --classes, each once. Raises ValueError if a query matches no class or node, or several."""
    hierarchy = description.hierarchy
    if classes is None:
        count = min(DEFAULT_CLASSES, hierarchy.num_classes)
        return np.linspace(0, hierarchy.num_classes - 1, count).round().astype(int).tolist()
    if classes == ["all"]:
        return list(range(hierarchy.num_classes))
    return list(dict.fromkeys(find_row(description, query) for query in classes))


def list_classes(args: argparse.Namespace):
    """Print label, name and superclass of the classes that --list names."""
    hierarchy = find_hierarchy(args)
    titles = names.titles(hierarchy)
    for label in names.matches(hierarchy, args.list):
        superclass = f"  [{hierarchy.superclasses[hierarchy.parents[label]]}]" if hierarchy.has_parents else ""
        print(f"{label:5d}  {titles[label]}{superclass}")


def images_per_pass(args: argparse.Namespace) -> int:
    """Return the number of images in a batch; the official code sets its seed for each class."""
    return args.per_class if args.seed_mode == "official" else args.batch_size


def sample_batches(
    args: argparse.Namespace,
    model: DiT,
    guidance: Guidance,
    autoencoder: Autoencoder,
    jobs: list[tuple[int, int]],
    half: torch.dtype | None,
    compiled: bool,
) -> Iterator[tuple[list[tuple[int, int]], torch.Tensor]]:
    """Yield (jobs, uint8 images (n, 3, H, W)) batch by batch.

    jobs: (label, position) of each image; half: half-precision type of the network, or None; compiled: whether it is
    compiled. Raises ValueError if an image is not finite.
    """
    fill = min(args.batch_size, len(jobs)) if compiled else 0
    official, steps, size = args.seed_mode == "official", args.num_sampling_steps, images_per_pass(args)
    for i in range(0, len(jobs), size):
        batch = jobs[i : i + size]
        labels = [label for label, _ in batch]
        flag = "--per-class" if official else "--batch-size"
        with explain_full_memory(len(batch), advise_smaller(flag, len(batch))):
            if official:
                options = dict(cfg_scale=guidance.scale, cfg_channels=guidance.channels)
                latents = sample_latents_official(model, labels, seed=args.seed, steps=steps, **options)
            else:
                keys = [(args.seed, label, position) for label, position in batch]
                options = dict(sampler=args.sampler, steps=steps, autocast=half, fill=fill)
                latents = sample_keyed(model, labels, keys, guidance, **options)
            images = autoencoder.decode(latents)
        check_finite_images(images, [f"Image {k} of class {label} of seed {args.seed}" for label, k in batch])
        yield batch, to_uint8(images)


def sample(args: argparse.Namespace):
    """Sample the images of --classes and save them with a grid."""
    # Load model:
    device = best_device()
    check_gpu(device)
    set_tf32(args.tf32)
    precision = resolve_precision("no" if args.seed_mode == "official" else args.mixed_precision, device)
    half = half_dtype(precision)
    model, description, autoencoder = load_model(args, device, half)
    guidance = build_guidance(args, model, description)

    # Choose labels:
    hierarchy = description.hierarchy
    labels = select_labels(args.classes, description)
    jobs = [(label, position) for label in labels for position in range(args.per_class)]
    batches = math.ceil(len(jobs) / images_per_pass(args))
    compiled = resolve_compile(args.compile, device, args.num_sampling_steps * batches)
    speed_up(model, half, compiled, swaps=args.guidance in SWAPPING)
    if device == "cuda":
        print(describe_computation(device, precision, compiled))

    # Lay out the grid; of many classes, it shows some, evenly spaced:
    columns, classes, shown = grid_layout(len(labels), args.per_class, cell_size(description.image_size))
    in_grid = {labels[i] for i in np.linspace(0, len(labels) - 1, classes).round().astype(int)}

    # Sample, and save each image:
    folder, images, captions = Path(args.sample_dir), [], []
    node_names = [" ".join(node) for node in nodes(description)]
    class_folders = folder_names([*hierarchy.classes, *node_names])
    class_names = [*names.full_names(hierarchy), *node_names]
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar(total=len(jobs), unit="image") as bar:
        for batch, pixels in sample_batches(args, model, guidance, autoencoder, jobs, half, compiled):
            for (label, position), image in zip(batch, pixels):
                path = folder / class_folders[label] / f"{position:06d}.png"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
                if label in in_grid and position < shown:
                    images.append(image)
                    captions.append(caption(class_names[label]))
            bar.update(len(batch))

    # Save the grid:
    labelled_grid(torch.stack(images), captions, columns).save(folder / "grid.png")
    part = f" with {len(images)} of them" if len(images) < len(jobs) else ""
    print(f"{len(jobs)} images and grid.png{part} in {folder}")


def main():
    args = parse_args()
    if args.list is not None:
        return list_classes(args)
    check_settings(args)
    sample(args)


if __name__ == "__main__":
    run_command(main)
