"""Images of a folder with the labels of a hierarchy, cached latents, and the order of a training.

Every item is a function of its index alone (the flip is the trainer's), and the rows of a step are
a function of the seed and the step alone: a resume or another number of GPUs sees the same data.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from hierarchy import Hierarchy
from hierarchy.layouts import list_files, sorted_as_text
from runtime.text import shorten


def list_images(root: str | os.PathLike, hierarchy: Hierarchy) -> tuple[list[str], torch.Tensor]:
    """Paths of the images of a data set, by class and within a class by name, and int64 labels (N,); see
    `folders.list_files`."""
    listing = list_files(root, hierarchy)
    return [os.path.join(listing.root, name) for name in listing.names], torch.tensor(listing.labels)


def fingerprint(names: list[str], labels: list[int]) -> str:
    """sha256 (hex) of the relative paths and labels of a data set: the same wherever it lies, and for its latents."""
    return hashlib.sha256(json.dumps([names, labels]).encode()).hexdigest()


def label_warnings(hierarchy: Hierarchy) -> list[str]:
    if not sorted_as_text(hierarchy.classes):
        return []
    return [
        f"The class folders are numbered without padding and sorted as text, so that {shorten(hierarchy.classes)} have the "
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
        self.warnings = label_warnings(hierarchy)
        if self.ignored:
            self.warnings.append(f"Passed over as no images: {len(self.ignored)} ({shorten(self.ignored)}).")
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


def collate(batch):
    """A DataLoader's batch of either data set: (x, labels, indices of the images shown)."""
    return batch if isinstance(batch, tuple) else default_collate(batch)
