"""LPIPS as a measure of diversity: its sums over the images of each class, and its means over pairs of images."""

from typing import NamedTuple

import numpy as np
import torch

from evaluation.metrics import (
    FLOAT,
    bootstrap_weights,
    mean_over_pairs,
    mean_over_weighted_pairs,
    percentile_interval,
)
from evaluation.plan import BLOCKS, Plan
from evaluation.reduction import gather_on_main, sum_over_processes

LEAST_BLOCKS = BLOCKS  # blocks for an interval of the pooled LPIPS

# ---- sums over a pass ----------------------------------------------------------------------------


class ClassSums(NamedTuple):
    """Sums over images of one class: their count n, sum |f|^2, and sum f (d,)."""

    label: int
    n: int
    squares: float
    total: torch.Tensor

    def __add__(self, other: "ClassSums") -> "ClassSums":
        return ClassSums(self.label, self.n + other.n, self.squares + other.squares, self.total + other.total)


class DiversitySums:
    """One process's sums of LPIPS features f by class, and by block of classes.

    Images must come class by class. A process shares its first and last class with other processes, so these two are
    added to the blocks only in `result`.

    block: (classes,) block of each class, see `Plan`
    """

    def __init__(self, block: np.ndarray, dim: int, device: torch.device):
        self.block, self.block_sums = block, torch.zeros(block.max() + 1, dim, dtype=FLOAT, device=device)
        self.first, self.current = None, None  # ClassSums
        self.closed = []  # (label, n, sum |f|^2, |sum f|^2) of complete classes

    def add(self, labels: np.ndarray, features: torch.Tensor):
        """Add a batch: labels (n,), features (n, d)."""
        for label in dict.fromkeys(labels.tolist()):
            rows = select_rows(features, labels == label)
            squares = torch.linalg.vector_norm(rows, dtype=FLOAT).item() ** 2
            sums = ClassSums(label, len(rows), squares, rows.sum(0, dtype=FLOAT))
            if self.current and self.current.label == label:
                self.current += sums
            else:
                self.end_class()
                self.current = sums

    def end_class(self):
        """Close the current class, or set it aside if it is this process's first."""
        if self.current and self.first:
            self.close(self.current)
        elif self.current:
            self.first = self.current

    def close(self, sums: ClassSums):
        """Add a complete class to its block."""
        self.closed.append((sums.label, sums.n, sums.squares, sums.total.square().sum().item()))
        self.block_sums[self.block[sums.label]] += sums.total

    def result(self) -> dict[str, torch.Tensor] | None:
        """Return `PassResult.diversity` on the main process, None on the others."""
        shared = [ClassSums(*sums[:3], sums.total.cpu()) for sums in (self.first, self.current) if sums]
        shared, closed = gather_on_main(shared), gather_on_main(self.closed)
        self.block_sums = sum_over_processes(self.block_sums)
        if shared is None:
            return None
        self.closed, merged = [row for rows in closed for row in rows], {}
        for sums in (sums for of_process in shared for sums in of_process):
            merged[sums.label] = merged[sums.label] + sums if sums.label in merged else sums
        for sums in merged.values():
            self.close(sums._replace(total=sums.total.to(self.block_sums.device)))
        classes = np.full((len(self.block), 3), np.nan)  # n, sum |f|^2, |sum f|^2
        for label, *values in self.closed:
            classes[label] = values
        return {"classes": torch.from_numpy(classes), "gram": (self.block_sums @ self.block_sums.T).cpu()}


def select_rows(x: torch.Tensor, mask: np.ndarray) -> torch.Tensor:
    """Return the rows of x (n, ...) for which the NumPy mask (n,) is true."""
    return x[torch.from_numpy(np.flatnonzero(mask)).to(x.device)]


# ---- metrics -------------------------------------------------------------------------------------


def lpips_diversity(sums: dict[str, torch.Tensor], plan: Plan, s: int | None = None, seed: int = 0) -> dict:
    """Return the LPIPS metrics of superclass s, or of all images if None.

    "lpips" is the mean over the pairs of images of a class, then over classes; "lpips_pooled" is the mean over all pairs.
    95% intervals are bootstrapped over classes, and for the pooled mean over blocks of classes. With B blocks, two of them
    are drawn together (B - 1) / B times as often as one alone, so the pairs between blocks get the factor B / (B - 1). With
    fewer than LEAST_BLOCKS the interval covers too little and is None.

    sums: `PassResult.diversity`
    """
    in_group = np.array((plan.block >= 0) & ((plan.parents == s) | (s is None)))
    n, squares, total = sums["classes"][in_group].T
    row = {}
    # Within classes:
    within = mean_over_pairs(n, squares, total)
    within = within[torch.isfinite(within)]  # a class with one image has no pairs
    row["lpips"] = within.mean().item() if len(within) else None
    row["lpips_interval"] = None
    row["lpips_classes"] = len(within)
    if len(within) > 1:
        means = bootstrap_weights(len(within), seed) @ within / len(within)
        row["lpips_interval"] = percentile_interval(means)
    # Over all pairs:
    blocks, index = np.unique(plan.block[in_group], return_inverse=True)
    n, squares = (torch.zeros(len(blocks), dtype=FLOAT).index_add_(0, torch.from_numpy(index), x) for x in (n, squares))
    gram = sums["gram"][blocks][:, blocks]
    pooled = mean_over_weighted_pairs(n, squares, gram, torch.ones(1, len(blocks), dtype=FLOAT))
    row["lpips_pooled"] = pooled.item() if torch.isfinite(pooled) else None
    row["lpips_pooled_interval"] = None
    if (count := len(blocks)) >= LEAST_BLOCKS:
        weights = bootstrap_weights(count, seed)
        means = mean_over_weighted_pairs(n, squares, gram, weights, count / (count - 1))
        row["lpips_pooled_interval"] = percentile_interval(means, units=count)
    return row
