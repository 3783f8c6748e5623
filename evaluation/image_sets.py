"""Sets to compare: folders of images, .npz files of images, saved statistics; their labels and pixels.

A folder is class/*, superclass/class/*, iNaturalist, VegFru or one of its lists, or images in any subfolders. For .npz
files see npz_sets.py and saved_statistics.py.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from dataset.images import UnreadableImage, center_crop, to_rgb
from dataset.listing import list_images
from evaluation.npz_sets import Arrays, npz_members
from evaluation.saved_statistics import Statistics
from hierarchy import Hierarchy, layouts
from hierarchy.layouts import check_unique_folders, class_folders, is_image, is_vegfru, subfolders, visible_entries
from runtime.text import one_line, shorten

SAMPLE_GRID = "grid.png"  # of sample.py, beside the class folders
LOSSY = (".jpg", ".jpeg", ".webp", ".gif")

# ---- folders -------------------------------------------------------------------------------------


class Folder:
    """Images of a folder; images beside class folders, such as a grid.png, are left out.

    path        the folder, or a list of VegFru
    labelled    True if there are class folders
    paths       of the images, sorted by class and path, after `label`
    labels      int64 (N,) after `label`, None before
    notes       sentences about the folder's layout, after `label`

    Raises ValueError if the folder is absent or has no images.
    """

    kind = "folder"

    def __init__(self, path: Path):
        self.path, self.paths, self.labels, self.notes = path, [], None, []
        if not path.exists():
            raise ValueError(f"There is no {path}, expected a folder of images or an .npz file: check the path.")
        if path.is_file() and path.suffix != ".txt":
            raise ValueError(f"{path} is a file, expected a folder of images or an .npz file: name the folder.")
        self.labelled = path.is_file() or bool(subfolders(path))
        if not self.labelled:
            self.check_not_empty(images_below(path))

    def check_not_empty(self, paths: list[str]):
        """Raise ValueError if there are no images."""
        beside = self.path.with_name(f"{self.path.name}.npz")
        if not paths and beside.is_file():
            raise ValueError(f"{self.path} has no images in it, expected some: name {beside}, which may have them.")
        if not paths:
            raise ValueError(f"{self.path} has no images in it, expected some (.png, .jpg, ...): check the path.")

    def own_hierarchy(self) -> Hierarchy:
        """Return the hierarchy that the folder defines; raises ValueError if it defines none."""
        return Hierarchy.from_folder(self.path)

    def label(self, hierarchy: Hierarchy | None):
        """Set `paths` and `labels`, all 0 if the hierarchy is None. Raises ValueError if a class folder is unknown."""
        if hierarchy is None:
            paths = (
                images_below(self.path) if self.path.is_dir() else list_images(self.path, Hierarchy.load(self.path))[0]
            )
            self.paths = [path for path in paths if not (self.labelled and Path(path) == self.path / SAMPLE_GRID)]
            labels = np.zeros(len(self.paths))
        elif self.path.is_file() or is_vegfru(self.path):
            self.paths, labels = list_images(self.path, hierarchy)
        else:
            labels = self.add_class_folders(class_folders(self.path), hierarchy)
        self.check_not_empty(self.paths)
        order = np.argsort(labels, kind="stable")  # by class and path, independent of the folders' names
        self.paths, self.labels = [self.paths[i] for i in order], np.asarray(labels, dtype=np.int64)[order]

    def add_class_folders(self, folders: list[Path], hierarchy: Hierarchy) -> list[int]:
        """Append the images of class folders to `paths`; return their labels, from the folders' names."""
        check_unique_folders(folders)
        label, labels, moved = label_by_folder(hierarchy), [], []
        for folder in folders:
            name = folder.name.split("_")[0] if hierarchy.numbered else folder.name
            if name not in label:
                raise ValueError(
                    f"{self.path} has a folder {folder.name!r}, expected names of classes of {hierarchy.name}: remove it or "
                    "pass the --hierarchy that has it."
                )
            paths = images_below(folder)
            self.paths += paths
            labels += [label[name]] * len(paths)
            own = hierarchy.superclasses[hierarchy.parents[label[name]]]
            if folder.parent.name in hierarchy.superclasses and folder.parent.name != own:
                moved.append(f"{folder.name!r} of {own!r} under {folder.parent.name!r}")
        if moved:
            self.notes.append(
                f"{self.path} has {len(moved)} classes under another superclass than {hierarchy.name} ({shorten(moved, str)}): "
                "they count for the latter."
            )
        beside = [e.name for e in visible_entries(self.path) if is_image(e) and e.name != SAMPLE_GRID]
        if beside:
            self.notes.append(f"{self.path} has {len(beside):,} images beside its class folders, which are left out.")
        return labels

    def keep(self, rows: np.ndarray):
        """Keep only the images with these indices."""
        self.paths, self.labels = [self.paths[i] for i in rows], self.labels[rows]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        """Return the path of image i."""
        return str(self.paths[i])

    def open(self, i: int) -> Image.Image:
        """Read image i, RGB. Raises UnreadableImage, a ValueError, if it is damaged."""
        try:
            with Image.open(self.paths[i]) as image:
                return to_rgb(image)
        except Exception as error:  # decoders raise anything on damaged files
            raise UnreadableImage(
                f"Cannot read image {self.paths[i]} ({one_line(error)}): replace or remove it."
            ) from None

    def present(self, hierarchy: Hierarchy) -> set[int]:
        """Return the superclasses that have images."""
        return set(hierarchy.parents[np.unique(self.labels)].tolist())

    def count_lossy(self) -> int:
        """Return how many files have a format with lossy compression."""
        return sum(str(path).lower().endswith(LOSSY) for path in self.paths)


