"""How many images of each class sample_ddp.py samples: the counts of a file, or those that a data set lacks."""

import csv
import json
import os
from pathlib import Path

import numpy as np

from dataset.listing import list_files
from hierarchy import Hierarchy
from runtime.text import one_line

MOST_IMAGES = 10**9
FORMS = 'a JSON object {"class": number} or CSV lines "class,number"'


def read_counts(path: str | os.PathLike) -> list[tuple[str, int]]:
    """Read (class, number of images) from a JSON object, or from CSV lines with or without the header class,count.

    Raises ValueError if the file is absent, has another form, or a number is not an integer of 0 or more.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}, expected {FORMS}: check --counts.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("{"):
            pairs = json.loads(text, object_pairs_hook=list)
        else:
            pairs = [tuple(row) for row in csv.reader(text.splitlines()) if row]
            if pairs and pairs[0][1:] == ("count",):
                del pairs[0]
        pairs = [(str(name).strip(), count) for name, count in pairs]
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({one_line(error)}), expected {FORMS}: correct it.") from None
    return [(name, checked_count(count, name, path)) for name, count in pairs]


def checked_count(count: object, name: str, path: Path) -> int:
    """Return a number of images as an int. Raises ValueError if it is not an integer of 0 or more."""
    digits = str(count).strip() if isinstance(count, str) or type(count) is int else ""
    if not (digits.isascii() and digits.isdecimal() and int(digits) <= MOST_IMAGES):
        raise ValueError(
            f"{path} has {count!r} as the number of images of {name!r}, expected an integer of 0 to {MOST_IMAGES:,}: "
            "correct it."
        )
    return int(digits)


def label_counts(pairs: list[tuple[str, int]], hierarchy: Hierarchy, path: str | os.PathLike) -> np.ndarray:
    """Return the number of images of each class, int64 (num_classes,), 0 for classes that are not named.

    pairs: of `read_counts`; a class is a label or a name, as `Hierarchy.find` takes it

    Raises ValueError if a class is unknown or named twice.
    """
    counts, names = np.zeros(hierarchy.num_classes, np.int64), {}
    for name, count in pairs:
        try:
            label = hierarchy.find(name)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if label in names:
            raise ValueError(f"{path} names class {label} twice, as {names[label]!r} and {name!r}: remove one of them.")
        names[label] = name
        counts[label] = count
    return counts


def lacking_counts(folder: str | os.PathLike, target: int, hierarchy: Hierarchy) -> np.ndarray:
    """Return how many images each class of an image folder lacks to `target` images, int64 (num_classes,).

    A class without a folder has no images. Raises ValueError if the folder has a class that the hierarchy lacks.
    """
    labels = list_files(folder, hierarchy, partial=True).labels
    return np.maximum(target - np.bincount(labels, minlength=hierarchy.num_classes), 0)


def number_images(labels: np.ndarray) -> np.ndarray:
    """Return the position of each image among those of its class, int64 (N,): 0 for the first, then 1, and so on."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    positions = np.empty_like(labels)
    positions[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return positions


def expand_counts(counts: np.ndarray) -> np.ndarray:
    """Return the labels of counts[c] images of each class c, int64 (N,): the first image of each class, then the second, ...

    So a run that is stopped early has images of all classes.
    """
    labels = np.repeat(np.arange(len(counts)), counts)
    return labels[np.argsort(number_images(labels), kind="stable")]
