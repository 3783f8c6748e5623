"""Cached latents on the disk: `tools.encode_latents` writes them, `LatentData` reads them.

A folder of N images with F flips (2: the image and its mirror image, 1: the image alone) holds

moments.npy   float16 (N, F, 2C, h, w); the first C channels are the mean of the VAE's posterior, the last C its standard
              deviation, both times the VAE's scale
labels.npy    int64 (N,)
images.txt    the paths of the images, one per line
latents.json  what was encoded and how, with the digest of the encoder's weights (absent with --vae none and from files
              of earlier versions); the SHA-256 of each chunk of moments.npy (`chunk` images), of the other two files,
              and of this record itself
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from autoencoder import Autoencoder
from dataset.listing import SILENT_SECONDS, label_warnings
from hierarchy import Hierarchy
from runtime.files import atomic_write, path_in_errors, sha256
from runtime.progress import progress_bar

FORMAT = "finediffusion-latents-2"
NPY_HEADER = 128  # bytes of moments.npy before the data; numpy pads the header of every such shape to this


# ---- moments.npy in chunks -----------------------------------------------------------------------
# info: the record of latents.json, with images (N), flips (F), channels (C), size (h = w) and chunk


def moments_shape(info: dict) -> tuple[int, ...]:
    """Return (N, F, 2C, h, w)."""
    return info["images"], info["flips"], 2 * info["channels"], info["size"], info["size"]


def item_bytes(info: dict) -> int:
    """Return the size of the moments of one image."""
    return 2 * info["flips"] * 2 * info["channels"] * info["size"] ** 2


def chunk_count(info: dict) -> int:
    return -(-info["images"] // info["chunk"])


def chunk_rows(info: dict, k: int) -> range:
    """Return the indices of the images in chunk k."""
    return range(k * info["chunk"], min((k + 1) * info["chunk"], info["images"]))


def chunk_span(info: dict, k: int) -> tuple[int, int]:
    """Return the first byte of chunk k in moments.npy and the first after it; chunk 0 includes the file's header."""
    rows, item = chunk_rows(info, k), item_bytes(info)
    return (NPY_HEADER + rows.start * item) * (k > 0), NPY_HEADER + rows.stop * item


def chunk_hash(root: Path, info: dict, k: int) -> str:
    """Return the SHA-256 (hex) of chunk k in the file."""
    first, end = chunk_span(info, k)
    with open(root / "moments.npy", "rb") as file:
        file.seek(first)
        return hashlib.sha256(file.read(end - first)).hexdigest()


# ---- records that include their own hash ---------------------------------------------------------


def sealed(record: dict) -> str:
    """Return a record with its SHA-256 as a line of JSON."""
    digest = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return json.dumps(record | {"sha256": digest}) + "\n"


def write_sealed(path: Path, record: dict):
    atomic_write(path, lambda part: part.write_text(sealed({"format": FORMAT} | record)))


def read_sealed(path: Path) -> dict:
    """Return the record that `write_sealed` wrote; raise ValueError if its format is another or a byte has changed."""
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
        f"{path} is damaged{where} (its size or SHA-256 has changed): remove {path.parent} and encode the images again."
    )


# ---- writing -------------------------------------------------------------------------------------


def create_moments_file(root: Path, info: dict):
    """Create a moments.npy of the final size, filled with zeros."""
    path = root / "moments.npy"
    with path_in_errors(path):
        moments = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=moments_shape(info))
    assert moments.offset == NPY_HEADER, moments.offset