def images_below(folder: str | os.PathLike, above: tuple[str, ...] = ()) -> list[str]:
    """Return the paths of the images in a folder and its subfolders; links back to a folder `above` are not followed."""
    real_path = os.path.realpath(folder)
    if real_path in above:
        return []
    paths = [entry.path for entry in visible_entries(folder) if is_image(entry)]
    for name in subfolders(folder):
        paths += images_below(os.path.join(folder, name), (*above, real_path))
    return paths


def label_by_folder(hierarchy: Hierarchy) -> dict[str, int]:
    """Return {folder name: label}: the names of the classes, and the folder names that sampling writes for them."""
    written = {name: i for i, name in enumerate(layouts.folder_names(hierarchy.classes))}
    return written | {name: i for i, name in enumerate(hierarchy.classes)}


# ---- all kinds of sets ---------------------------------------------------------------------------

ImageSet = Folder | Arrays | Statistics


def open_set(path: str | os.PathLike, trusted: bool = False) -> ImageSet:
    """Open a folder, an .npz file of images or an .npz file of statistics.

    trusted: accept statistics that do not say how they were made
    """
    path = Path(path)
    if path.suffix != ".npz":
        return Folder(path)
    members = npz_members(path)
    return Statistics(path, members, trusted) if "mu" in members else Arrays(path, members)


def open_second(path: str | os.PathLike, fake: ImageSet, hierarchy: Hierarchy | None, seed: int) -> Folder:
    """Open the second real set, the folder of --floor, and keep as many random images of each class as FAKE has.

    Raises ValueError if it is not a folder, or has fewer than 2 of these images, or if FAKE has no labels.
    """
    if fake.labels is None:
        raise ValueError(f"{fake.path} holds statistics, expected images for --floor DIR to match: drop the flag.")
    if Path(path).suffix == ".npz":
        raise ValueError(f"--floor is {path}, expected a folder of real images: name a folder.")
    second = Folder(Path(path))
    second.label(hierarchy)
    shuffled = np.random.default_rng(seed).permutation(len(second))
    shuffled = shuffled[np.argsort(second.labels[shuffled], kind="stable")]
    labels, starts, counts = np.unique(second.labels, return_index=True, return_counts=True)
    rank = np.arange(len(second)) - np.repeat(starts, counts)  # place among the shuffled images of a class
    wanted = np.bincount(fake.labels, minlength=labels.max() + 1)[second.labels]
    second.keep(np.sort(shuffled[rank < wanted]))
    if len(second) < 2:
        raise ValueError(
            f"{path} has {len(second)} images of FAKE's classes, expected at least 2: name another --floor."
        )
    return second


