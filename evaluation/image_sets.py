"""What the evaluation compares: folders of images, .npz files of images, saved statistics; their labels and pixels.

A folder is class/*, superclass/class/*, iNaturalist, VegFru or one of its lists, or images in any folders below; for
.npz files see npz_sets.py.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dataset.images import UnreadableImage, center_crop, list_images, to_rgb
from evaluation.npz_sets import Arrays, Statistics, npz_members
from hierarchy import Hierarchy, layouts
from hierarchy.layouts import class_folders, is_image, is_vegfru, subfolders, visible_entries
from runtime.text import shorten

LOSSY = (".jpg", ".jpeg", ".webp", ".gif")


def open_set(path, trusted=False):
    """The `Folder`, `Arrays` or `Statistics` at `path`; `trusted`: take statistics that do not say how they were made."""
    path = Path(path)
    if path.suffix != ".npz":
        return Folder(path)
    members = npz_members(path)
    return Statistics(path, members, trusted) if "mu" in members else Arrays(path, members)


def choose_hierarchy(spec, sets):
    """The hierarchy of --hierarchy, else of the first set that has one; None ("none", or no set has classes): all
    images are one class. ValueError where one set has classes and another has none."""
    labelled = [each for each in sets if each.labelled]
    if spec == "none" or not labelled and not spec:
        return None
    if len(labelled) < len(sets):
        other = next(each for each in sets if not each.labelled)
        raise ValueError(
            f"{other.path} has no classes, expected class folders or labels as the superclasses need them: sort it into "
            "folders, or pass --hierarchy none."
        )
    if spec:
        return Hierarchy.load(spec)
    reasons = []
    for each in labelled:
        try:
            return each.own_hierarchy()
        except ValueError as error:
            reasons.append(str(error).rstrip("."))
    raise ValueError(
        f"Nothing says which superclass the classes have ({reasons[0]}), expected --hierarchy: pass it, or --hierarchy none."
    )


# ---- folders -------------------------------------------------------------------------------------


class Folder:
    """Images of a folder, `labels` (N,) after `label`. Images beside class folders, as a grid.png, are left out."""

    kind = "folder"

    def __init__(self, path):
        self.path, self.paths, self.labels = path, [], None
        if not path.exists():
            raise ValueError(f"There is no {path}, expected a folder of images or an .npz file: check the path.")
        if path.is_file() and path.suffix != ".txt":
            raise ValueError(f"{path} is a file, expected a folder of images or an .npz file: name the folder.")
        self.labelled = path.is_file() or bool(subfolders(path))
        if not self.labelled:
            self.check_images(images_below(path))

    def check_images(self, paths):
        if not paths:
            raise ValueError(f"{self.path} has no images in it, expected some (.png, .jpg, ...): check the path.")

    def own_hierarchy(self):
        return Hierarchy.from_folder(self.path)

    def label(self, hierarchy):
        if hierarchy is None:
            folders = [self.path / name for name in subfolders(self.path)] if self.path.is_dir() else []
            self.paths = [path for folder in folders for path in images_below(folder)] or images_below(self.path)
            labels = np.zeros(len(self.paths))
        elif self.path.is_file() or is_vegfru(self.path):
            self.paths, labels = list_images(self.path, hierarchy)
        else:
            labels = self.find_labels(class_folders(self.path), hierarchy)
        self.check_images(self.paths)
        order = np.argsort(labels, kind="stable")  # by class and path, whatever the folders are called
        self.paths, self.labels = [self.paths[i] for i in order], np.asarray(labels, dtype=np.int64)[order]

    def find_labels(self, folders, hierarchy):
        """Fill `paths`; the label of each from the name of its folder."""
        label, labels = label_by_folder(hierarchy), []
        for folder in folders:
            name = folder.name.split("_")[0] if hierarchy.numbered else folder.name
            if name not in label:
                raise ValueError(
                    f"{self.path} has a folder {folder.name!r}, expected names of classes of {hierarchy.name}: remove it or "
                    "pass the --hierarchy that has it."
                )
            found = images_below(folder)
            self.paths += found
            labels += [label[name]] * len(found)
        return labels

    def __len__(self):
        return len(self.paths)

    def name(self, i):
        return str(self.paths[i])

    def open(self, i):
        """RGB image i."""
        try:
            with Image.open(self.paths[i]) as image:
                return to_rgb(image)
        except Exception as error:  # decoders raise all sorts of them at a damaged file
            raise UnreadableImage(f"Cannot read image {self.paths[i]} ({error}): replace or remove it.") from None

    def present(self, hierarchy):
        """Superclasses that have images."""
        return set(hierarchy.parents[np.unique(self.labels)].tolist())

    def lossy(self):
        """How many of the files were compressed with loss."""
        return sum(str(path).lower().endswith(LOSSY) for path in self.paths)


def images_below(folder, above=()):
    """Paths of the images in a folder and in those below it; a link back to a folder above is not followed."""
    here = os.path.realpath(folder)
    if here in above:
        return []
    paths = [entry.path for entry in visible_entries(folder) if is_image(entry)]
    for name in subfolders(folder):
        paths += images_below(os.path.join(folder, name), (*above, here))
    return paths


def label_by_folder(hierarchy):
    """{name of a folder: label}: the class's name, or what sampling makes of it where no folder can be called so."""
    written = {name: i for i, name in enumerate(layouts.folder_names(hierarchy.classes))}
    return written | {name: i for i, name in enumerate(hierarchy.classes)}


