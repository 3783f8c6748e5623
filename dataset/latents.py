"""The files of cached latents, which `tools.encode_latents` writes and `data.LatentData` reads. N images, F flips:

moments.npy   float16 (N, F, 2C, h, w), hashed by chunks of `chunk` images
labels.npy    int64 (N,)
images.txt    the images' paths, one a line
latents.json  what was encoded and how, the SHA-256 of the others, and one of itself
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch

from runtime.cli import named, write_whole

FORMAT = "finediffusion-latents-2"
NPY_HEADER = 128  # bytes before the numbers of moments.npy; numpy pads the header of any such shape to this


def shape_of(info: dict) -> tuple[int, ...]:
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


def create_moments(root: Path, info: dict):
    """An empty moments.npy."""
    shape = shape_of(info)
    path = root / "moments.npy"
    with named(path):
        moments = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    assert moments.offset == NPY_HEADER, moments.offset


def write_rest(root: Path, info: dict, names: list[str], labels: torch.Tensor, hashes: list[str], skipped: list):
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
        write_whole(root / name, lambda part, content=content: part.write_bytes(content))
    hashes = {"moments.npy": hashes} | {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    write_sealed(root / "latents.json", info | {"skipped": skipped, "hashes": hashes})


def read_names(root: Path) -> list[str]:
    return (root / "images.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]


# ---- records that carry their own hash -----------------------------------------------------------


def sealed(record: dict) -> str:
    digest = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return json.dumps(record | {"sha256": digest}) + "\n"


def write_sealed(path: Path, record: dict):
    write_whole(path, lambda part: part.write_text(sealed({"format": FORMAT} | record)))


def read_sealed(path: Path) -> dict:
    """What `write_sealed` wrote; ValueError if it is of another format or one of its bytes has changed."""
    content = path.read_bytes()
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        raise damaged(path) from None
    if isinstance(record, dict) and record.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {record.get('format')!r}, expected {FORMAT!r}: encode the images again, into another "
            "folder."
        )
    if not isinstance(record, dict) or sealed({k: v for k, v in record.items() if k != "sha256"}).encode() != content:
        raise damaged(path)
    del record["sha256"]
    return record


def damaged(path: Path, where: str = "") -> ValueError:
    return ValueError(
        f"{path} is not as it was written{where} (its SHA-256 is another): remove {path.parent} and encode the images "
        "again."
    )