def choose_hierarchy(spec: str | None, sets: list[ImageSet]) -> Hierarchy | None:
    """Return the hierarchy of --hierarchy, or else of the first set that defines one.

    None means that all images are one class: --hierarchy none, or no set has classes.

    Raises ValueError if only one of the sets has classes, or nothing defines their superclasses.
    """
    labelled = [each for each in sets if each.labelled]
    if spec == "none" or not labelled and not spec:
        return None
    if len(labelled) < len(sets):
        other = next(each for each in sets if not each.labelled)
        raise ValueError(
            f"{other.path} has no classes, expected class folders or labels for the metrics of each superclass: sort it into "
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
        f"No set defines the superclasses of its classes ({reasons[0]}), expected --hierarchy: pass it, or --hierarchy none."
    )


def check_sets(sets: list[ImageSet], hierarchy: Hierarchy | None) -> list[int]:
    """Return the superclasses that the sets have, sorted; [] without a hierarchy.

    Raises ValueError if a set has fewer than 2 images or the sets differ in superclasses.
    """
    for each in sets:
        if len(each) < 2:
            raise ValueError(f"{each.path} has 1 image, expected at least 2 for a distribution: add images.")
    present = [each.present(hierarchy) if hierarchy else set() for each in sets]
    for here, there, each, other in zip(present, present[::-1], sets, sets[::-1]):
        names = [hierarchy.superclasses[s] for s in sorted(there - here)]
        if names:
            raise ValueError(
                f"{each.path} has no images of {len(names)} superclasses that {other.path} has ({shorten(names)}), expected the "
                "same in both sets: add them, or leave them out of both."
            )
    return sorted(present[0])


# ---- pixels --------------------------------------------------------------------------------------


READ, ENLARGED, UNREADABLE = 0, 1, 2  # states of an image


class Pixels(Dataset):
    """A dataset whose item i is image i, uint8 (3, size, size), the int64 digest of its pixels, and its state.

    The state is READ; ENLARGED if the image is smaller than `size`; or UNREADABLE, with pixels and digest 0.

    crop: centre-crop the images; if False they must have this size, or reading one raises UnreadableImage, a ValueError
    """

    def __init__(self, images: Folder | Arrays, size: int, crop: bool):
        self.images, self.size, self.crop = images, size, crop

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """Return a name of image i for messages."""
        return self.images.name(i)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int]:
        try:
            image = self.images.open(i)
        except UnreadableImage:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), 0, UNREADABLE
        state = ENLARGED if min(image.size) < self.size else READ
        if self.crop:
            image = center_crop(image, self.size)
        elif image.size != (self.size, self.size):
            raise UnreadableImage(
                f"{self.name(i)} has {image.width} x {image.height} pixels, expected {self.size} x {self.size} as the first "
                "image: make them one size, or pass --image-size to crop them."
            )
        pixels = np.array(image)
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=8).digest()
        return torch.from_numpy(pixels).permute(2, 0, 1), int.from_bytes(digest, "little", signed=True), state


def first_size(images: ImageSet) -> tuple[str, int, int]:
    """Return name, width and height of the first readable image. Raises ValueError if the first 100 cannot be read."""
    failure = None
    for i in range(min(len(images), 100)):
        try:
            return images.name(i), *images.open(i).size
        except UnreadableImage as error:
            failure = failure or error
    raise failure


def open_pixels(sets: list[ImageSet], image_size: int | None = None) -> tuple[int | None, list[Pixels | None]]:
    """Return the images' size in pixels per side, and a `Pixels` for each set, None for statistics.

    With `image_size` all images are cropped to it. Otherwise only the first set, REAL, is cropped: to the size recorded in
    saved statistics, or else to that of FAKE's first image. A set on its own keeps the size of its first image.

    Raises ValueError if the image that sets the size is not square.
    """
    with_images = [each for each in sets if not isinstance(each, Statistics)]
    size = image_size or next((each.record.get("crop") for each in sets if each not in with_images), None)
    reference = None if size or not with_images else with_images[-1]  # the set whose first image sets the size
    if reference:
        name, width, size = first_size(reference)
        if width != size:
            raise ValueError(
                f"{name} has {width} x {size} pixels, expected a square: pass --image-size to crop both sets."
            )
    crops = [bool(image_size) or each is sets[0] and each is not reference for each in sets]
    return size, [Pixels(each, size, crop) if each in with_images else None for each, crop in zip(sets, crops)]
