"""Sets of images and statistics that lie in .npz files, and writing the latter.

arr_0, uint8 (N, H, W, 3), and labels in arr_1 or labels     images: ADM's batches of samples
mu (d,) and sigma (d, d)                                      statistics, by `save_statistics` or by others
"""

import io
import json
import math
import zipfile
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from evaluation.metrics import Gaussian
from hierarchy import Hierarchy
from runtime.files import atomic_write
from runtime.text import shorten

STATISTICS_FORMAT = "finediffusion-statistics-1"
MOST_BYTES = 2**32  # that are read into memory
# a compressed array may have so many bytes, or so many times those it takes in the file: pictures never shrink so much
MOST_INFLATED, MOST_RATIO = 2**26, 50


# ---- .npz files ----------------------------------------------------------------------------------


class Member(NamedTuple):
    """An array of an .npz file; `offset` of its numbers in the file, None where they are compressed."""

    shape: tuple
    dtype: np.dtype
    fortran: bool
    offset: int | None


def npz_members(path):
    """{name: Member}, from the headers alone."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}, expected an .npz of images or statistics: check the path.")
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            return {info.filename.removesuffix(".npy"): member(archive, info, file) for info in archive.infolist()}
    except Exception as error:  # a damaged zip or header raises anything
        raise damaged(path, error) from None


def damaged(path, error):
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    return ValueError(f"{path} is damaged or no .npz file ({reason}): write or download it again.")


def member(archive, info, file):
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        header = stream.tell()
    if info.file_size > max(MOST_INFLATED, MOST_RATIO * info.compress_size):
        raise ValueError(f"{info.filename} grows from {info.compress_size:,} to {info.file_size:,} bytes")
    if info.file_size != header + math.prod(shape) * dtype.itemsize and not dtype.hasobject:
        raise ValueError(f"{info.filename} is not as long as its shape {shape} says")
    if info.compress_type != zipfile.ZIP_STORED:
        return Member(shape, dtype, fortran, None)
    file.seek(
        info.header_offset + 26
    )  # of the local header, which is 30 bytes, a name and a field of their own lengths
    lengths = np.frombuffer(file.read(4), "<u2").astype(int)
    return Member(shape, dtype, fortran, info.header_offset + 30 + int(lengths.sum()) + header)


def read_array(path, members, name, kinds="fiu"):
    """An array of an .npz file in memory; ValueError if it is absent, of another kind, objects, or too large."""
    if name not in members:
        raise ValueError(f"{path} holds {shorten(members)}, expected {name!r} as well: write it again.")
    found = members[name]
    if found.dtype.kind not in kinds:
        raise ValueError(f"{path} has {name!r} of the type {found.dtype}, expected plain numbers: write it again.")
    if math.prod(found.shape) * found.dtype.itemsize > MOST_BYTES:
        raise ValueError(
            f"{path} has {name!r} compressed or too large to read ({found.shape}), expected less than 4 GiB: save it with "
            "numpy.savez, which does not compress."
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[name]
    except Exception as error:  # of damaged numbers: their checksum is looked at here
        raise damaged(path, error) from None


class Arrays:
    """Images of an .npz file, each read where it lies; `labels` (N,) after `label`."""

    kind = "npz"

    def __init__(self, path, members):
        if "arr_0" not in members:
            raise ValueError(
                f"{path} holds {shorten(members)}, expected images in arr_0 or statistics in mu and sigma."
            )
        images = members["arr_0"]
        if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[3] != 3 or images.fortran:
            raise ValueError(
                f"{path} has arr_0 of {images.dtype} {images.shape}, expected uint8 (N, H, W, 3): save it so."
            )
        if images.offset and images.offset + math.prod(images.shape) > path.stat().st_size:
            raise ValueError(f"{path} is shorter than the {images.shape} it should hold: write or download it again.")
        if images.shape[0] == 0:
            raise ValueError(f"{path} has no images in it, expected some in arr_0: write it again.")
        self.path, self.member, self.labels = path, images, None
        self.compressed = read_array(path, members, "arr_0", "u") if images.offset is None else None
        name = next((name for name in ("arr_1", "labels") if name in members), None)
        self.given = read_array(path, members, name, "iu") if name else None
        self.labelled = name is not None
        if self.labelled and self.given.shape != (images.shape[0],):
            raise ValueError(
                f"{path} has labels of the shape {self.given.shape}, expected ({images.shape[0]},): save them so."
            )

    def own_hierarchy(self):
        raise ValueError(f"{self.path} has labels, which are only numbers.")

    def label(self, hierarchy):
        if hierarchy is None:
            self.labels = np.zeros(len(self), dtype=np.int64)
            return
        out = (self.given < 0) | (self.given >= hierarchy.num_classes)
        if out.any():
            raise ValueError(
                f"{self.path} has the label {self.given[out][0]}, expected 0 to {hierarchy.num_classes - 1} of "
                f"{hierarchy.name}: pass another --hierarchy."
            )
        self.labels = self.given.astype(np.int64)

    def present(self, hierarchy):
        """Superclasses that have images."""
        return set(hierarchy.parents[np.unique(self.labels)].tolist())

    def __len__(self):
        return self.member.shape[0]

    def name(self, i):
        return f"{self.path}, image {i}"

    def open(self, i):
        if self.compressed is not None:
            return Image.fromarray(self.compressed[i])
        shape = self.member.shape[1:]
        with open(self.path, "rb") as file:  # a memory map would count as memory of the process
            pixels = np.fromfile(file, np.uint8, math.prod(shape), offset=self.member.offset + i * math.prod(shape))
        return Image.fromarray(pixels.reshape(shape))

    def lossy(self):
        return 0


# ---- statistics ----------------------------------------------------------------------------------


class Statistics:
    """Saved means and covariances: `gaussians` {None: of all images, superclass: of its}, and the `record` that says how
    they were made, {} where nothing does; `labels` is always None."""

    kind = "statistics"

    def __init__(self, path, members, trusted=False):
        self.path, self.labels, self.record = path, None, {}
        if "record" in members:
            self.record = self.read_record(str(read_array(path, members, "record", "U")))
        if self.record.get("format") != STATISTICS_FORMAT and not trusted:
            raise ValueError(
                f"{path} does not say by which network and resize it was made, expected statistics of --save-stats: make "
                "them again, or pass --trust-stats."
            )
        n = read_array(path, members, "n").reshape(-1)[:1].tolist() if "n" in members else []
        mu, sigma = (read_array(path, members, name) for name in ("mu", "sigma"))
        self.gaussians = {None: self.gaussian(int(n[0]) if n else None, mu, sigma)}
        self.labelled = bool(self.record.get("hierarchy"))
        if self.labelled:
            parts = [read_array(path, members, f"superclass_{name}") for name in ("n", "mu", "sigma")]
            names = self.own_hierarchy().superclasses
            if [each.ndim for each in parts] != [1, 2, 3] or {len(each) for each in parts} != {len(names)}:
                raise ValueError(
                    f"{path} has statistics of the shapes {[each.shape for each in parts]}, expected {len(names)} superclasses: "
                    "make them again."
                )
            for name, count, mu, sigma in zip(names, *parts):
                self.gaussians[name] = self.gaussian(int(count), mu, sigma)

    def read_record(self, text):
        try:
            record = json.loads(text)
            if isinstance(record, dict) and all(
                isinstance(record.get(key, {}), dict | None) for key in ("network", "hierarchy")
            ):
                return record
            reason = f"the record {text:.80}"
        except (ValueError, RecursionError) as error:
            reason = error
        raise damaged(self.path, reason)

    def gaussian(self, n, mu, sigma):
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(
                f"{self.path} has mu {mu.shape} and sigma {sigma.shape}, expected (d,) and (d, d): write it again."
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"{self.path} has statistics that are not finite, expected numbers: make them again.")
        return Gaussian(n, torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64)))

    def own_hierarchy(self):
        return Hierarchy.from_dict(self.record["hierarchy"])

    def label(self, hierarchy):
        if hierarchy and set(hierarchy.superclasses) != set(self.record["hierarchy"]["superclasses"]):
            raise ValueError(
                f"{self.path} has other superclasses than {hierarchy!r}: pass the --hierarchy it was made with."
            )

    def __len__(self):
        return self.gaussians[None].n or 2

    def present(self, hierarchy):
        return {s for s, name in enumerate(hierarchy.superclasses) if self.gaussians[name].n}

    def check(self, network, crop):
        """ValueError if they were made by another network (its record), or from images of another crop."""
        here = network | {"crop": crop}
        there = self.record.get("network", {}) | {"crop": self.record.get("crop")}
        for key in here if self.record else ():
            if here[key] != there.get(key):
                raise ValueError(
                    f"{self.path} was made with {key} {there.get(key)}, expected {here[key]} as here: make the statistics "
                    "again, or use the flags they were made with."
                )


def save_statistics(path, gaussians, record, hierarchy=None):
    """The statistics {None: of all images, superclass: of its or None} as an .npz that pytorch-fid reads too."""
    whole = gaussians[None]
    text = json.dumps({"format": STATISTICS_FORMAT, **record, "hierarchy": hierarchy and hierarchy.to_dict()})
    arrays = {"mu": whole.mean, "sigma": whole.covariance, "n": whole.n, "record": text}
    if hierarchy:
        none = Gaussian(0, torch.zeros_like(whole.mean), torch.zeros_like(whole.covariance))
        parts = [gaussians[name] or none for name in hierarchy.superclasses]
        for name, column in zip(("n", "mu", "sigma"), zip(*parts)):
            arrays[f"superclass_{name}"] = np.stack([np.asarray(x) for x in column])

    def write(part):
        with open(part, "wb") as file:
            np.savez(file, **{name: np.asarray(array) for name, array in arrays.items()})

    atomic_write(path, write)


def save_adm(path, images, gaussian, spatial, rows, size):
    """What ADM's evaluator takes as a reference: statistics, spatial ones, and the images `rows` in arr_0."""
    statistics = {
        "mu": gaussian.mean,
        "sigma": gaussian.covariance,
        "mu_s": spatial.mean,
        "sigma_s": spatial.covariance,
    }

    def write(part):
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for name, array in statistics.items():
                file = io.BytesIO()
                np.save(file, array.numpy())
                archive.writestr(f"{name}.npy", file.getvalue())
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), size, size, 3)}
                np.lib.format.write_array_header_1_0(stream, header)
                for i in rows:
                    stream.write(images[i][0].permute(1, 2, 0).numpy().tobytes())

    atomic_write(path, write)
