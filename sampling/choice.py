"""Which images sample_ddp.py samples: the class of each, the key of its noise, and the real image that it varies."""

import argparse
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autoencoder import Autoencoder
from guidance import hash_integer
from hierarchy import Hierarchy
from sampling.counts import expand_counts, label_counts, lacking_counts, number_images, read_counts
from sampling.variations import InitImages

GOLDEN_RATIO = (5**0.5 - 1) / 2
DEFAULT_IMAGES = 50_000


# ---- flags ---------------------------------------------------------------------------------------


def check_choice(args: argparse.Namespace):
    """Raise ValueError if flags that choose the images exclude each other, or if one lacks another."""
    flags = {
        "--num-fid-samples": args.num_fid_samples is not None,
        "--counts": args.counts is not None,
        "--fill-to": args.fill_to is not None,
    }
    given = [flag for flag, is_given in flags.items() if is_given]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given, expected one of them: drop the others.")
    if args.labels == "random" and given[:1] in (["--counts"], ["--fill-to"]):
        raise ValueError(
            f"--labels is random and {given[0]} chooses the classes, expected one of the two: drop the other."
        )
    for flag, value, partner, other in (
        ("--fill-to", args.fill_to, "--data-path", args.data_path),
        ("--init-images", args.init_images, "--strength", args.strength),
    ):
        if (value is None) != (other is None):
            found, missing = (partner, flag) if value is None else (flag, partner)
            raise ValueError(f"{found} is given without {missing}, expected both or none: add {missing}.")


def check_processes(world: int, count: int, flag: str):
    """Raise ValueError if there are more processes than images."""
    if world > count:
        raise ValueError(
            f"{world} processes are more than {flag} {count}: start as many as there are images, or fewer."
        )


# ---- labels --------------------------------------------------------------------------------------


def balanced_labels(count: int, classes: int) -> np.ndarray:
    """Return labels int64 (count,) in which the numbers of images of two classes differ by at most one.

    Image k has label k * stride mod classes, with a stride near the golden section of `classes` and coprime to it. So
    every `classes` consecutive images contain each class once. And any consecutive images are spread evenly over the order
    of the classes, in which a superclass is one range or a few: a short run shows each superclass in its share.
    """
    stride = max(1, round(GOLDEN_RATIO * classes))
    while math.gcd(stride, classes) > 1:
        stride += 1
    return np.arange(count) * stride % classes


def random_labels(count: int, classes: int, seed: int) -> np.ndarray:
    """Return labels int64 (count,), drawn uniformly; the label of image k depends on (seed, k) alone."""
    return np.array([hash_integer(f"label {seed} {k}") % classes for k in range(count)])


# ---- images --------------------------------------------------------------------------------------


@dataclass
class Images:
    """The images of a run.

    labels     int64 (N,)
    positions  int64 (N,), of each image among those of its class
    by_class   True if --counts or --fill-to chose them: then seed, label and position determine the noise of an image
    init       images to vary, or None
    strength   of the variation, 0 to 1
    """

    labels: np.ndarray
    positions: np.ndarray
    by_class: bool
    init: InitImages | None = None
    strength: float = 1.0

    def key(self, seed: int, k: int) -> tuple[int, ...]:
        """Return the key of image k's noise."""
        return (seed, int(self.labels[k]), int(self.positions[k])) if self.by_class else (seed, k)

    def file_numbers(self) -> np.ndarray | None:
        """Return the numbers to name the PNGs by, int64 (N,); None if they are 0 to N - 1."""
        return self.positions if self.by_class else None

    def variation(
        self, numbers: Sequence[int], image_size: int, autoencoder: Autoencoder, device: str | torch.device
    ) -> dict:
        """Return the arguments of `sample_keyed` that let images vary real ones, {} if they do not."""
        if self.init is None:
            return {}
        labels, positions = self.labels[numbers], self.positions[numbers]
        init = self.init.latents(labels, positions, image_size, autoencoder, device)
        return {"init": init, "strength": self.strength}

    def settings(self, labels: str) -> dict:
        """Return the settings that chose the images, as JSON; labels: --labels."""
        chosen = {"labels": "counts" if self.by_class else labels, "num_fid_samples": len(self.labels)}
        if self.by_class:
            chosen["counts_sha256"] = hashlib.sha256(self.labels.tobytes()).hexdigest()
        if self.init:
            chosen |= {"init_sha256": self.init.digest(), "strength": self.strength}
        return chosen


def choose_images(args: argparse.Namespace, hierarchy: Hierarchy, world: int) -> Images:
    """Return the images that the flags choose.

    Raises ValueError for a bad file of counts, a folder that does not fit the hierarchy, or more processes than images.
    """
    count = args.num_fid_samples or DEFAULT_IMAGES
    by_class = args.counts is not None or args.fill_to is not None
    if args.counts is not None:
        labels = expand_counts(label_counts(read_counts(args.counts), hierarchy, args.counts))
    elif by_class:
        labels = expand_counts(lacking_counts(args.data_path, args.fill_to, hierarchy))
    elif args.labels == "balanced":
        labels = balanced_labels(count, hierarchy.num_classes)
    else:
        labels = random_labels(count, hierarchy.num_classes, args.global_seed)
    if by_class and len(labels):
        check_processes(world, len(labels), "the number of images,")
    images = Images(labels, number_images(labels), by_class)
    if args.init_images and args.strength < 1 and len(labels):  # at 1 they have no influence
        images.init, images.strength = InitImages(args.init_images, hierarchy, labels), args.strength
    return images


def nothing_missing(args: argparse.Namespace) -> str:
    """Return why there is nothing to sample."""
    if args.counts is not None:
        return f"Nothing to sample: {args.counts} asks for no images."
    return f"Nothing to sample: every class of {args.data_path} has {args.fill_to} images or more."
