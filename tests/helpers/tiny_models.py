"""Golden files, a DiT of 60 thousand non-zero parameters, and assertions that many tests share."""

import json
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from checkpoint.description import ModelDescription
from finetune import METHODS
from hierarchy import Hierarchy
from models import DiT

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden"
APART = ("tests", *(line.strip("/") for line in (ROOT / ".gitignore").read_text().split()))  # and hidden folders
SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if (first := path.relative_to(ROOT).parts[0]) not in APART and not first.startswith(".")
)
PARENTS = [0, 1, 0, 1, 1]  # of 5 classes under 2 superclasses
PETS = Hierarchy(("beagle", "manx", "pug", "lynx", "puma"), ("cats", "dogs"), PARENTS, "pets")
THREE_PETS = Hierarchy(("beagle", "manx", "pug"), ("cats", "dogs"), [1, 0, 1], "pets")
TinyDiT = partial(DiT, patch_size=2, hidden_size=32, depth=2, num_heads=4)  # the golden files' size
tiny_dit = partial(TinyDiT, input_size=8, num_classes=5, num_super_classes=2, parents=PARENTS)


def described(hierarchy, method="finediffusion", **more):
    """Return the description of an adapter of a DiT-Ti/2 for 8 pixels."""
    about = dict(model="DiT-Ti/2", image_size=8, latent_size=8, channels=3, vae="none", method=method, step=7)
    about |= lora_fields(method)
    return ModelDescription(**about | dict(embedder=METHODS[method].embedder, hierarchy=hierarchy) | more)


def lora_fields(method, rank=2, targets="all"):
    """Return the fields of a description that belong to low-rank updates."""
    return dict(lora_rank=rank, lora_targets=targets) if "lora" in METHODS[method].trains else {}


def make(root, *files):
    """Make empty files below `root`."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def golden(name):
    """Return (tensors by name, metadata) of tests/golden/<name>.safetensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, json.loads(file.metadata()["json"])


@torch.no_grad()
def awake(model, seed=0, std=0.1):
    """Add noise to every parameter: a fresh DiT predicts zero, which would hide everything else."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name != "pos_embed":
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return model


def same(a, b):
    """Return whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@contextmanager
def refusal(*words):
    """Expect a ValueError of one line and one sentence (except in a quoted reason) that has the words in this order."""
    with pytest.raises(ValueError, match=".*".join(words)) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ". " not in re.sub(r"\(.*\)", "", text)
