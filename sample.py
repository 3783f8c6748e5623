"""Sample images of chosen classes from a fine-tuned DiT.

    python sample.py --ckpt models/FineDiffusion-iNat.pt --image-size 256 --num-classes 10000 --num-super-classes 11
    python sample.py --ckpt results/000-DiT-XL-2-finediffusion/adapters/0200000.safetensors --classes "Vulpes vulpes" 7

Writes `<sample-dir>/<class>/<position>.png` and a labelled `grid.png`. The noise of a picture, at every step, is set by
seed, class and position alone: batch size and other classes change it no more than floating-point sums differ.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import checkpoint
from autoencoder import load_autoencoder
from data import check_counts
from hierarchy import Hierarchy
from models import DiT_models
from pictures import caption, labelled_grid
from runtime import check_gpu, run_command
from sampling import SAMPLERS, sample_latents, sample_latents_official, to_uint8

DEFAULT_CLASSES = 8  # without --classes: so many, evenly spread
PAPER = {"model": "DiT-XL/2", "image_size": 256, "num_classes": 10000, "num_super_classes": 11, "vae": "mse"}
PLAIN = {"num_classes": 1000, "num_super_classes": 1}  # DiT's own checkpoint


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--ckpt",
        help="adapter, FineDiffusion's or DiT's checkpoint (default: DiT's own, downloaded, with 1000 classes)",
    )
    add("--base", help="the adapter's base, where it is not where the adapter was trained")
    add("--model", choices=list(DiT_models), help="for checkpoints (default DiT-XL/2); an adapter knows its own")
    add("--image-size", type=int, help="for checkpoints (default 256)")
    add("--num-classes", type=int, help="for checkpoints (default 10000; 1000 for DiT's own)")
    add("--num-super-classes", type=int, help="for checkpoints (default 11; 1 is a plain DiT's null class)")
    add("--hierarchy", help="inat2021, a .json file or an image folder (default: the adapter's, else by the counts)")
    add("--vae", help="ema, mse, a local folder, or none (default mse; an adapter knows its own)")
    add("--classes", nargs="+", help='indices or names, such as 207 or "Vulpes vulpes", or all')
    add("--per-class", type=int, default=1)
    add("--cfg-scale", type=float, default=4.0)
    add("--cfg-channels", choices=["3", "all"], default="3", help="guide so many channels (3 as the official code)")
    add("--sampler", choices=SAMPLERS, default="ddpm")
    add("--num-sampling-steps", type=int, default=250)
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
    for name, low, high in (
        ("num_sampling_steps", 1, 1000),
        ("per_class", 1, 10**9),
        ("batch_size", 1, 10**9),
        ("seed", 0, 2**63 - 1),
    ):
        if not low <= getattr(args, name) <= high:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, expected {low} to {high}: change it."
            )
    if not (math.isfinite(args.cfg_scale) and args.cfg_scale >= 0):
        raise ValueError(f"--cfg-scale is {args.cfg_scale}, expected a finite number, 0 or more: change it.")
    if args.seed_mode == "official" and args.sampler != "ddpm":
        raise ValueError(
            f"--seed-mode official is a mode of the ddpm sampler, found {args.sampler}: drop one of the two."
        )


def hierarchy_of_counts(num_classes, num_super_classes):
    """The hierarchy that a checkpoint's counts stand for: none below a null class, or iNaturalist's."""
    if num_super_classes == 1:
        name, parents = f"a plain DiT with {num_classes} classes", [0] * num_classes
        return Hierarchy.from_dict({"name": name, "superclasses": ["null"], "parents": parents})
    if (num_classes, num_super_classes) == (PAPER["num_classes"], PAPER["num_super_classes"]):
        return Hierarchy.load("inat2021")
    raise ValueError(
        f"Nothing says which of {num_super_classes} superclasses the {num_classes} classes have: pass --hierarchy, a .json file "
        "or the image folder."
    )


def load_checkpoint(args, device):
    """(model, description, autoencoder) of a DiT's or FineDiffusion's checkpoint, by the flags and the paper's defaults."""
    defaults = PAPER | ({} if args.ckpt else PLAIN)
    flags = {key: value if getattr(args, key) is None else getattr(args, key) for key, value in defaults.items()}
    if args.hierarchy:
        hierarchy = Hierarchy.load(args.hierarchy)
        check_counts(hierarchy, args.num_classes, args.num_super_classes)
    else:
        hierarchy = hierarchy_of_counts(flags["num_classes"], flags["num_super_classes"])
    path = checkpoint.find(args.ckpt or f"DiT-XL-2-{flags['image_size']}x{flags['image_size']}.pt")
    tensors, _ = checkpoint.whole(path)
    autoencoder = load_autoencoder(flags["vae"], device)
    description = {
        "model": flags["model"],
        "image_size": flags["image_size"],
        "latent_size": autoencoder.latent_size(flags["image_size"]),
        "channels": autoencoder.channels,
        "method": "finediffusion",
        "embedder": "null" if hierarchy.num_super_classes == 1 else "tiered",
        "hierarchy": hierarchy,
    }
    model = checkpoint.build(description)
    checkpoint.load(model, tensors, path)
    return model.eval(), description, autoencoder


