"""Features of the training images in a folder of files: computed once, resumed, and used again by later evaluations.

record.json           everything the features depend on: network, crop, list of the images
00000.safetensors     features float32 (CHUNK or fewer, d) and digests int64 of the first CHUNK images, and so on; features
                      of unreadable images are NaN; the metadata have the SHA-256 of the arrays
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from evaluation.features import Network
from evaluation.image_pass import check_readable
from evaluation.image_sets import UNREADABLE, Pixels
from runtime.files import Lock, atomic_write
from runtime.processes import run_on_main
from runtime.progress import progress_bar

FORMAT = "finediffusion-training-features-1"
CHUNK = 4096  # images per file; a killed process loses its file at most


class TrainingFeatures:
    """The features of the training images.

    folder    of the files
    images    `n` of them
    network   whose features they are, of `dims` values
    digests   int64 (n,), of the pixels, 0 for unreadable images, after `compute`
    lost      bool (n,), the unreadable images, after `compute`
    """

    digests: np.ndarray
    lost: np.ndarray

    def __init__(self, folder: Path, images: Pixels, network: Network, dims: int):
        self.folder, self.images, self.network, self.n, self.dims = folder, images, network, len(images), dims
        # in the form in which JSON gives it back
        self.record = json.loads(
            json.dumps(
                {
                    "format": FORMAT,
                    "network": network.record,
                    "dims": dims,
                    "crop": images.size,
                    "images": self.n,
                    "image_list": list_digest(images),
                    "chunk": CHUNK,
                }
            )
        )

    def path(self, k: int) -> Path:
        """Return the path of file k."""
        return self.folder / f"{k:05d}.safetensors"

    def rows(self, k: int) -> range:
        """Return the indices of the images of file k."""
        return range(k * CHUNK, min((k + 1) * CHUNK, self.n))

    def count(self) -> int:
        """Return the number of files."""
        return -(-self.n // CHUNK)

    def prepare(self) -> Lock:
        """Create the folder or accept that of an earlier start; return its lock.

        Raises ValueError if it belongs to other images, another network or another crop, or if the disk is too small.
        """
        path = self.folder / "record.json"
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                other = [key for key, value in self.record.items() if found.get(key) != value]
            except (ValueError, AttributeError):
                raise ValueError(f"{path} is damaged, expected JSON: remove {self.folder}.") from None
            for key in other[:1]:
                found, expected = f"with {key} {show(found.get(key))}", show(self.record[key])
                if key in ("images", "image_list"):
                    found, expected = "of other images", f"those of {self.images.images.path}"
                raise ValueError(
                    f"{self.folder} has training features {found}, expected {expected}: name another --train-cache, or remove "
                    "that folder."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(self.folder, "computing training features in", "--train-cache")
        need = sum(4 * self.dims * len(self.rows(k)) for k in range(self.count()) if not self.path(k).is_file())
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise ValueError(
                f"{self.folder} needs {need / 1e9:.1f} GB and has {free / 1e9:.1f} GB free: choose another --train-cache."
            )
        text = json.dumps(self.record, indent=1) + "\n"
        atomic_write(path, lambda part: part.write_text(text, encoding="utf-8"))
        return lock

    def compute(self, state: PartialState, batch_size: int = 64, workers: int = 4, max_bad_images: int | None = None):
        """Compute the files that are missing, spread over all processes, which call this together.

        max_bad_images: most images that may be unreadable, 1 in 100 if None

        Sets `digests` and `lost` on the main process. Raises ValueError if more images are unreadable, or if features are
        non-finite.
        """
        lock = run_on_main(state, self.prepare)
        with closing(lock) if lock else nullcontext():
            missing = [k for k in range(self.count()) if not self.path(k).is_file()]
            self.compute_files(missing[state.process_index :: state.num_processes], state, batch_size, workers)
            state.wait_for_everyone()
        if state.is_main_process:
            parts = [
                (file["digests"], torch.isnan(file["features"][:, 0])) for file in map(self.read, range(self.count()))
            ]
            self.digests, self.lost = (torch.cat(part).numpy() for part in zip(*parts))
            limit = max(1, self.n // 100) if max_bad_images is None else max_bad_images
            check_readable([self.images.name(i) for i in np.flatnonzero(self.lost)], limit)

    def compute_files(self, files: list[int], state: PartialState, batch_size: int, workers: int):
        """Compute these files."""
        if not files:
            return
        batches = [rows[i : i + batch_size] for rows in map(self.rows, files) for i in range(0, len(rows), batch_size)]
        loader = DataLoader(
            self.images, batch_sampler=batches, num_workers=workers, pin_memory=state.device.type == "cuda"
        )
        bar = progress_bar(
            total=sum(map(len, batches)), unit="image", desc="training images", disable=not state.is_main_process
        )
        with bar:
            for rows, (pixels, digests, states) in zip(batches, loader):
                k = rows[0] // CHUNK
                if rows[0] == self.rows(k)[0]:
                    features, found = torch.full((len(self.rows(k)), self.dims), torch.nan), []
                read = states != UNREADABLE
                if read.any():
                    out = self.network(pixels[read].to(state.device, non_blocking=True))["features"].float().cpu()
                    places = torch.tensor(rows)[read]
                    self.check_finite(out, places.tolist())
                    features[places - self.rows(k)[0]] = out
                found.append(digests)
                if rows[-1] == self.rows(k)[-1]:
                    self.write(k, features, torch.cat(found))
                bar.update(len(rows))

    def check_finite(self, features: torch.Tensor, rows: list[int]):
        """Raise ValueError if the features (n, d) of the images `rows` are non-finite."""
        finite = torch.isfinite(features).all(1).tolist()
        for i in (i for i, fine in zip(rows, finite) if not fine):
            raise ValueError(
                f"The {self.network.name} features of {self.images.name(i)} are non-finite, expected finite features: "
                "replace the image or the weights."
            )

    def write(self, k: int, features: torch.Tensor, digests: torch.Tensor):
        """Write file k."""
        arrays = {"features": features, "digests": digests}
        metadata = {"sha256": arrays_digest(arrays)}
        atomic_write(self.path(k), lambda part: save_file(arrays, part, metadata))

    def read(self, k: int) -> dict[str, torch.Tensor]:
        """Return the arrays of file k. Raises ValueError if it is damaged."""
        try:
            with safe_open(self.path(k), "pt") as file:
                arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        except (SafetensorError, OSError):
            arrays, metadata = {}, {}
        if metadata.get("sha256") != arrays_digest(arrays):
            raise ValueError(f"{self.path(k)} is damaged, expected its SHA-256: remove it and repeat the command.")
        return arrays

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the index of the first image of each file and its features (m, d), a file at a time."""
        for k in range(self.count()):
            yield k * CHUNK, self.read(k)["features"]


def show(value: object) -> str:
    """Return a value of the record for a message."""
    return ", ".join(f"{k} {v!s:.16}" for k, v in value.items()) if isinstance(value, dict) else f"{value!s:.16}"


def arrays_digest(arrays: dict[str, torch.Tensor]) -> str:
    """Return a SHA-256 (hex) of the arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(arrays[name].contiguous().numpy())
    return digest.hexdigest()


def list_digest(images: Pixels) -> str:
    """Return a SHA-256 (hex) of the images' paths below their folder, in their order."""
    root = str(images.images.path)
    names = [os.path.relpath(images.name(i), root) for i in range(len(images))]
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
