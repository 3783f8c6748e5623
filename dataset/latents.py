"""The files of cached latents, which `tools.encode_latents` writes and `data.LatentData` reads. N images, F flips:

moments.npy   float16 (N, F, 2C, h, w), hashed by chunks of `chunk` images
labels.npy    int64 (N,)
images.txt    the images' paths, one a line
latents.json  what was encoded and how, the SHA-256 of the others, and one of itself
"""

import hashlib
import io
import json
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.images import label_warnings
from hierarchy import Hierarchy
from runtime.files import atomic_write, path_in_errors, sha256

FORMAT = "finediffusion-latents-2"
NPY_HEADER = 128  # bytes before the numbers of moments.npy; numpy pads the header of any such shape to this


def moments_shape(info: dict) -> tuple[int, ...]:
    return info["images"], info["flips"], 2 * info["channels"], info["size"], info["size"]


def chunk_rows(info: dict, k: int) -> range:
    """The images of chunk k."""
    return range(k * info["chunk"], min((k + 1) * info["chunk"], info["images"]))


def chunk_count(info: dict) -> int:
    return -(-info["images"] // info["chunk"])


def item_bytes(info: dict) -> int:
    """Of the moments of one image."""
    return 2 * info["flips"] * 2 * info["channels"] * info["size"] ** 2


def chunk_span(info: dict, k: int) -> tuple[int, int]:
    """First byte of chunk k in moments.npy, and the first after it; the file's header belongs to chunk 0."""
    rows, item = chunk_rows(info, k), item_bytes(info)
    return (NPY_HEADER + rows.start * item) * (k > 0), NPY_HEADER + rows.stop * item


def chunk_hash(root: Path, info: dict, k: int) -> str:
    """sha256 (hex) of chunk k as it stands in the file."""
    first, end = chunk_span(info, k)
    with open(root / "moments.npy", "rb") as file:
        file.seek(first)
        return hashlib.sha256(file.read(end - first)).hexdigest()


def create_moments_file(root: Path, info: dict):
    """An empty moments.npy."""
    shape = moments_shape(info)
    path = root / "moments.npy"
    with path_in_errors(path):
        moments = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    assert moments.offset == NPY_HEADER, moments.offset


def write_metadata(root: Path, info: dict, names: list[str], labels: torch.Tensor, hashes: list[str], skipped: list):
    """Write the other files once moments.npy is whole; latents.json comes last.

    hashes: of each chunk; skipped: (i, j) for each image i that could not be read and the j that stands for it.
    """
    stream = io.BytesIO()
    np.save(stream, labels.numpy())
    files = {
        "labels.npy": stream.getvalue(),
        "images.txt": "".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape"),
    }
    for name, content in files.items():
        atomic_write(root / name, lambda part, content=content: part.write_bytes(content))
    hashes = {"moments.npy": hashes} | {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    write_sealed(root / "latents.json", info | {"skipped": skipped, "hashes": hashes})


def read_image_names(root: Path) -> list[str]:
    return (root / "images.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]


# ---- records that carry their own hash -----------------------------------------------------------


def sealed(record: dict) -> str:
    digest = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return json.dumps(record | {"sha256": digest}) + "\n"


def write_sealed(path: Path, record: dict):
    atomic_write(path, lambda part: part.write_text(sealed({"format": FORMAT} | record)))


def read_sealed(path: Path) -> dict:
    """What `write_sealed` wrote; ValueError if it is of another format or one of its bytes has changed."""
    content = path.read_bytes()
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        raise damaged_error(path) from None
    if isinstance(record, dict) and record.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {record.get('format')!r}, expected {FORMAT!r}: encode the images again, into another "
            "folder."
        )
    if not isinstance(record, dict) or sealed({k: v for k, v in record.items() if k != "sha256"}).encode() != content:
        raise damaged_error(path)
    del record["sha256"]
    return record


def damaged_error(path: Path, where: str = "") -> ValueError:
    return ValueError(
        f"{path} is not as it was written{where} (its SHA-256 is another): remove {path.parent} and encode the images "
        "again."
    )


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
                raise damaged_error(self.root / name)
        if (self.root / "moments.npy").stat().st_size != chunk_span(self.info, len(self.chunk_hashes) - 1)[1]:
            raise damaged_error(self.root / "moments.npy")
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
        self.warnings = label_warnings(self.hierarchy)

    @cached_property
    def names(self) -> list[str]:
        return read_image_names(self.root)

    @property
    def chunk_hashes(self) -> list[str]:
        return self.info["hashes"]["moments.npy"]

    @cached_property
    def moments(self) -> np.ndarray:
        shape = moments_shape(self.info)
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
                raise damaged_error(self.root / "moments.npy", f" in images {rows[0]} to {rows[-1]}")

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
