"""Weights of the evaluation's networks: published files, local files, and random weights for trying the program."""

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from checkpoint.download import download_file
from checkpoint.torch_files import RETRY_HINT, check_file, check_finite, read_tensors
from runtime.files import atomic_write, sha256
from runtime.text import one_line

PUBLISHED = {  # network: address (its name may end in the first digits of the SHA-256), and other names of the same file
    "inception": (URL_INCEPTION_V3, "pt_inception-2015-12-05-6726825d.pth"),
    "lpips-trunk": ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",),
    "dinov2": ("https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",),
}
SHA256 = {  # of files whose names do not have it; Meta publishes none: many projects that use the file give this one
    "dinov2": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
}
FLAGS = {"dinov2": "--features dinov2=FILE"}  # that take another file, if not called as the network


def published_digits(network: str) -> str:
    """Return the SHA-256 (hex) of the published file of a key of PUBLISHED, or its first 8 digits."""
    return SHA256.get(network) or re.search(r"-([0-9a-f]{8})\.pth$", PUBLISHED[network][0])[1]


def find_network_weights(network: str, given: str | None) -> Path:
    """Return the path of the weights of a network that PUBLISHED has.

    It is the `given` path, or else the published file in TORCH_HOME, which is downloaded if absent.

    Raises ValueError if the download fails or the published file has another SHA-256.
    """
    if given:
        return Path(given)
    url, *other_names = PUBLISHED[network]
    folder, expected = Path(torch.hub.get_dir()) / "checkpoints", published_digits(network)
    paths, flag = [folder / name for name in (url.rsplit("/", 1)[1], *other_names)], FLAGS.get(network, f"--{network}")
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        path, advice = paths[0], f"fetch it elsewhere and pass it as {flag}"
        atomic_write(path, lambda part: download_file(url, part, expected, advice))
    found = sha256(path)
    if not found.startswith(expected):
        raise ValueError(
            f"{path} has the SHA-256 {found[:8]}…, expected {expected[:8]}…: delete it, or pass another file as {flag}."
        )
    return path


def read_network_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file or of a `torch.save` file; no code in it is run.

    Raises ValueError if the file is absent, damaged, not a file of tensors, or has non-finite values.
    """
    check_file(path)
    try:
        is_safetensors = Path(path).suffix == ".safetensors"
        tensors = load_file(path) if is_safetensors else read_tensors(path, ("state_dict", "model"))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({one_line(error)}), expected a safetensors file: {RETRY_HINT}.") from None
    check_finite(tensors, path)
    return tensors


def load_strictly(module: nn.Module, tensors: dict[str, torch.Tensor], path: str | os.PathLike, title: str):
    """Copy `tensors` into the module; names and shapes must match exactly.

    path, title: the file and the network, for error messages

    Raises ValueError if a tensor is missing, unexpected, of another shape, or an integer in place of floating-point.
    """
    own = module.state_dict()
    not_float = [
        name for name, x in tensors.items() if name in own and own[name].is_floating_point() > x.is_floating_point()
    ]
    if not_float:
        name = not_float[0]
        raise ValueError(
            f"{path} has {name} of {tensors[name].dtype}, expected floating-point weights: name another file."
        )
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {title} ({one_line(error)}…): name another file.") from None


@torch.no_grad()
def fill_randomly(module: nn.Module):
    """Set random weights that preserve the scale of activations, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        if p.ndim > 1:
            p.normal_(std=(2 / p[0].numel()) ** 0.5, generator=generator)
        elif name.endswith("bias"):
            p.zero_()
