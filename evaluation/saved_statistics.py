"""Saved statistics: means and covariances of features in .npz files, overall and by superclass.

mu (d,), sigma (d, d)                                           of all images, as pytorch-fid reads them
superclass_n (S,), superclass_mu (S, d), superclass_sigma (S, d, d)   by superclass, if there is a hierarchy
n, record                     number of images; JSON: format, network, crop, pixels (their digest), lpips, hierarchy
"""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from evaluation.class_names import same_members
from evaluation.metrics import Gaussian
from evaluation.npz_sets import Member, damaged_file, read_array
from hierarchy import Hierarchy
from runtime.files import atomic_write

STATISTICS_FORMAT = "finediffusion-statistics-1"


class Statistics:
    """Statistics of an .npz file.

    gaussians   {None: of all images, superclass name: of its images}
    record      how they were made, {} if the file does not say
    labelled    True if there are superclasses
    labels      always None

    trusted: accept a file without a record

    Raises ValueError if arrays are absent, damaged, non-finite, or of shapes that do not match.
    """

    kind = "statistics"

    def __init__(self, path: Path, members: dict[str, Member], trusted: bool = False):
        self.path, self.labels, self.record = path, None, {}
        if "record" in members:
            self.record = self.parse_record(str(read_array(path, members, "record", "U")))
        if self.record.get("format") != STATISTICS_FORMAT and not trusted:
            raise ValueError(
                f"{path} does not say by which network and resize it was made, expected statistics of --save-stats: make "
                "them again, or pass --trust-stats."
            )
        n = read_array(path, members, "n").reshape(-1)[:1].tolist() if "n" in members else []
        mu, sigma = (read_array(path, members, name) for name in ("mu", "sigma"))
        self.gaussians = {None: self.check_gaussian(int(n[0]) if n else None, mu, sigma)}
        self.labelled = bool(self.record.get("hierarchy"))
        if self.labelled:
            arrays = [read_array(path, members, f"superclass_{name}") for name in ("n", "mu", "sigma")]
            names = self.own_hierarchy().superclasses
            if [x.ndim for x in arrays] != [1, 2, 3] or {len(x) for x in arrays} != {len(names)}:
                raise ValueError(
                    f"{path} has statistics of the shapes {[x.shape for x in arrays]}, expected {len(names)} superclasses: make "
                    "them again."
                )
            for name, count, mu, sigma in zip(names, *arrays):
                self.gaussians[name] = self.check_gaussian(int(count), mu, sigma)

    def parse_record(self, text: str) -> dict:
        """Parse the JSON of `record`. Raises ValueError if it is damaged."""
        try:
            record = json.loads(text)
            if not isinstance(record, dict):
                raise ValueError(f"the record {text:.80}")
            if not all(isinstance(record.get(key, {}), dict | None) for key in ("network", "hierarchy")):
                raise ValueError(f"the record {text:.80}")
        except (ValueError, RecursionError) as error:
            raise damaged_file(self.path, error) from None
        return record

    def check_gaussian(self, n: int | None, mu: np.ndarray, sigma: np.ndarray) -> Gaussian:
        """Return float64 tensors of mu (d,) and sigma (d, d). Raises ValueError for other shapes and non-finite values."""
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(
                f"{self.path} has mu {mu.shape} and sigma {sigma.shape}, expected (d,) and (d, d): write it again."
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"{self.path} has non-finite statistics, expected finite values: make them again.")
        return Gaussian(n, torch.from_numpy(mu.astype(np.float64)), torch.from_numpy(sigma.astype(np.float64)))

    def own_hierarchy(self) -> Hierarchy:
        """Return the hierarchy that the statistics were made with."""
        return Hierarchy.from_dict(self.record["hierarchy"])

    def label(self, hierarchy: Hierarchy | None):
        """Raise ValueError if the superclasses or their classes are not those of the hierarchy; no image has a label."""
        if hierarchy and not same_members(self.own_hierarchy(), hierarchy):
            raise ValueError(
                f"{self.path} has other superclasses than {hierarchy!r}, or other classes in them, expected the same: pass the "
                "--hierarchy it was made with."
            )

    def __len__(self) -> int:
        return self.gaussians[None].n or 2  # 2 if unknown: enough for a covariance

    def present(self, hierarchy: Hierarchy) -> set[int]:
        """Return the superclasses that have images."""
        return {s for s, name in enumerate(hierarchy.superclasses) if self.gaussians[name].n}

    def check(self, network: dict, crop: int | None):
        """Raise ValueError if the statistics were made with another network or crop; without a record all pass.

        network: `Network.record`
        crop: pixels per side of the images
        """
        here = network | {"crop": crop}
        there = self.record.get("network", {}) | {"crop": self.record.get("crop")}
        for key in here if self.record else ():
            if here[key] != there.get(key):
                raise ValueError(
                    f"{self.path} was made with {key} {there.get(key)}, expected {here[key]} as in this comparison: make the "
                    "statistics again, or use the flags they were made with."
                )


def save_statistics(
    path: str | os.PathLike,
    gaussians: dict[str | None, Gaussian | None],
    record: dict,
    hierarchy: Hierarchy | None = None,
):
    """Write statistics that `Statistics` and pytorch-fid read.

    gaussians: {None: of all images, superclass name: of its images or None}
    record: "network", "crop", "pixels" and "lpips"
    """
    overall = gaussians[None]
    text = json.dumps({"format": STATISTICS_FORMAT, **record, "hierarchy": hierarchy and hierarchy.to_dict()})
    arrays = {"mu": overall.mean, "sigma": overall.covariance, "n": overall.n, "record": text}
    if hierarchy:
        empty = Gaussian(0, torch.zeros_like(overall.mean), torch.zeros_like(overall.covariance))
        by_superclass = [gaussians[name] or empty for name in hierarchy.superclasses]
        for name, column in zip(("n", "mu", "sigma"), zip(*by_superclass)):
            arrays[f"superclass_{name}"] = np.stack([np.asarray(x) for x in column])

    def write(part):
        with open(part, "wb") as file:
            np.savez(file, **{name: np.asarray(array) for name, array in arrays.items()})

    atomic_write(path, write)


def save_adm(
    path: str | os.PathLike, images: Dataset, gaussian: Gaussian, spatial: Gaussian, rows: np.ndarray, size: int
):
    """Write a reference batch for ADM's evaluator: statistics, spatial statistics, and images in arr_0.

    images: `image_sets.Pixels`
    gaussian, spatial: of Inception's "features" and "spatial"
    rows: (n,) indices of the images to write
    size: pixels per side
    """
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
            # arr_0 is written image by image, so that it never is in memory as one array
            with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), size, size, 3)}
                np.lib.format.write_array_header_1_0(stream, header)
                for i in rows:
                    stream.write(images[i][0].permute(1, 2, 0).numpy().tobytes())

    atomic_write(path, write)
