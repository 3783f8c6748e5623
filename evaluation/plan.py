"""The plan of a pass over a set of images: its order, the groups of each image, and the features to keep."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.metrics import score_splits

SAMPLE = 10_000  # images per set whose features are always kept, as many as ADM's reference batches hold
PER_SUPERCLASS = 2048  # the same per superclass; with fewer images an Inception covariance is singular
KEPT_BYTES = 2**29  # keep the features of all images if they take no more than this
BLOCKS = 10  # blocks of classes per superclass, the bootstrap units of the pooled LPIPS
NEITHER = 2  # `half` of images in neither half


@dataclass
class Plan:
    """Order, groups and kept features of N images.

    labels      (N,) int, class of each image
    parents     (classes,) int, superclass of each class
    superclass  (N,) int, superclass of each image
    order       (N,) int, image indices sorted by class: the order of the pass
    half        (N,) int, 0 or 1 for images in the two halves of the floor, else NEITHER
    kept        (N,) bool, features are kept
    sampled     (N,) bool, among the SAMPLE random images of the set
    split       (N,) int, split of the Inception score
    block       (classes,) int, block of each class, numbered over all superclasses; -1 for classes without images
    """

    labels: np.ndarray
    parents: np.ndarray
    superclass: np.ndarray
    order: np.ndarray
    half: np.ndarray
    kept: np.ndarray
    sampled: np.ndarray
    split: np.ndarray
    block: np.ndarray

    def groups(self) -> list[tuple[int, int]]:
        """Return all (superclass, half) pairs that have images, sorted."""
        return sorted(set(zip(self.superclass.tolist(), self.half.tolist())))


def make_plan(
    labels: np.ndarray,
    parents: np.ndarray,
    keep: str = "auto",
    dims: int = 0,
    half_sizes: Sequence[int] | None = None,
    seed: int = 0,
) -> Plan:
    """Return the plan of a set of images.

    labels: (N,) class of each image
    parents: (classes,) superclass of each class
    keep: features to keep: "all", a random "sample", or "auto" (all if they fit in KEPT_BYTES)
    dims: feature values per image, over all networks
    half_sizes: (superclasses,) most images in each half of a superclass; None for no halves
    """
    shuffled, superclass = np.random.default_rng(seed).permutation(len(labels)), parents[labels]
    # Features to keep:
    sampled = np.zeros(len(labels), dtype=bool)
    sampled[shuffled[:SAMPLE]] = True
    kept = sampled.copy()
    for s in np.unique(superclass):
        kept[shuffled[superclass[shuffled] == s][:PER_SUPERCLASS]] = True
    if keep == "all" or keep == "auto" and 4 * dims * len(labels) <= KEPT_BYTES:
        kept[:] = True
    # Two halves of each superclass:
    half = np.full(len(labels), NEITHER)
    for s, most in enumerate([] if half_sizes is None else half_sizes):
        for i, rows in enumerate(split_in_two(shuffled[superclass[shuffled] == s], labels, most, seed)):
            half[rows] = i
    order, split = np.argsort(labels, kind="stable"), score_splits(len(labels), seed)
    block = blocks_of_classes(labels, parents, seed)
    return Plan(labels, parents, superclass, order, half, kept, sampled, split, block)


def split_in_two(rows: np.ndarray, labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return two halves (2, m) of the image indices `rows`, m <= most: random pairs of images of one class, split up."""
    rows = rows[np.argsort(labels[rows], kind="stable")]
    classes = np.split(rows, np.flatnonzero(np.diff(labels[rows])) + 1)
    pairs = np.concatenate([of_class[: len(of_class) // 2 * 2].reshape(-1, 2) for of_class in classes])
    return np.random.default_rng(seed).permutation(pairs)[:most].T


def blocks_of_classes(labels: np.ndarray, parents: np.ndarray, seed: int) -> np.ndarray:
    """Deal the classes of each superclass at random to at most BLOCKS blocks; see `Plan.block`."""
    block, present, count = np.full(len(parents), -1), np.unique(labels), 0
    for s in np.unique(parents[present]):
        classes = np.random.default_rng((seed, s)).permutation(present[parents[present] == s])
        block[classes] = count + np.arange(len(classes)) % BLOCKS
        count += min(BLOCKS, len(classes))
    return block
