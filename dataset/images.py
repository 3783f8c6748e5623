"""Images of a folder with the labels of a hierarchy, cached latents, and the order of a training.

Every item is a function of its index alone (the flip is the trainer's), and the rows of a step are
a function of the seed and the step alone: a resume or another number of GPUs sees the same data.
"""

import contextlib
import hashlib
import json
import os
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler, default_collate

from dataset.latents import NPY_HEADER, chunk_hash, chunk_rows, chunk_span, damaged, read_names, read_sealed, shape_of
from hierarchy import Hierarchy
from hierarchy.layouts import list_files, sorted_as_text
from runtime.cli import few, sha256

# ---- which images, which labels ------------------------------------------------------------------


def check_counts(hierarchy: Hierarchy, num_classes: int | None, num_super_classes: int | None):
    """ValueError if a count the user gave (None: not given) is not the hierarchy's."""
    for flag, given, found in (
        ("--num-classes", num_classes, hierarchy.num_classes),
        ("--num-super-classes", num_super_classes, hierarchy.num_super_classes),
    ):
        if given is not None and given != found:
            raise ValueError(
                f"{flag} is {given}, but {hierarchy.name} has {found}: drop the flag or pass another --hierarchy."
            )


def list_images(root: str | os.PathLike, hierarchy: Hierarchy) -> tuple[list[str], torch.Tensor]:
    """Paths of the images of a data set, by class and within a class by name, and int64 labels (N,); see
    `folders.list_files`."""
    listing = list_files(root, hierarchy)
    return [os.path.join(listing.root, name) for name in listing.names], torch.tensor(listing.labels)


def fingerprint(names: list[str], labels: list[int]) -> str:
    """sha256 (hex) of the relative paths and labels of a data set: the same wherever it lies, and for its latents."""
    return hashlib.sha256(json.dumps([names, labels]).encode()).hexdigest()


def warnings_of(hierarchy: Hierarchy) -> list[str]:
    if not sorted_as_text(hierarchy.classes):
        return []
    return [
        f"The class folders are numbered without padding and sorted as text, so that {few(hierarchy.classes)} have the "
        "labels 0, 1, 2: pad the numbers with zeros if they are meant as labels."
    ]


# ---- pixels --------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB at 8 bits, all of it decoded. Pillow clips 16-bit grey at 255, so it is scaled here: 65535 -> 255."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy a large one


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square at (size, size), as in ADM (Dhariwal & Nichol 2021): box filter
    halvings while the short side is at least 2 * size, then bicubic to `size`, then the crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


class UnreadableImage(ValueError):
    def __init__(self, text: str):
        # a DataLoader raises it again with a worker's traceback before the sentence: cut that off
        super().__init__(" ".join(text.split("UnreadableImage: ")[-1].split()))


