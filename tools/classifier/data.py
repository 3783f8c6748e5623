"""Images of a classifier: folders, or the lists of tools.filter_images, with the rows and crops of every training step."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from dataset.images import read_crop
from dataset.listing import fingerprint, list_files
from hierarchy import Hierarchy
from runtime.text import one_line, shorten
from sampling.samplers import noise_stream
from training.batches import epoch_order

KEPT_FORMAT = "finediffusion-kept-images-1"  # of a list of tools.filter_images

# ---- folders and lists ---------------------------------------------------------------------------


@dataclass
class LabelledImages:
    """Images with labels.

    paths        of the files
    labels       int64 (N,)
    fingerprint  SHA-256 of the paths below their folders and the labels
    """

    paths: list[str]
    labels: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.paths)

    def counts(self, classes: int) -> np.ndarray:
        """Return the number of images of each class, int64 (classes,)."""
        return np.bincount(self.labels, minlength=classes)


def find_hierarchy(spec: str | None, sources: Sequence[str]) -> Hierarchy:
    """Return the hierarchy that `spec` names, or else that of the first source, a folder or a list."""
    if spec:
        return Hierarchy.load(spec)
    return Hierarchy.from_folder(folder_of(sources[0]), allow_flat=True)


def folder_of(source: str) -> Path:
    """Return the folder of a source: itself, or the one that a list was made of."""
    return Path(read_kept(source)["folder"] if source.endswith(".json") else source)


def read_kept(path: str | os.PathLike) -> dict:
    """Read a list of tools.filter_images. Raises ValueError if it is absent or something else."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if record["format"] != KEPT_FORMAT or not isinstance(record["folder"], str):
            raise ValueError(f"its format is {record['format']!r}")
        if not all(isinstance(name, str) for name in record["images"]):
            raise ValueError("its images are not names")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a list of images ({one_line(error)}), expected one of tools.filter_images, or a folder: name another."
        ) from None
    return record


def open_images(sources: Sequence[str], hierarchy: Hierarchy) -> LabelledImages:
    """List the images of folders and of lists; classes may be absent.

    Raises ValueError if a folder has a class that the hierarchy lacks, or lacks an image of its list.
    """
    paths, labels, names = [], [], []
    for source in sources:
        listing = list_files(folder_of(source), hierarchy, partial=True)
        label_of = dict(zip(listing.paths, listing.labels))
        if source.endswith(".json"):
            kept = read_kept(source)["images"]
            absent = [name for name in kept if name not in label_of]
            if absent:
                raise ValueError(
                    f"{source} names {len(absent)} images that {listing.root} lacks ({shorten(absent)}), expected the images of "
                    "that folder: filter them again."
                )
            label_of = {name: label_of[name] for name in kept}
        paths += [os.path.join(listing.root, name) for name in label_of]
        labels += label_of.values()
        names += label_of
    return LabelledImages(paths, np.array(labels, np.int64), fingerprint(names, labels))


# ---- rows of a step ------------------------------------------------------------------------------


class StepRows(Sampler):
    """Batch sampler of this process's (step, position, row) in the steps start, start + 1, ..., steps - 1.

    Position i of step k is image number k * batch + i of the training. These numbers go through all images in an order
    drawn for each epoch; if `balance`, through all classes in an order drawn for each round, and through the images of
    each class in turn, so that images of small classes are repeated. Rank r takes positions r, r + world, ...
    """

    def __init__(
        self,
        labels: np.ndarray,
        batch: int,
        steps: int,
        seed: int,
        balance: bool = False,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.labels, self.batch, self.steps, self.seed, self.balance = labels, batch, steps, seed, balance
        self.start, self.rank, self.world = start, rank, world
        order = np.argsort(labels, kind="stable")
        self.rows_of = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)  # of each class that has images

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step in range(self.start, self.steps):
            yield [(step, i, self.row(step * self.batch + i)) for i in range(self.rank, self.batch, self.world)]

    def row(self, number: int) -> int:
        """Return the row of an image number of the training."""
        if not self.balance:
            epoch, place = divmod(number, len(self.labels))
            return int(epoch_order(len(self.labels), self.seed, epoch)[place])
        turn, place = divmod(number, len(self.rows_of))
        group = int(epoch_order(len(self.rows_of), self.seed, turn)[place])
        rows = self.rows_of[group]
        epoch, place = divmod(turn, len(rows))
        draws = np.random.default_rng((self.seed, group, epoch))
        return int(rows[draws.permutation(len(rows))[place]])


# ---- pixels --------------------------------------------------------------------------------------


class TrainingCrops(Dataset):
    """Random crops: item (step, position, row) -> uint8 (3, input_size, input_size) and the label of the row.

    The centre crop of an image, `image_size` pixels a side, is cropped to a random square with at least the share `area`
    of it, and mirrored in half of the cases if `flip`. Seed, step and position determine both.
    """

    def __init__(self, images: LabelledImages, image_size: int, input_size: int, area: float, flip: bool, seed: int):
        self.images, self.image_size, self.input_size = images, image_size, input_size
        self.area, self.flip, self.seed = area, flip, seed

    def __getitem__(self, item: tuple[int, int, int]) -> tuple[torch.Tensor, int]:
        step, position, row = item
        draws = noise_stream("crop", self.seed, step, position)
        image = read_crop(self.images.paths[row], self.image_size)
        side = self.image_size * draws.uniform(self.area, 1) ** 0.5
        left, top = draws.uniform(0, self.image_size - side, 2)
        image = image.resize((self.input_size,) * 2, Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        if self.flip and draws.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(image), int(self.images.labels[row])


class CentreCrops(Dataset):
    """Centre crops, uint8 (3, image_size, image_size), of some rows, as evaluate.py shows them to a classifier."""

    def __init__(self, images: LabelledImages, image_size: int, rows: Sequence[int]):
        self.images, self.image_size, self.rows = images, image_size, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> torch.Tensor:
        return to_tensor(read_crop(self.images.paths[self.rows[i]], self.image_size))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert an RGB image to uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