def load_model(args, device):
    """(model, description, autoencoder) of --ckpt, an adapter or a checkpoint."""
    if not checkpoint.is_adapter(args.ckpt):
        return load_checkpoint(args, device)
    model, description = checkpoint.load_adapted(args.ckpt, args.base)
    for key in ("model", "image_size"):
        given = getattr(args, key)
        if given not in (None, description[key]):
            raise ValueError(
                f"--{key.replace('_', '-')} is {given}, but {args.ckpt} was trained with {description[key]}: drop the flag."
            )
    check_counts(description["hierarchy"], args.num_classes, args.num_super_classes)
    if args.hierarchy:
        description["hierarchy"] = same_hierarchy(Hierarchy.load(args.hierarchy), description["hierarchy"])
    autoencoder = load_autoencoder(args.vae or description["vae"], device)
    found = autoencoder.latent_size(description["image_size"]), autoencoder.channels
    if found != (description["latent_size"], description["channels"]):
        raise ValueError(
            f"The model works on {description['channels']} x {description['latent_size']}^2 latents, but the autoencoder makes "
            f"{found[1]} x {found[0]}^2: pass the --vae it was trained with."
        )
    return model, description, autoencoder


def same_hierarchy(given, own):
    """`given`, which may bring names, if its map of superclasses is the adapter's `own`."""
    if not given.parents.equal(own.parents):
        raise ValueError(f"--hierarchy is {given!r}, but the adapter was trained on {own!r}: drop the flag.")
    return given


def chosen(args, hierarchy):
    """Labels of --classes."""
    if args.classes is None:
        count = min(DEFAULT_CLASSES, hierarchy.num_classes)
        return np.linspace(0, hierarchy.num_classes - 1, count).round().astype(int).tolist()
    if args.classes == ["all"]:
        return list(range(hierarchy.num_classes))
    return [hierarchy.find(query) for query in args.classes]


def class_folder(name):
    """A class name as the name of a folder."""
    return "".join("_" if c in "/\\:\0" else c for c in name).strip(". ") or "_"


def sample(args):
    check_settings(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_gpu(device)
    model, description, autoencoder = load_model(args, device)
    hierarchy = description["hierarchy"]
    labels = chosen(args, hierarchy)
    model.to(device)

    # one batch of the official stream is one class: the official code sets its seed anew for each
    jobs = [(label, position) for label in labels for position in range(args.per_class)]
    size = args.per_class if args.seed_mode == "official" else args.batch_size
    options = dict(seed=args.seed, cfg_scale=args.cfg_scale, steps=args.num_sampling_steps)
    channels = "all" if args.cfg_channels == "all" else 3
    folder, pictures = Path(args.sample_dir), []
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(jobs), unit="image") as bar:
        for i in range(0, len(jobs), size):
            batch = jobs[i : i + size]
            y, positions = zip(*batch)
            if args.seed_mode == "official":
                latents = sample_latents_official(model, y, cfg_channels=channels, **options)
            else:
                latents = sample_latents(model, y, positions, sampler=args.sampler, cfg_channels=channels, **options)
            images = to_uint8(autoencoder.decode(latents))
            for image, (label, position) in zip(images, batch):
                path = folder / class_folder(hierarchy.classes[label]) / f"{position:06d}.png"
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
