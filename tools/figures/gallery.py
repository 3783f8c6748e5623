"""Images of chosen classes: sampled from an adapter, real ones, and those of a text-to-image pipeline.

Images are arrays uint8 (H, W, 3); labels are indices of classes.
"""

import argparse
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoencoder import Autoencoder
from checkpoint.description import ModelDescription
from dataset.images import center_crop
from evaluation.image_sets import Folder
from guidance import Guidance
from hierarchy import Hierarchy
from runtime.device import check_gpu, half_dtype, resolve_precision, set_tf32
from runtime.progress import progress_bar
from runtime.text import one_line, shorten
from sampling.grid import caption
from sampling.load import SWAPPING, build_guidance, load_model
from sampling.samplers import sample_keyed, to_uint8
from sampling.speed import speed_up


@dataclass(frozen=True)
class Source:
    """A loaded model with everything that sampling from it needs."""

    model: nn.Module
    description: ModelDescription
    autoencoder: Autoencoder
    guidance: Guidance
    half: torch.dtype | None  # half-precision type of the network


def load_source(args: argparse.Namespace, path: str | os.PathLike) -> Source:
    """Load the adapter or checkpoint at `path`, compiled with --compile, and the guidance of the flags.

    Both are on the GPU if there is one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_gpu(device)
    args = argparse.Namespace(**vars(args) | {"ckpt": path})
    set_tf32(args.tf32)
    half = half_dtype(resolve_precision(args.mixed_precision, device))
    model, description, autoencoder = load_model(args, device, half)
    guidance = build_guidance(args, model, description)
    speed_up(model, half, bool(args.compile), swaps=args.guidance in SWAPPING)
    return Source(model, description, autoencoder, guidance, half)


def sample_images(
    args: argparse.Namespace, source: Source, labels: Sequence[int], keys: Sequence[int], title: str
) -> list[np.ndarray]:
    """Sample one image per label.

    keys: for each image, the class whose noise it gets: that of the first image of this class in sample.py
    title: text of the progress bar
    """
    images = []
    with progress_bar(total=len(labels), unit="image", desc=title) as bar:
        for i in range(0, len(labels), args.batch_size):
            part = slice(i, i + args.batch_size)
            streams = [(args.seed, key, 0) for key in keys[part]]
            options = dict(sampler=args.sampler, steps=args.num_sampling_steps, autocast=source.half)
            latents = sample_keyed(source.model, labels[part], streams, source.guidance, **options)
            pixels = to_uint8(source.autoencoder.decode(latents)).permute(0, 2, 3, 1)
            images += list(pixels.numpy())
            bar.update(len(pixels))
    return images


def first_images(
    folder: Folder, hierarchy: Hierarchy, labels: Sequence[int], size: int | None = None
) -> list[np.ndarray]:
    """Return the first image of each label in a labelled folder, centre-cropped to `size` pixels if given.

    Raises ValueError if a class has no image.
    """
    first = {label: i for i, label in reversed(list(enumerate(folder.labels.tolist())))}
    missing = [hierarchy.classes[label] for label in labels if label not in first]
    if missing:
        raise ValueError(
            f"{folder.path} has no image of {shorten(missing)}, expected one of each class: add some, or choose other classes."
        )
    images = [folder.open(first[label]) for label in labels]
    return [np.asarray(center_crop(image, size) if size else image) for image in images]


def real_images(
    path: str | os.PathLike, hierarchy: Hierarchy, labels: Sequence[int], size: int | None = None
) -> list[np.ndarray]:
    """Return the first image of each label below `path`; see `first_images`."""
    folder = Folder(Path(path))
    folder.label(hierarchy)
    return first_images(folder, hierarchy, labels, size)


# ---- text-to-image -------------------------------------------------------------------------------


def load_pipeline(name: str) -> Callable:
    """Load a text-to-image pipeline of diffusers from a folder or from the Hugging Face Hub.

    Raises ValueError if it cannot be loaded, or needs more than a prompt.
    """
    from diffusers import DiffusionPipeline  # slow to import

    gpu = torch.cuda.is_available()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the hub warns if it cannot be reached; the error below says so
            pipeline = DiffusionPipeline.from_pretrained(name, torch_dtype=torch.float16 if gpu else torch.float32)
    except Exception as error:  # also those of the HTTP library and of packages that the pipeline needs
        raise ValueError(
            f"The text-to-image pipeline {name} could not be loaded ({one_line(error)}), expected a folder in diffusers' form "
            "or a name on the Hugging Face Hub: pass another --pipeline."
        ) from None
    parameters = inspect.signature(pipeline.__call__).parameters
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if "prompt" not in parameters or set(needed) - {"prompt"}:
        raise ValueError(
            f"The pipeline {name} is a {type(pipeline).__name__}, expected one that makes an image from a prompt alone: pass "
            "another --pipeline."
        )
    return pipeline.to("cuda" if gpu else "cpu")


def prompt_images(
    pipeline: Callable, hierarchy: Hierarchy, labels: Sequence[int], seed: int, steps: int | None = None
) -> list[np.ndarray]:
    """Make an image with the prompt "a photo of X" for each label, always from the same seed.

    X is the class name, for an iNaturalist class the species. steps: None is the pipeline's default
    """
    options = {"num_inference_steps": steps} if steps else {}
    images = []
    for label in labels:
        prompt = f"a photo of {caption(hierarchy.classes[label])}"
        generator = torch.Generator().manual_seed(seed)
        images.append(np.asarray(pipeline(prompt=prompt, generator=generator, **options).images[0].convert("RGB")))
    return images