def write_metadata(
    root: Path,
    info: dict,
    paths: Iterable[str],
    labels: torch.Tensor,
    hashes: Sequence[str],
    skipped: Sequence[tuple[int, int]],
):
    """Write the other files once moments.npy is complete; latents.json comes last.

    hashes: SHA-256 of each chunk. skipped: (i, j) for each image i that could not be read and its substitute j.
    """
    stream = io.BytesIO()
    np.save(stream, labels.numpy())
    files = {
        "labels.npy": stream.getvalue(),
        "images.txt": "".join(f"{path}\n" for path in paths).encode("utf-8", "surrogateescape"),
    }
    for name, content in files.items():
        atomic_write(root / name, lambda part, content=content: part.write_bytes(content))
    hashes = {"moments.npy": hashes} | {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    write_sealed(root / "latents.json", info | {"skipped": skipped, "hashes": hashes})


# ---- reading -------------------------------------------------------------------------------------


class LatentData(Dataset):
    """Cached latents. Item i is (moments of image i, label, index of the image shown).

    The moments are float16 (F, 2C, h, w), see the module docstring. The index differs from i if image i could not be read
    when it was encoded, see `ImageData`.

    Opening the folder checks latents.json, the labels and the paths, and raises ValueError if a byte has changed;
    `verify` checks the moments.

    info         the record of latents.json
    paths        path of each image below the root of its data set
    labels       int64 (N,)
    shown        index of the image that was encoded for each item, int64 (N,)
    fingerprint  that of the encoded `ImageData`
    warnings     sentences about properties of the folder that may be mistakes
    """

    def __init__(self, root: str | os.PathLike, hierarchy: Hierarchy | None = None):
        self.root = Path(root)
        if not (self.root / "latents.json").is_file():
            raise ValueError(
                f"{root} has no latents.json, expected finished latents: run python -m tools.encode_latents to its end."
            )
        self.info = read_sealed(self.root / "latents.json")
        for name in ("labels.npy", "images.txt"):
            if sha256(self.root / name) != self.info["hashes"][name]:
                raise damaged_error(self.root / name)
        if (self.root / "moments.npy").stat().st_size != chunk_span(self.info, len(self.chunk_hashes) - 1)[1]:
            raise damaged_error(self.root / "moments.npy")
        self.hierarchy = Hierarchy.from_dict(self.info["hierarchy"])
        if hierarchy is not None and hierarchy.keep() != self.hierarchy.keep():
            raise ValueError(
                f"The latents in {root} were labelled by another hierarchy ({self.hierarchy!r}) than the one given "
                f"({hierarchy!r}): encode the images again."
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
    def paths(self) -> list[str]:
        return (self.root / "images.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]

    @property
    def chunk_hashes(self) -> list[str]:
        return self.info["hashes"]["moments.npy"]

    @cached_property
    def moments(self) -> np.ndarray:
        shape = moments_shape(self.info)
        return np.memmap(self.root / "moments.npy", np.float16, "r", NPY_HEADER, shape).view(np.ndarray)

    def verify(self, rank: int = 0, world: int = 1):
        """Compare every `world`-th chunk, from chunk `rank` on, with its SHA-256; raise ValueError if one differs.

        Reads N / world items, which also warms the page cache.
        """
        chunks = range(rank, len(self.chunk_hashes), world)
        bar = dict(unit="chunk", desc=f"checking {self.root}", leave=False, delay=SILENT_SECONDS, disable=rank > 0)
        for k in progress_bar(chunks, **bar):
            if chunk_hash(self.root, self.info, k) != self.chunk_hashes[k]:
                rows = chunk_rows(self.info, k)
                raise damaged_error(self.root / "moments.npy", f" in images {rows[0]} to {rows[-1]}")

    def check_settings(self, autoencoder: Autoencoder, image_size: int, flip: bool):
        """Raise ValueError if the latents were encoded with other settings than these of a training.

        flip: whether the training needs the mirror images too.
        """
        for setting, expected in (
            ("image size", image_size),
            ("channels", autoencoder.channels),
            ("scale", autoencoder.scale),
            ("flips", 2 if flip else self.info["flips"]),
        ):
            found = self.info[setting.replace(" ", "_")]
            if found != expected:
                raise ValueError(
                    f"The latents in {self.root} have {setting} {found}, expected {expected} for this training: change its "
                    "flags or encode the images again."
                )
        found, expected = self.info.get("encoder"), autoencoder.encoder_digest()
        if found and found != expected:  # latents of earlier versions have no digest
            raise ValueError(
                f"The latents in {self.root} are of encoder {found:.8} (--vae {self.info['vae']}), expected "
                f"{expected or 'none':.8} of this training's --vae: pass the --vae they were encoded with or encode the images "
                "again."
            )

    def __getstate__(self) -> dict:
        """Leave out the memory map: pickled it would be the complete array, and a worker opens its own."""
        return {name: value for name, value in vars(self).items() if name != "moments"}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int]:
        x, label, shown = self.__getitems__([i])
        return x[0], int(label), int(shown)

    def __getitems__(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a complete batch, for a DataLoader with `collate`; one gather is 7 times as fast as single items."""
        rows = torch.tensor(rows)
        return torch.from_numpy(self.moments.take(rows.numpy(), axis=0)), self.labels[rows], self.shown[rows]