# ---- pixels --------------------------------------------------------------------------------------


class Pixels(Dataset):
    """Item i: uint8 (3, size, size) of image i of `images`, centre-cropped if `crop`, else of this size; and a digest
    of its pixels, int64."""

    def __init__(self, images, size, crop):
        self.images, self.size, self.crop = images, size, crop

    def __len__(self):
        return len(self.images)

    def name(self, i):
        return self.images.name(i)

    def __getitem__(self, i):
        image = self.images.open(i)
        if self.crop:
            image = center_crop(image, self.size)
        elif image.size != (self.size, self.size):
            raise UnreadableImage(
                f"{self.name(i)} has {image.width} x {image.height} pixels, expected {self.size} x {self.size} as the first: "
                "make them of one size, or pass --image-size to crop them."
            )
        pixels = np.array(image)
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=8).digest()
        return torch.from_numpy(pixels).permute(2, 0, 1), int.from_bytes(digest, "little", signed=True)


def pixels_of(sets, image_size=None):
    """The side of the square images, and a `Pixels` for each of the sets (REAL, FAKE), None for statistics.

    The side is `image_size`, to which both are cropped, else that of the images that the statistics among the sets were
    made of, else of FAKE's first image; then only REAL is cropped.
    """
    files = [each for each in sets if not isinstance(each, Statistics)]
    size = image_size or next((each.record.get("crop") for each in sets if each not in files), None)
    judged = None if size or not files else files[-1]  # the set that gives the size
    if judged:
        width, size = judged.open(0).size
        if width != size:
            raise ValueError(
                f"{judged.name(0)} has {width} x {size} pixels, expected a square: pass --image-size to crop both sides."
            )
    crops = [bool(image_size) or each is sets[0] and each is not judged for each in sets]
    return size, [Pixels(each, size, crop) if each in files else None for each, crop in zip(sets, crops)]


# ---- what is wrong with two sets -----------------------------------------------------------------


def check_sides(sets, hierarchy):
    """ValueError where a set has one image, or superclasses differ between the sets; the superclasses s that they have."""
    for each in sets:
        if len(each) < 2:
            raise ValueError(f"{each.path} has 1 image, expected at least 2 to speak of a distribution: add images.")
    present = [each.present(hierarchy) if hierarchy else set() for each in sets]
    for here, there, each, other in zip(present, present[::-1], sets, sets[::-1]):
        names = [hierarchy.superclasses[s] for s in sorted(there - here)]
        if names:
            raise ValueError(
                f"{each.path} has no images of {len(names)} superclasses that {other.path} has ({shorten(names)}), expected the "
                "same on both sides: add them, or leave them out of both."
            )
    return sorted(present[0])


def doubts(sets, hierarchy, digests):
    """Sentences about what may be wrong with the images; `digests`: of their pixels, None for statistics."""
    found = []
    files = [(each, digest) for each, digest in zip(sets, digests) if digest is not None]
    lossy = [each for each, _ in files if each.lossy()]
    if len(files) == 2 and len(lossy) == 1:
        found.append(
            f"{lossy[0].lossy():,} files of {lossy[0].path} were compressed with loss and none of the other side: FID sees it."
        )
    for each, digest in files:
        copies = len(digest) - len(np.unique(digest))
        if copies:
            found.append(f"{copies:,} images of {each.path} are exact copies of others there.")
        single = int((np.bincount(each.labels) == 1).sum())
        if hierarchy and single:
            found.append(f"{single:,} classes of {each.path} have one image: LPIPS within a class leaves them out.")
    if len(files) == 2:
        (real, real_digest), (fake, fake_digest) = files
        copies = int(np.isin(fake_digest, real_digest).sum())
        if copies:
            found.append(f"{copies:,} images of {fake.path} are exact copies of images of {real.path}.")
        for each, other in ((real, fake), (fake, real)):
            missing = sorted(set(other.labels.tolist()) - set(each.labels.tolist()))
            if missing:
                names = shorten(hierarchy.classes[c] for c in missing)
                found.append(f"{each.path} has no images of {len(missing):,} classes of {other.path} ({names}).")
    return found
