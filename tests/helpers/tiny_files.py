"""Tiny images, weights and adapters on the disk."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from helpers.tiny_models import described
from PIL import Image

from checkpoint.description import Base
from checkpoint.format import PACKED, file_metadata, read_weights, save_adapter, save_safetensors, write_tensors
from checkpoint.loading import TABLE, build_model
from finetune import METHODS, kind_of, select
from hierarchy import archive
from models import DiT_models
from runtime.files import sha256

CLASSES = {"cats": ("lynx", "manx"), "dogs": ("beagle", "pug", "pug_dog")}  # 4 images each


def write_images(root, size, classes=CLASSES, each=4):
    noise = np.random.default_rng(0)
    for superclass, names in classes.items():
        for name in names:
            folder = Path(root, superclass, name)
            folder.mkdir(parents=True)
            for i in range(each):
                coarse = Image.fromarray(noise.integers(0, 256, (3, 3, 3), np.uint8))
                coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return Path(root)


def random_dit(seed=0, affine=False, **sizes):
    """Return non-zero weights of a DiT-Ti/2 in the official form; a plain DiT has no LayerNorm affine."""
    model = DiT_models["DiT-Ti/2"](**sizes)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, p in model.state_dict().items():
        if name == "pos_embed":
            weights[name] = p
        elif kind_of(name) != "norm" or affine:
            weights[name] = torch.randn(p.shape, generator=generator) * 0.05 + (kind_of(name) == "norm")
    return weights


def write_adapter(path, base, hierarchy, method="finediffusion", seed=3, **more):
    """Write a random adapter in the form of train.py; return its path."""
    description = described(hierarchy, method, base=Base(str(base), sha256(base)), **more)
    model = build_model(description)
    counts = dict(num_classes=hierarchy.num_classes, num_super_classes=model.y_embedder.num_super_classes)
    random = random_dit(seed, affine=True, input_size=8, in_channels=3, **counts)
    generator = torch.Generator().manual_seed(seed)
    updates = {name: p for name, p in model.named_parameters() if kind_of(name) == "lora"}
    random |= {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in updates.items()}
    save_adapter(path, {name: random[name] for name in select(model, METHODS[method])}, model, description)
    return path


def rewritten(adapter, path, **changes):
    """Write the adapter with other values and `changes` in its description, as of an earlier step."""
    tensors, description = read_weights(adapter)
    tensors = {
        name: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(9)) for name, t in tensors.items()
    }
    if changes.get("null_row"):
        tensors[TABLE] = torch.cat([tensors[TABLE], torch.ones(1, 256)])
    save_safetensors(path, tensors, replace(description, **{"step": 3} | changes))
    return path


def tree(folder):
    """Return {path: bytes} of all files below a folder, to show that nothing was written."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob("*"))}


def save_record(path, tensors, record, hierarchy):
    """Write an intact file with any description."""
    packed = torch.frombuffer(bytearray(archive.pack_hierarchy(hierarchy.to_dict())), dtype=torch.uint8)
    tensors = {name: t.contiguous() for name, t in tensors.items()} | {PACKED: packed}
    write_tensors(path, tensors, file_metadata(tensors, json.dumps(record)))
