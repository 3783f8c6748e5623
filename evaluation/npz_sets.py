"""Arrays of .npz files, read without trusting them, and sets of images in .npz files as ADM samples them.

    arr_0, uint8 (N, H, W, 3)          images
    arr_1 or labels, int (N,)          their labels
    classes, str (classes,)            the name of each label's class, if the file has them

Files of statistics: see saved_statistics.py.
"""

import math
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from evaluation.class_names import match_names
from hierarchy import Hierarchy
from runtime.text import one_line, shorten

MAX_BYTES = 2**32  # of an array that is read into memory
# a compressed array may inflate to MAX_INFLATED bytes, or to MAX_RATIO times its compressed size; images stay far below
MAX_INFLATED, MAX_RATIO = 2**26, 50


# ---- arrays --------------------------------------------------------------------------------------


class Member(NamedTuple):
    """An array of an .npz file; offset: of its data in the file in bytes, None if compressed."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int | None


def npz_members(path: Path) -> dict[str, Member]:
    """Read the headers of an .npz file. Raises ValueError if it is absent or damaged, or inflates too much."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}, expected an .npz of images or statistics: check the path.")
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            return {info.filename.removesuffix(".npy"): read_member(archive, info, file) for info in archive.infolist()}
    except Exception as error:  # damaged zip files and headers raise anything
        raise damaged_file(path, error) from None


def damaged_file(path: Path, error: Exception) -> ValueError:
    """Return the user's error for a file that raised `error`."""
    return ValueError(
        f"{path} is damaged or not an .npz file ({one_line(error)}), expected images or statistics: write or download it "
        "again."
    )


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: BinaryIO) -> Member:
    """Read one array's header; `file`: the archive's file."""
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        header = stream.tell()
    if info.file_size > max(MAX_INFLATED, MAX_RATIO * info.compress_size):
        raise ValueError(f"{info.filename} inflates from {info.compress_size:,} to {info.file_size:,} bytes")
    if info.file_size != header + math.prod(shape) * dtype.itemsize and not dtype.hasobject:
        raise ValueError(f"{info.filename} has another length than its shape {shape} needs")
    if info.compress_type != zipfile.ZIP_STORED:
        return Member(shape, dtype, fortran, None)
    # the local zip header has 30 bytes, the last 4 of them the lengths of the name and an extra field that follow
    file.seek(info.header_offset + 26)
    lengths = np.frombuffer(file.read(4), "<u2").astype(int)
    return Member(shape, dtype, fortran, info.header_offset + 30 + int(lengths.sum()) + header)