def read_crop(path: str | os.PathLike, size: int) -> Image.Image:
    """The centre crop (size, size) of an image file, RGB; UnreadableImage if the file is not a whole image, or one of
    more pixels than Pillow takes for harmless (2 * Image.MAX_IMAGE_PIXELS).

    A JPEG whose short side is at least 4 * size is shrunk by 2, 4 or 8 as it is decoded, to a short side of at least
    2 * size: there its cosine transform is cut off, in place of all halvings of `center_crop` but the last. That is
    2 to 5 times as fast for 4000 x 3000 pixels at 256. Levels of 255 are then lower by 0.5 for each such halving, which
    rounds up, and differ by 1 besides (root mean square; more where a side is odd, as halving shifts pixels there).
    """
    try:
        with Image.open(path) as image:
            draft = image.draft(None, (2 * size, 2 * size)) if min(image.size) >= 4 * size else None  # None: no JPEG
            image = to_rgb(image)
    except Exception as error:  # decoders raise all sorts of them at a damaged file
        raise UnreadableImage(f"Cannot read image {path} ({error}): replace or remove it.") from None
    if draft:
        box = draft[1]  # of the image among the decoded pixels: its sides are fractions, the pixels fill whole blocks
        image = image.resize((int(box[2]) // 2, int(box[3]) // 2), Image.Resampling.BOX, box)
    return center_crop(image, size)


class ImageData(Dataset):
    """Item i: the centre crop of image i, float32 (3, image_size, image_size) in [-1, 1]; its label; i.

    Where image i cannot be read, the next one of its class that can stands for it (after the last comes the first),
    and its index is what the item tells; UnreadableImage if the class has none.

    root         folder that the names are relative to
    names        path of each image
    labels       int64 (N,)
    ignored      paths of what was passed over: hidden files, files that are no images
    warnings     sentences about what may not be as it was meant
    """

    def __init__(self, root: str | os.PathLike, hierarchy: Hierarchy, image_size: int):
        if image_size < 1:
            raise ValueError(f"--image-size is {image_size}; expected at least 1.")
        self.root, self.names, labels, self.ignored = list_files(root, hierarchy)
        self.labels = torch.tensor(labels)
        self.fingerprint = fingerprint(self.names, labels)
        self.warnings = warnings_of(hierarchy)
        if self.ignored:
            self.warnings.append(f"Passed over as no images: {len(self.ignored)} ({few(self.ignored)}).")
        self.image_size = image_size

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int]:
        try:
            pixels, shown = self.pixels(i), i
        except UnreadableImage as error:
            pixels, shown = self.stand_in(i, error)
        return image_tensor(pixels), int(self.labels[i]), shown

    def name(self, i: int) -> str:
        """Path of image i below the root."""
        return self.names[i]

    def pixels(self, i: int) -> np.ndarray:
        """uint8 (image_size, image_size, 3) of image i and no other."""
        return np.array(read_crop(os.path.join(self.root, self.names[i]), self.image_size))

    def stand_in(self, i: int, error: UnreadableImage) -> tuple[np.ndarray, int]:
        first, end = torch.searchsorted(self.labels, torch.stack([self.labels[i], self.labels[i] + 1])).tolist()
        for j in (*range(i + 1, end), *range(first, i)):
            with contextlib.suppress(UnreadableImage):
                return self.pixels(j), j
        folder = Path(self.root, self.names[i]).parent
        raise UnreadableImage(
            f"None of the {end - first} images of class folder {folder} can be read ({error}), expected at least one: "
            "replace them or remove the class from folder and hierarchy."
        )


def image_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [-1, 1]"""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 127.5 - 1


# ---- latents -------------------------------------------------------------------------------------


class LatentData(Dataset):
    """What `tools.encode_latents` wrote: item i is float16 (F, 2C, h, w), the label, and the index of the image shown.

    F = 2: the image and its mirror image, F = 1: the image alone. The first C channels are the
    mean of the VAE's posterior, the last C its standard deviation, both times the VAE's scale.
    The index is not i where image i could not be read when it was encoded, see `ImageData`.

    `info` is latents.json. A changed byte in that file, in the labels or names is a ValueError here, one in the
    moments is left to `verify`.
    """

    def __init__(self, root: str | os.PathLike, hierarchy: Hierarchy | None = None):
        self.root = Path(root)
        if not (self.root / "latents.json").is_file():
            raise ValueError(f"{root} holds no latents.json: write it to the end with python -m tools.encode_latents.")
        self.info = read_sealed(self.root / "latents.json")
        for name in ("labels.npy", "images.txt"):
            if sha256(self.root / name) != self.info["hashes"][name]:
                raise damaged(self.root / name)
        if (self.root / "moments.npy").stat().st_size != chunk_span(self.info, len(self.chunk_hashes) - 1)[1]:
            raise damaged(self.root / "moments.npy")
        self.hierarchy = Hierarchy.from_dict(self.info["hierarchy"])
        if hierarchy is not None and hierarchy != self.hierarchy:
            raise ValueError(
                f"The latents in {root} were labelled by another hierarchy "
                f"({self.hierarchy!r}) than the one given ({hierarchy!r}): encode them again."
            )
        self.labels = torch.from_numpy(np.load(self.root / "labels.npy"))
        most = self.hierarchy.num_classes - 1
        if not 0 <= self.labels.min() <= self.labels.max() <= most:
            raise ValueError(
                f"{self.root / 'labels.npy'} has labels of {self.labels.min()} to {self.labels.max()}, expected 0 to {most} of "
                f"{self.hierarchy.name}: encode the images again."
            )
        self.shown = torch.arange(len(self.labels))
        for i, j in self.info["skipped"]:
            self.shown[i] = j
        self.fingerprint = self.info["image_list"]
        self.warnings = warnings_of(self.hierarchy)

    @cached_property
    def names(self) -> list[str]:
        return read_names(self.root)

    @property
    def chunk_hashes(self) -> list[str]:
        return self.info["hashes"]["moments.npy"]

    @cached_property
    def moments(self) -> np.ndarray:
        shape = shape_of(self.info)
        return np.memmap(self.root / "moments.npy", np.float16, "r", NPY_HEADER, shape).view(np.ndarray)

    def name(self, i: int) -> str:
        """Path of image i below the root of its data set."""
        return self.names[i]

    def verify(self, rank: int = 0, world: int = 1):
        """Compare this rank's share of the moments with the hashes taken when they were written; ValueError naming the
        file and its images where they differ. Reads N / world items, which warms the page cache too."""
        for k in range(rank, len(self.chunk_hashes), world):
            if chunk_hash(self.root, self.info, k) != self.chunk_hashes[k]:
                rows = chunk_rows(self.info, k)
                raise damaged(self.root / "moments.npy", f" in images {rows[0]} to {rows[-1]}")

    def check(self, autoencoder, image_size: int, flip: bool):
        """ValueError if they were encoded otherwise than the training would."""
        for what, wanted in (
            ("image size", image_size),
            ("channels", autoencoder.channels),
            ("scale", autoencoder.scale),
            ("flips", 2 if flip else self.info["flips"]),
        ):
            found = self.info[what.replace(" ", "_")]
            if found != wanted:
                raise ValueError(
                    f"The latents in {self.root} have {what} {found}, the training asks for "
                    f"{wanted}: change its flags or encode them again."
                )

    def __getstate__(self):  # a pickled memory map is the whole array: a worker opens its own
        return {name: value for name, value in self.__dict__.items() if name != "moments"}

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int]:
        x, label, shown = self.__getitems__([i])
        return x[0], int(label), int(shown)

    def __getitems__(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A whole batch by one gather, for a DataLoader with `collate`; item by item takes 7 times as long."""
        rows = torch.tensor(rows)
        return torch.from_numpy(self.moments.take(rows.numpy(), axis=0)), self.labels[rows], self.shown[rows]


def collate(batch):
    """A DataLoader's batch of either data set: (x, labels, indices of the images shown)."""
    return batch if isinstance(batch, tuple) else default_collate(batch)


# ---- the order of a training ---------------------------------------------------------------------


class StepBatches(Sampler):
    """Batch sampler: this rank's rows of step start_step, start_step + 1, ... (no end if max_steps
    is None, else up to step max_steps - 1).

    Epoch e is a permutation drawn from (seed, e); step k has rows k mod steps_per_epoch of epoch
    k // steps_per_epoch, the last incomplete batch is dropped, and rank r takes the r-th of `world`
    equal slices. Every start of the iteration begins at start_step.
    """

    def __init__(
        self,
        n: int,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        max_steps: int | None = None,
    ):
        assert 0 <= rank < world and start_step >= 0
        if global_batch < 1 or global_batch % world:
            near = max(1, round(global_batch / world)) * world
            raise ValueError(
                f"--global-batch-size {global_batch} does not divide among {world} processes: "
                f"the nearest that does is {near}."
            )
        if n < global_batch:
            raise ValueError(
                f"The data has {n} images, fewer than --global-batch-size {global_batch}: "
                f"pass at most {n // world * world}."
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"--global-seed is {seed}; expected 0 to {2**32 - 1}.")
        self.n, self.global_batch, self.seed = n, global_batch, seed
        self.rank, self.world = rank, world
        self.start_step, self.max_steps = start_step, max_steps
        self.steps_per_epoch = n // global_batch
        self.share = global_batch // world
        self.mine = slice(rank * self.share, (rank + 1) * self.share)

    def __iter__(self):
        step = self.start_step
        while self.max_steps is None or step < self.max_steps:
            yield self.rows(step)[self.mine].tolist()
            step += 1

    def rows(self, step: int) -> torch.Tensor:
        """The whole batch of a step, that of all ranks: int64 (global_batch,)."""
        epoch, k = divmod(step, self.steps_per_epoch)
        return epoch_order(self.n, self.seed, epoch)[k * self.global_batch : (k + 1) * self.global_batch]

    def __len__(self):
        if self.max_steps is None:
            raise TypeError("StepBatches without max_steps has no end.")
        return max(0, self.max_steps - self.start_step)


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """Permutation of n by (seed, epoch). torch's CPU generator reads only the low 32 bits of its
    seed, so the pair is hashed to 32 bits rather than shifted together."""
    mixed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))
