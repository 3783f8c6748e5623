"""Images of chosen classes: an adapter's, real ones, and those of a text-to-image pipeline."""

import argparse
import inspect
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from dataset.images import center_crop
from evaluation.image_sets import Folder
from runtime.device import check_gpu
from runtime.text import shorten
from sampling.grid import caption
from sampling.load import build_guidance, load_model
from sampling.samplers import sample_keyed, to_uint8


def opened(args, path):
    """The adapter or checkpoint at `path` with the guidance of the flags: model, description, autoencoder, guidance."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_gpu(device)
    args = argparse.Namespace(**vars(args) | {"ckpt": path})
    model, description, autoencoder = load_model(args, device)
    return SimpleNamespace(
        model=model,
        description=description,
        autoencoder=autoencoder,
        guidance=build_guidance(args, model),
    )


def sampled(args, source, labels, keys, title):
    """Images uint8 (H, W, 3) of `labels` by what is `opened`; the noise is that of sample.py's first picture of the classes
    `keys`."""
    found = []
    with tqdm(total=len(labels), unit="image", desc=title) as bar:
        for i in range(0, len(labels), args.batch_size):
            part = slice(i, i + args.batch_size)
            streams = [(args.seed, key, 0) for key in keys[part]]
            options = dict(sampler=args.sampler, steps=args.num_sampling_steps)
            latents = sample_keyed(source.model, labels[part], streams, source.guidance, **options)
            images = to_uint8(source.autoencoder.decode(latents)).permute(0, 2, 3, 1)
            found += list(images.numpy())
            bar.update(len(images))
    return found


def first_images(folder, hierarchy, labels, size=None):
    """The first image of each label in a labelled `Folder`, uint8 (H, W, 3), cropped to `size` if given."""
    first = {label: i for i, label in reversed(list(enumerate(folder.labels.tolist())))}
    missing = [hierarchy.classes[label] for label in labels if label not in first]
    if missing:
        raise ValueError(
            f"{folder.path} has no image of {shorten(missing)}, expected one of each class: add some, or choose other --classes."
        )
    images = [folder.open(first[label]) for label in labels]
    return [np.asarray(center_crop(image, size) if size else image) for image in images]


def real_images(path, hierarchy, labels, size):
    folder = Folder(Path(path))
    folder.label(hierarchy)
    return first_images(folder, hierarchy, labels, size)


def load_pipeline(name):
    """A text-to-image pipeline of diffusers; ValueError where it cannot be loaded or wants more than a prompt."""
    from diffusers import DiffusionPipeline  # slow to import

    gpu = torch.cuda.is_available()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the hub, when it cannot be reached: said below
            pipeline = DiffusionPipeline.from_pretrained(name, torch_dtype=torch.float16 if gpu else torch.float32)
    except Exception as error:  # those of the HTTP library and of packages that the pipeline needs, too
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"The text-to-image pipeline {name} could not be loaded ({reason}), expected a folder in diffusers' form or a name "
            "on the Hugging Face Hub: pass another --pipeline."
        ) from None
    wanted = inspect.signature(pipeline.__call__).parameters
    needed = [p.name for p in wanted.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if "prompt" not in wanted or set(needed) - {"prompt"}:
        raise ValueError(
            f"The pipeline {name} is a {type(pipeline).__name__}, expected one that makes an image from a prompt alone: pass "
            "another --pipeline."
        )
    return pipeline.to("cuda" if gpu else "cpu")


def painted(pipeline, hierarchy, labels, seed, steps=None):
    """Images uint8 (H, W, 3) of the prompt "a photo of X" for each of `labels`, each from the same `seed`.

    X is the name of the class, of an iNaturalist name the species; `steps`: the pipeline's own by default.
    """
    options = {"num_inference_steps": steps} if steps else {}
    found = []
    for label in labels:
        prompt = f"a photo of {caption(hierarchy.classes[label])}"
        generator = torch.Generator().manual_seed(seed)
        found.append(np.asarray(pipeline(prompt=prompt, generator=generator, **options).images[0].convert("RGB")))
    return found