def read_array(path: Path, members: dict[str, Member], name: str, kinds: str = "fiu") -> np.ndarray:
    """Read an array into memory.

    kinds: allowed dtype kinds, see `numpy.dtype.kind`

    Raises ValueError if the array is absent, of another kind, too large, or damaged.
    """
    if name not in members:
        raise ValueError(f"{path} holds {shorten(members)}, expected {name!r} as well: write it again.")
    found = members[name]
    if found.dtype.kind not in kinds:
        raise ValueError(f"{path} has {name!r} of the type {found.dtype}, expected plain numbers: write it again.")
    if math.prod(found.shape) * found.dtype.itemsize > MAX_BYTES:
        raise ValueError(
            f"{path} has {name!r} of the shape {found.shape}, expected at most 4 GiB in a compressed array: save it with "
            "numpy.savez, which does not compress."
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except Exception as error:  # damaged data: numpy checks its checksum here
        raise damaged_file(path, error) from None


# ---- images --------------------------------------------------------------------------------------


class Arrays:
    """Images of an .npz file, each read from disk when it is needed.

    path        the file
    labelled    True if the file has labels
    labels      int64 (N,) after `label`, None before
    by_name     True if the file names its classes and `label` found them by their names
    """

    kind, by_name = "npz", False

    def __init__(self, path: Path, members: dict[str, Member]):
        if "arr_0" not in members:
            raise ValueError(
                f"{path} holds {shorten(members)}, expected images in arr_0, or statistics in mu and sigma: write it again."
            )
        images = members["arr_0"]
        if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[3] != 3 or images.fortran:
            raise ValueError(
                f"{path} has arr_0 of {images.dtype} {images.shape}, expected uint8 (N, H, W, 3) in C order: write it again."
            )
        if images.offset and images.offset + math.prod(images.shape) > path.stat().st_size:
            raise ValueError(f"{path} is shorter than arr_0 {images.shape}, expected all images: download it again.")
        if images.shape[0] == 0:
            raise ValueError(f"{path} has no images in it, expected some in arr_0: write it again.")
        self.path, self.member, self.labels = path, images, None
        self.compressed = read_array(path, members, "arr_0", "u") if images.offset is None else None
        name = next((name for name in ("arr_1", "labels") if name in members), None)
        self.given = read_array(path, members, name, "iu") if name else None
        self.labelled = name is not None
        if self.labelled and self.given.shape != (images.shape[0],):
            raise ValueError(
                f"{path} has labels of the shape {self.given.shape}, expected ({images.shape[0]},): write it again."
            )
        self.classes = self.read_classes(members) if "classes" in members and self.labelled else None

    def read_classes(self, members: dict[str, Member]) -> list[str]:
        """Return the names of the classes. Raises ValueError if they are not a list of unique names that has all labels."""
        names = read_array(self.path, members, "classes", "U")
        if names.ndim != 1 or len(set(names.tolist())) < len(names) or not self.given.max() < len(names):
            raise ValueError(
                f"{self.path} has classes of the shape {names.shape} for labels up to {self.given.max()}, expected a name of its "
                "own for each label: write it again."
            )
        return names.tolist()

    def own_hierarchy(self) -> Hierarchy:
        """Raise ValueError: an .npz file has no names."""
        raise ValueError(f"{self.path} has labels, which are only numbers.")

    def label(self, hierarchy: Hierarchy | None):
        """Set `labels`, all 0 if the hierarchy is None.

        Raises ValueError if a label is out of range, or if the hierarchy lacks a class of the images.
        """
        if hierarchy is None:
            self.labels = np.zeros(len(self), dtype=np.int64)
            return
        count = len(self.classes) if self.classes else hierarchy.num_classes
        out_of_range = (self.given < 0) | (self.given >= count)
        if out_of_range.any():
            raise ValueError(
                f"{self.path} has the label {self.given[out_of_range][0]}, expected 0 to {count - 1} of {hierarchy.name}: pass "
                "another --hierarchy."
            )
        self.labels = self.given.astype(np.int64)
        if self.classes:
            matching = match_names(self.classes, hierarchy)
            self.labels, self.by_name = matching.labels[self.given], matching.by_name
            unknown = dict.fromkeys(self.classes[i] for i in self.given[self.labels < 0])
            if unknown:
                raise ValueError(
                    f"{self.path} has images of {len(unknown)} classes that {hierarchy!r} lacks ({shorten(unknown)}): pass the "
                    "--hierarchy that they were sampled with."
                )

    def present(self, hierarchy: Hierarchy) -> set[int]:
        """Return the superclasses that have images."""
        return set(hierarchy.parents[np.unique(self.labels)].tolist())

    def __len__(self) -> int:
        return self.member.shape[0]

    def name(self, i: int) -> str:
        """Return a description of image i for messages."""
        return f"{self.path}, image {i}"

    def open(self, i: int) -> Image.Image:
        """Read image i, RGB."""
        if self.compressed is not None:
            return Image.fromarray(self.compressed[i])
        shape = self.member.shape[1:]
        with open(self.path, "rb") as file:  # a memory map would count as memory of the process
            pixels = np.fromfile(file, np.uint8, math.prod(shape), offset=self.member.offset + i * math.prod(shape))
        return Image.fromarray(pixels.reshape(shape))

    def count_lossy(self) -> int:
        """Return how many images were stored with lossy compression: an array has none."""
        return 0
