"""The plan of a pass over a set of images: its order, the groups of each image, and the features to keep."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from evaluation.metrics import score_splits

SAMPLE = 10_000  # images per set whose features are always kept, as many as ADM's reference batches hold
PER_SUPERCLASS = 2048  # the same per superclass; with fewer images an Inception covariance is singular
KEPT_BYTES = 2**29  # keep the features of all images if they take no more than this
BLOCKS = 20  # blocks of classes per superclass, the bootstrap units of the pooled LPIPS
BLOCK_BYTES = 5 * 2**30  # fewer blocks if their sums of LPIPS features would take more
NEITHER = 2  # `half` of images in neither half


@dataclass
class Plan:
    """Order, groups and kept features of N images.

    labels      (N,) int, class of each image
    parents     (classes,) int, superclass of each class
    superclass  (N,) int, superclass of each image
    order       (N,) int, image indices sorted by class: the order of the pass
    half        (N,) int, 0 or 1 for images in the two halves of the floor, else NEITHER; of FAKE there is one half
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

    def large_groups(self, dims: int) -> list[tuple[int, int]]:
        """Return the groups that need sums: those with `dims` images or more, or without the features of all images."""
        pairs = self.superclass * (NEITHER + 1) + self.half
        found, index, counts = np.unique(pairs, return_inverse=True, return_counts=True)
        all_kept = np.bincount(index, self.kept) == counts
        large = found[(counts >= dims) | ~all_kept]
        return [divmod(pair, NEITHER + 1) for pair in large.tolist()]

    def without(self, lost: np.ndarray) -> "Plan":
        """Return the plan of the other images, without those marked in `lost`, bool (N,)."""
        names = ("labels", "superclass", "half", "kept", "sampled", "split")
        left = {name: getattr(self, name)[~lost] for name in names}
        return replace(self, **left, order=np.argsort(left["labels"], kind="stable"))


def make_plan(
    labels: np.ndarray,
    parents: np.ndarray,
    keep: str = "auto",
    dims: int = 0,
    half_sizes: Sequence[int] | None = None,
    seed: int = 0,
    one_half: bool = False,
    lpips_dims: int = 0,
) -> Plan:
    """Return the plan of a set of images.

    labels: (N,) class of each image
    parents: (classes,) superclass of each class
    keep: features to keep: "all", a random "sample", or "auto" (all if they fit in KEPT_BYTES)
    dims: feature values per image, over all networks
    half_sizes: (superclasses,) most images in each half of a superclass; None for no halves
    one_half: make one half alone, spread evenly over the classes
    lpips_dims: LPIPS feature values per image
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
        of_superclass = shuffled[superclass[shuffled] == s]
        if one_half:
            half[spread(of_superclass, labels)[:most]] = 0
            continue
        for i, rows in enumerate(split_in_two(of_superclass, labels, most, seed)):
            half[rows] = i
    order, split = np.argsort(labels, kind="stable"), score_splits(len(labels), seed)
    block = blocks_of_classes(labels, parents, seed, most_blocks(len(np.unique(superclass)), lpips_dims))
    return Plan(labels, parents, superclass, order, half, kept, sampled, split, block)


def split_in_two(rows: np.ndarray, labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Return two halves (2, m) of the image indices `rows`, m <= most: random pairs of images of one class, split up."""
    rows = rows[np.argsort(labels[rows], kind="stable")]
    classes = np.split(rows, np.flatnonzero(np.diff(labels[rows])) + 1)
    pairs = np.concatenate([of_class[: len(of_class) // 2 * 2].reshape(-1, 2) for of_class in classes])
    return np.random.default_rng(seed).permutation(pairs)[:most].T


def spread(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the image indices `rows` in an order whose every start has about equally many images of each class."""
    by_class = np.argsort(labels[rows], kind="stable")
    _, starts, counts = np.unique(labels[rows][by_class], return_index=True, return_counts=True)
    rank = np.arange(len(rows)) - np.repeat(starts, counts)  # place of each image in its class
    share = np.empty(len(rows))
    share[by_class] = (rank + 0.5) / np.repeat(counts, counts)
    return rows[np.argsort(share, kind="stable")]


def most_blocks(superclasses: int, lpips_dims: int) -> int:
    """Return the number of blocks per superclass whose float64 sums fit in BLOCK_BYTES, 1 to BLOCKS."""
    return max(1, min(BLOCKS, BLOCK_BYTES // max(1, 8 * lpips_dims * superclasses)))


def blocks_of_classes(labels: np.ndarray, parents: np.ndarray, seed: int, most: int = BLOCKS) -> np.ndarray:
    """Deal the classes of each superclass at random to at most `most` blocks; see `Plan.block`."""
    block, present, count = np.full(len(parents), -1), np.unique(labels), 0
    for s in np.unique(parents[present]):
        classes = np.random.default_rng((seed, s)).permutation(present[parents[present] == s])
        block[classes] = count + np.arange(len(classes)) % most
        count += min(most, len(classes))
    return block
