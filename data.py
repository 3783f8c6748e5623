"""Images of a folder with the labels of a hierarchy, cached latents, and the order of a training.

Every item is a function of its index alone (the flip is the trainer's), and the rows of a step are
a function of the seed and the step alone: a resume or another number of GPUs sees the same data.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from folders import (
    IMAGE_SUFFIXES,
    VEGFRU_LISTS,
    check_once,
    class_folders,
    few,
    is_image,
    is_vegfru,
    read_vegfru_list,
    unpacked,
    visible,
)
from hierarchy import Hierarchy

LATENTS_FORMAT = "finediffusion-latents-1"


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
    """Paths of the images under `root`, sorted within a class, and int64 labels (N,).

    `root` is `superclass/class/*`, `class/*`, iNaturalist or VegFru as they unpack, or one of the
    lists of VegFru (`vegfru_list/vegfru_val.txt`). VegFru's folder stands for its train list if
    the lists are there, else for all images. Classes are matched by name, or by the number at the
    head of an iNaturalist name if the hierarchy has only numbers; superclasses are the
    hierarchy's, whatever folder the class lies in. Hidden files are passed over.
    """
    path, root = Path(root), unpacked(root)
    train = root / VEGFRU_LISTS / "vegfru_train.txt"
    if path.is_file() or is_vegfru(root) and train.is_file():
        return list_vegfru(path if path.is_file() else train, root, hierarchy)
    return list_class_folders(root, class_folders(root), hierarchy)


def list_class_folders(root: Path, folders: list[Path], hierarchy: Hierarchy):
    check_once(folders)
    label = labels_of([folder.name for folder in folders], hierarchy, root)
    paths, labels = [], []
    for folder in sorted(folders, key=lambda folder: label[folder.name]):
        images = [entry.path for entry in visible(folder) if is_image(entry)]
        if not images:
            raise ValueError(
                f"Class folder {folder} has no images in it ({', '.join(IMAGE_SUFFIXES)}): "
                "add some or remove it from folder and hierarchy."
            )
        paths += images
        labels += [label[folder.name]] * len(images)
    return paths, torch.tensor(labels, dtype=torch.int64)


def list_vegfru(path: Path, root: Path, hierarchy: Hierarchy):
    images = sorted(image for image, _ in read_vegfru_list(path))
    missing = [str(image) for image in images if not (root / image).is_file()]
    if missing or not images:
        raise ValueError(
            f"{path} names {len(images)} images, of which {root} lacks {len(missing)} "
            f"({few(missing)}): unpack the VegFru release again."
        )
    label = labels_of(list({image.parent.name: 0 for image in images}), hierarchy, path)
    images.sort(key=lambda image: label[image.parent.name])
    labels = [label[image.parent.name] for image in images]
    return [str(root / image) for image in images], torch.tensor(labels, dtype=torch.int64)


def labels_of(names: list[str], hierarchy: Hierarchy, root: Path) -> dict[str, int]:
    """Folder name -> label; names and classes must be the same set."""
    index = {name: i for i, name in enumerate(hierarchy.classes)}
    key = {name: name for name in names}
    if hierarchy.numbered:
        key = {name: name.split("_")[0] for name in names}
    unknown = [name for name in names if key[name] not in index]
    if unknown:
        raise ValueError(
            f"{root} has {len(unknown)} class folders that {hierarchy.name} lacks "
            f"({few(unknown)}): remove them or pass the --hierarchy that has them."
        )
    missing = sorted(index.keys() - set(key.values()), key=index.get)
    if missing:
        raise ValueError(
            f"{root} lacks {len(missing)} of the {hierarchy.num_classes} classes of "
            f"{hierarchy.name} ({few(missing)}): add their images or pass a smaller --hierarchy."
        )
    return {name: index[key[name]] for name in names}


# ---- pixels --------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB at 8 bits. Pillow clips 16-bit grey at 255, so it is scaled here: 65535 -> 255."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


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


class ImageData(Dataset):
    """Item i: the centre crop of image i, float32 (3, image_size, image_size) in [-1, 1]; label."""

    def __init__(self, root: str | os.PathLike, hierarchy: Hierarchy, image_size: int):
        if image_size < 1:
            raise ValueError(f"--image-size is {image_size}; expected at least 1.")
        self.root = unpacked(root)
        self.paths, self.labels = list_images(root, hierarchy)
        self.image_size = image_size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return image_tensor(self.pixels(i)), int(self.labels[i])

    def pixels(self, i: int) -> np.ndarray:
        """uint8 (image_size, image_size, 3)"""
        try:
            with Image.open(self.paths[i]) as image:
                return np.array(center_crop(to_rgb(image), self.image_size))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UnreadableImage(f"Cannot read image {self.paths[i]} ({error}): replace or remove it.") from None


def image_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [-1, 1]"""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 127.5 - 1


# ---- latents -------------------------------------------------------------------------------------


class LatentData(Dataset):
    """What `tools.encode_latents` wrote: item i is float16 (F, 2C, h, w) and the label.

    F = 2: the image and its mirror image, F = 1: the image alone. The first C channels are the
    mean of the VAE's posterior, the last C its standard deviation, both times the VAE's scale.
    """

    def __init__(self, root: str | os.PathLike, hierarchy: Hierarchy | None = None):
        self.root = Path(root)
        if not (self.root / "latents.json").is_file():
            raise ValueError(f"{root} holds no latents.json: write it to the end with python -m tools.encode_latents.")
        self.info = json.loads((self.root / "latents.json").read_text())
        if self.info.get("format") != LATENTS_FORMAT:
            raise ValueError(
                f"{root} has latents of format {self.info.get('format')!r}, expected "
                f"{LATENTS_FORMAT!r}: encode them again."
            )
        self.hierarchy = Hierarchy.from_dict(self.info["hierarchy"])
        if hierarchy is not None and hierarchy != self.hierarchy:
            raise ValueError(
                f"The latents in {root} were labelled by another hierarchy "
                f"({self.hierarchy!r}) than the one given ({hierarchy!r}): encode them again."
            )
        self.labels = torch.from_numpy(np.load(self.root / "labels.npy"))
        self._moments = None
        shape = (len(self.labels), self.info["flips"], 2 * self.info["channels"], self.info["size"], self.info["size"])
        if self.moments.shape != shape or self.moments.dtype != np.float16:
            raise ValueError(
                f"{root}: moments.npy is {self.moments.dtype} {self.moments.shape}, expected "
                f"float16 {shape}: encode them again."
            )

    @property
    def moments(self) -> np.ndarray:
        if self._moments is None:
            self._moments = np.load(self.root / "moments.npy", mmap_mode="r")
        return self._moments

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
        return {**self.__dict__, "_moments": None}

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.array(self.moments[i])), int(self.labels[i])


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

    def __iter__(self):
        step, part = self.start_step, self.global_batch // self.world
        epoch, order = None, None
        while self.max_steps is None or step < self.max_steps:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = epoch_order(self.n, self.seed, epoch)
            first = step % self.steps_per_epoch * self.global_batch + self.rank * part
            yield order[first : first + part].tolist()
            step += 1

    def __len__(self):
        if self.max_steps is None:
            raise TypeError("StepBatches without max_steps has no end.")
        return max(0, self.max_steps - self.start_step)


def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """Permutation of n by (seed, epoch). torch's CPU generator reads only the low 32 bits of its
    seed, so the pair is hashed to 32 bits rather than shifted together."""
    mixed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))
