"""List the images of a data set with the labels of a hierarchy; no image is opened here."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from hierarchy import Hierarchy
from hierarchy.layouts import (
    IMAGE_SUFFIXES,
    VEGFRU_LISTS,
    check_unique_folders,
    class_folders,
    image_root,
    is_hidden,
    is_image,
    is_vegfru,
    read_vegfru_list,
    release_root,
    sorted_entries,
)
from runtime.progress import progress_bar
from runtime.text import shorten

SILENT_SECONDS = 5  # after which the listing of a slow folder shows its progress


class Listing(NamedTuple):
    """The images of a data set, sorted by class label, then by name.

    root     folder of the classes or superclasses, or of the VegFru release
    paths    path of each image below `root`, with "/", without line breaks
    labels   class label of each image
    ignored  paths below `root` of everything else: hidden entries, images outside of class folders, broken links,
             and other files in class folders
    """

    root: Path
    paths: list[str]
    labels: list[int]
    ignored: list[str]


def list_files(path: str | os.PathLike, hierarchy: Hierarchy, partial: bool = False) -> Listing:
    """List the images at `path`.

    path: `superclass/class/*`, `class/*`, iNaturalist or VegFru as they unpack, or a list file of VegFru such as
    `vegfru_list/vegfru_val.txt`. VegFru's folder means its train list if there is one, or else all images.

    Classes are matched by name; if the hierarchy has only numbers, by the number at the start of an iNaturalist name.
    The superclasses are the hierarchy's, whatever folder a class is in. Raises ValueError if folders and classes differ;
    with `partial` classes may have no folder or no images.
    """
    path, root = Path(path), release_root(path)
    train = root / VEGFRU_LISTS / "vegfru_train.txt"
    if path.is_file() or is_vegfru(root) and train.is_file():
        listing = list_vegfru(path if path.is_file() else train, root, hierarchy, partial)
    else:
        listing = list_class_folders(root, class_folders(root), hierarchy, partial)
    broken = [name for name in listing.paths if "\n" in name]
    if broken:
        raise ValueError(
            f"{root} has a line break in the path of {len(broken)} of its images ({shorten(broken)}), expected one line: "
            "rename them."
        )
    return listing


def list_images(root: str | os.PathLike, hierarchy: Hierarchy) -> tuple[list[str], torch.Tensor]:
    """Return the paths of the images of a data set and their labels, int64 (N,), in the order of `list_files`."""
    listing = list_files(root, hierarchy)
    return [os.path.join(listing.root, path) for path in listing.paths], torch.tensor(listing.labels)


def list_class_folders(root: Path, folders: Sequence[Path], hierarchy: Hierarchy, partial: bool = False) -> Listing:
    check_unique_folders(folders)
    root = root if is_vegfru(root) else image_root(root)
    label_of = match_classes([folder.name for folder in folders], hierarchy, root, partial)
    paths, labels, ignored = [], [], []
    for above in sorted({root, *(folder.parent for folder in folders)}):
        ignored += [entry.path for entry in sorted_entries(above) if is_hidden(entry) or is_image(entry)]
    ordered = sorted(folders, key=lambda folder: label_of[folder.name])
    for folder in progress_bar(ordered, unit="class", desc=f"listing {root}", leave=False, delay=SILENT_SECONDS):
        found = {entry.name: is_image(entry) for entry in sorted_entries(folder)}
        if not any(found.values()) and not partial:
            raise ValueError(
                f"Class folder {folder} has no images ({', '.join(IMAGE_SUFFIXES)}), expected at least one: add some, or "
                "remove the class from the folder and the hierarchy."
            )
        below = folder.relative_to(root).as_posix()
        paths += [f"{below}/{name}" for name, image in found.items() if image]
        ignored += [folder / name for name, image in found.items() if not image]
        labels += [label_of[folder.name]] * sum(found.values())
    return Listing(root, paths, labels, [Path(path).relative_to(root).as_posix() for path in ignored])


def list_vegfru(path: Path, root: Path, hierarchy: Hierarchy, partial: bool = False) -> Listing:
    images = sorted(image for image, _ in read_vegfru_list(path))
    missing = [str(image) for image in images if not (root / image).is_file()]
    if missing or not images:
        raise ValueError(
            f"{path} names {len(images)} images, of which {root} lacks {len(missing)} ({shorten(missing)}): unpack the "
            "VegFru release again."
        )
    label_of = match_classes(list({image.parent.name: 0 for image in images}), hierarchy, path, partial)
    images.sort(key=lambda image: label_of[image.parent.name])
    return Listing(root, [image.as_posix() for image in images], [label_of[image.parent.name] for image in images], [])


def match_classes(folders: Sequence[str], hierarchy: Hierarchy, root: Path, partial: bool = False) -> dict[str, int]:
    """Return {folder name: label}; raise ValueError unless each folder is a class and, if not `partial`, each class has one."""
    label_of = {name: label for label, name in enumerate(hierarchy.classes)}
    class_of = {folder: folder.split("_")[0] if hierarchy.numbered else folder for folder in folders}
    unknown = [folder for folder in folders if class_of[folder] not in label_of]
    if unknown:
        raise ValueError(
            f"{root} has {len(unknown)} class folders that {hierarchy.name} lacks ({shorten(unknown)}): remove them or pass "
            "the --hierarchy that has them."
        )
    missing = sorted(label_of.keys() - set(class_of.values()), key=label_of.get)
    if missing and not partial:
        raise ValueError(
            f"{root} lacks {len(missing)} of the {hierarchy.num_classes} classes of {hierarchy.name} ({shorten(missing)}): "
            "add their images or pass a smaller --hierarchy."
        )
    return {folder: label_of[name] for folder, name in class_of.items()}


def fingerprint(paths: Sequence[str], labels: Sequence[int]) -> str:
    """Return the SHA-256 (hex) of the paths below the root and the labels; a copy and its latents have the same."""
    return hashlib.sha256(json.dumps([paths, labels]).encode()).hexdigest()


def label_warnings(hierarchy: Hierarchy) -> list[str]:
    """Return sentences about properties of the classes that may be mistakes.

    These are labels in the order 1, 10, 2 of folders numbered without padding, and classes without superclasses.
    """
    warnings = []
    if sorted_as_text(hierarchy.classes):
        warnings.append(
            f"The class folders are numbered without padding and sorted as text, so that {shorten(hierarchy.classes)} have "
            "the labels 0, 1, 2: pad the numbers with zeros if they are meant as labels."
        )
    if hierarchy.is_plain:
        warnings.append(
            f"The {hierarchy.num_classes} classes have no superclasses, so one null class takes their place: to add "
            "superclasses, arrange the folders as superclass/class/*.jpg or put a hierarchy.json beside them."
        )
    return warnings


def sorted_as_text(names: Iterable[str]) -> bool:
    """Return True if the names start with numbers of unequal length that are out of order, such as 1, 10, 2."""
    starts = [re.match(r"\d+", name) for name in names]
    code_points = all(re.match(r"[0-9A-F]{4,6}(_|$)", name) for name in names)  # 0041_A and 056A_ZHE are in order
    if not all(starts) or code_points:
        return False
    numbers = [start[0] for start in starts]
    return len({len(number) for number in numbers}) > 1 and sorted(numbers, key=int) != numbers
