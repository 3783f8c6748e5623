"""Images of a folder as a data set: decoding, centre crop, and a substitute for an image that cannot be read.

Each item depends on its index alone (the trainer flips images), so that a resumed run and any number of GPUs see the
same data.
"""

import contextlib
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from dataset.listing import fingerprint, label_warnings, list_files
from hierarchy import Hierarchy
from runtime.text import one_line, shorten

# ---- pixels --------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image completely and convert it to 8-bit RGB.

    16-bit grey is scaled, 65535 to 255; Pillow would clip it at 255.
    """
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy a large image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop the largest centred square and resize it to (size, size), as ADM does (Dhariwal & Nichol 2021).

    The image is halved with a box filter while its short side is at least 2 * size, resized to a short side of `size`
    with a bicubic filter, then cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


class UnreadableImage(ValueError):
    """An image file that cannot be decoded."""

    def __init__(self, text: str):
        # a DataLoader raises it again with the worker's traceback before the sentence: cut that off
        super().__init__(" ".join(text.split("UnreadableImage: ")[-1].split()))


def read_crop(path: str | os.PathLike, size: int) -> Image.Image:
    """Return the centre crop of an image file, RGB (size, size).

    A JPEG whose short side is at least 4 * size is shrunk by 2, 4 or 8 during decoding, to a short side of at least
    2 * size: the decoder truncates its cosine transform, in place of all halvings of `center_crop` but the last. At
    256 pixels this is 2 to 5 times as fast for 4000 x 3000 pixels. Each halving that is replaced lowers the levels
    (0 to 255) by 0.5, since the box filter rounds up. Besides that they differ by 1 (root mean square); by more if a side
    is odd, since halving then shifts pixels.

    Raises UnreadableImage if the file is damaged, is not an image, or has more than 2 * Image.MAX_IMAGE_PIXELS pixels.
    """
    try:
        with Image.open(path) as image:
            draft = image.draft(None, (2 * size, 2 * size)) if min(image.size) >= 4 * size else None  # None: no JPEG
            image = to_rgb(image)
    except Exception as error:  # decoders raise exceptions of many types
        raise UnreadableImage(f"Cannot read image {path} ({one_line(error)}): replace or remove it.") from None
    if draft:
        box = draft[1]  # of the image in the decoded pixels: its sides are fractions, the pixels fill complete blocks
        image = image.resize((int(box[2]) // 2, int(box[3]) // 2), Image.Resampling.BOX, box)
    return center_crop(image, size)


def image_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Convert uint8 (H, W, 3) to float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 127.5 - 1


# ---- the data set --------------------------------------------------------------------------------


class ImageData(Dataset):
    """Images of a folder. Item i is (centre crop of image i, label, index of the image shown).

    The crop is float32 (3, image_size, image_size) in [-1, 1]. If image i cannot be read, the next readable image of its
    class is shown (after the last comes the first). Reading an item raises UnreadableImage if the class has none.

    root         folder that the paths are relative to
    paths        path of each image below `root`
    labels       int64 (N,)
    ignored      paths of hidden files and of files that are not images
    fingerprint  SHA-256 of paths and labels
    warnings     sentences about properties of the folder that may be mistakes
    """

    def __init__(self, root: str | os.PathLike, hierarchy: Hierarchy, image_size: int):
        if image_size < 1:
            raise ValueError(f"--image-size is {image_size}, expected at least 1.")
        self.root, self.paths, labels, self.ignored = list_files(root, hierarchy)
        self.labels = torch.tensor(labels)
        self.fingerprint = fingerprint(self.paths, labels)
        self.warnings = label_warnings(hierarchy)
        if self.ignored:
            self.warnings.append(
                f"Ignored entries that are not images in a class folder: {len(self.ignored)} ({shorten(self.ignored)})."
            )
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int]:
        try:
            pixels, shown = self.read_pixels(i), i
        except UnreadableImage as error:
            pixels, shown = self.read_substitute(i, error)
        return image_tensor(pixels), int(self.labels[i]), shown

    def read_pixels(self, i: int) -> np.ndarray:
        """Return the centre crop of image i, uint8 (image_size, image_size, 3)."""
        return np.array(read_crop(os.path.join(self.root, self.paths[i]), self.image_size))

    def read_substitute(self, i: int, error: UnreadableImage) -> tuple[np.ndarray, int]:
        """Return pixels and index of the next readable image in the class of image i, which failed with `error`."""
        first, end = torch.searchsorted(self.labels, torch.stack([self.labels[i], self.labels[i] + 1])).tolist()
        for j in (*range(i + 1, end), *range(first, i)):
            with contextlib.suppress(UnreadableImage):
                return self.read_pixels(j), j
        folder = Path(self.root, self.paths[i]).parent
        raise UnreadableImage(
            f"None of the {end - first} images of class folder {folder} can be read ({one_line(error)}), expected at least "
            "one: replace them, or remove the class from the folder and the hierarchy."
        )


def collate(batch: tuple | list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Collate for a DataLoader of `ImageData` or `LatentData`: (x, labels, indices of the images shown)."""
    return batch if isinstance(batch, tuple) else default_collate(batch)
