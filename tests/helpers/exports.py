"""Helpers for the tests of exported weights."""

import json
import re

import torch
from helpers.tiny_models import GOLDEN

OFFICIAL = json.loads((GOLDEN / "state_dict_shapes.json").read_text())["DiT-XL/2"]["shapes"]


def relative(a, b):
    """Return the largest difference of two tensors over the largest magnitude of the second."""
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def kinds(names):
    """Return parameter names without the numbers of their blocks."""
    return {re.sub(r"blocks\.\d+", "blocks.N", name) for name in names}


def inputs(model, rows):
    """Return x (N, C, H, W), t (N,) and the labels `rows` as a tensor (N,)."""
    x = torch.randn(len(rows), model.in_channels, model.input_size, model.input_size, generator=generator(5))
    return x, torch.arange(len(rows)) * 97 + 3, torch.tensor(rows)


def generator(seed):
    """Return a torch generator with a seed."""
    return torch.Generator().manual_seed(seed)
