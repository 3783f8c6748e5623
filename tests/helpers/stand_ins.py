"""Tiny stand-ins, of the real formats, for the data and weights that the documentation names; and its commands on them."""

import argparse
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from helpers.commands import call
from helpers.image_sets import Tiles
from helpers.species import SPECIES
from helpers.tiny_files import write_images
from helpers.tiny_models import TinyDiT, awake
from PIL import Image

import autoencoder
import models
from hierarchy import Hierarchy
from hierarchy import hierarchy as hierarchy_module
from sampling import load

INAT = Hierarchy.from_class_names(SPECIES)
VEGFRU = {"v_01_01": "veg200_images/carrot", "v_02_01": "veg200_images/leek", "f_01_01": "fru92_images/apple"}
COUNTS = {"10000": "12", "292": "3", "25": "3"}  # values of --num-classes and --num-super-classes
SHORTER = {  # flags that make a command short; they stand after its own
    "train": "--max-steps 2 --global-batch-size 2 --num-workers 0 --preview-images 0 --mixed-precision no",
    "sample": "--num-sampling-steps 1 --batch-size 8 --mixed-precision no",
    "sample_ddp": "--num-fid-samples 12 --num-sampling-steps 1 --mixed-precision no",
    "evaluate": "--num-workers 0 --inception none --lpips-trunk none --features tiles.pt --random-weights",
    "tools.encode_latents": "--num-workers 0",
    "tools.check_data": "--num-workers 1",
    "tools.names": "--file val.json",
}


def write_class_folders(root: Path, folders: list[str], each: int = 2):
    """Write `each` images of 40 pixels into each folder below `root`."""
    noise = np.random.default_rng(0)
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(noise.integers(0, 256, (40, 40, 3), np.uint8)).save(root / folder / f"{i}.jpg")


def write_weights(path: Path, size: int, hierarchy: Hierarchy | None):
    """Write a checkpoint: DiT's without a hierarchy, or else of FineDiffusion."""
    sizes = dict(num_classes=1000, num_super_classes=1)
    if hierarchy:
        parents = hierarchy.parents.tolist()
        sizes = dict(num_classes=hierarchy.num_classes, num_super_classes=hierarchy.num_super_classes, parents=parents)
    weights = awake(TinyDiT(input_size=size, **sizes)).state_dict()
    if hierarchy:
        record = {"model": weights, "ema": weights, "opt": {}, "args": argparse.Namespace(model="DiT-XL/2")}
    else:
        record = {name: tensor for name, tensor in weights.items() if ".norm" not in name}
    path.parent.mkdir(exist_ok=True)
    torch.save(record, path)


def write_world(root: Path, monkeypatch):
    """Write everything that a reader has, and let the commands find a tiny model, autoencoder and iNaturalist."""
    # Models:
    monkeypatch.setitem(models.DiT_models, "DiT-XL/2", TinyDiT)
    torch.manual_seed(0)
    kinds = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    vae = AutoencoderKL(block_out_channels=[4] * 4, norm_num_groups=2, latent_channels=4, layers_per_block=1, **kinds)
    vae.save_pretrained(root / "vae")
    monkeypatch.setattr(autoencoder, "PUBLISHED_VAES", {name: (str(root / "vae"), "main") for name in ("ema", "mse")})
    torch.jit.script(Tiles()).save(root / "tiles.pt")

    # iNaturalist, with 12 species:
    built_in = root / "built-in"
    shutil.copytree(hierarchy_module.BUILT_IN, built_in, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    record = json.loads((built_in / "inat2021.json").read_text()) | {"parents": INAT.parents.tolist(), "ranks": {}}
    (built_in / "inat2021.json").write_text(json.dumps(record))
    monkeypatch.setattr(hierarchy_module, "BUILT_IN", built_in)
    monkeypatch.setenv("FINEDIFFUSION_CACHE", str(root / "names"))
    categories = [{"id": i, "image_dir_name": name, "common_name": f"{i} fox"} for i, name in enumerate(SPECIES)]
    categories[7]["common_name"] = "Red Fox"
    (root / "val.json").write_text(json.dumps({"categories": categories}))
    monkeypatch.setitem(load.PAPER_DEFAULTS, "num_classes", INAT.num_classes)
    for folder in ("data/inat/train_mini", "data/inat/val", "inat_train_mini"):
        write_class_folders(root / folder, SPECIES)

    # VegFru, a folder of the reader's own, and weights:
    write_class_folders(root / "data/vegfru", list(VEGFRU.values()))
    lines = []
    for label, (prefix, folder) in enumerate(VEGFRU.items()):
        for i in range(2):
            path = root / "data/vegfru" / folder
            (path / f"{i}.jpg").rename(path / f"{prefix}_{i:04d}.jpg")
            lines.append(f"{folder}/{prefix}_{i:04d}.jpg {label}\n")
    for split in ("train", "val"):
        path = root / f"data/vegfru/vegfru_list/vegfru_{split}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(lines))
    for folder in ("birds", "birds-val"):
        write_images(root / folder, 40, each=2)
    for pixels in (256, 512):
        write_weights(root / f"pretrained_models/DiT-XL-2-{pixels}x{pixels}.pt", pixels // 8, None)
    for name, size, hierarchy in (
        ("iNat", 32, INAT),
        ("iNat-512", 64, INAT),
        ("VegFru", 32, Hierarchy.from_folder(root / "data/vegfru")),
    ):
        write_weights(root / f"models/FineDiffusion-{name}.pt", size, hierarchy)


def stand_in(word: str) -> str:
    """Return the word of a command on the stand-ins."""
    word = word.replace("/path/to/dataset/", "")
    return "7" if word == "207" else COUNTS.get(word, word)


def run(module: str, flags: list[str]):
    """Run a documented command in the working directory, shortened. Raises AssertionError if it fails."""
    flags = [stand_in(word) for word in flags]
    dry = "--dry-run" in flags
    more = "--global-batch-size 2" if dry else SHORTER.get(module, "")
    main = importlib.import_module(module).main
    result = call(main, *flags, *more.split())
    findings = module == "tools.check_data" and result.code == 1  # duplicates among the stand-ins
    assert result.code == 0 or findings, f"{module} {' '.join(flags)}: {result.err[-500:]}"
    if module == "train" and "--max-steps" in flags and not dry:
        steps = int(flags[flags.index("--max-steps") + 1])
        folder = Path("results", flags[flags.index("--experiment") + 1], "adapters")
        shutil.copy(folder / "0000002.safetensors", folder / f"{steps:07d}.safetensors")
