"""Accuracy at every rank of a hierarchy: a wrong species may still be of the right genus, order or superclass.

Ranks are pairs of a name and the node of each class, int64 (classes,), from coarse to fine. The last is the class itself.
"""

import numpy as np

from evaluation.image_sets import ImageSet
from evaluation.options import LEAST_OF_NODE
from hierarchy import Hierarchy

Rank = tuple[str, np.ndarray]
SUPERCLASS, CLASS, NONE = "superclass", "class", "none"


def list_ranks(hierarchy: Hierarchy) -> list[Rank]:
    """Return all ranks of a hierarchy whose nodes are known."""
    known = [(tier.name, tier.of_class.numpy()) for tier in hierarchy.tiers if tier.of_class is not None]
    return [*known, (CLASS, np.arange(hierarchy.num_classes))]


def right_ranks(ranks: list[Rank], labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return at which ranks each image is classified right, bool (ranks, n).

    labels: (n,) classes of the images
    predicted: (n,) classes that the classifier finds; a negative one is outside the hierarchy and wrong at every rank
    """
    inside = predicted >= 0
    found = np.where(inside, predicted, 0)
    return np.array([inside & (nodes[found] == nodes[labels]) for _, nodes in ranks])


def rank_metrics(ranks: list[Rank], labels: np.ndarray, predicted: np.ndarray) -> dict[str, dict[str, float | None]]:
    """Return the accuracy at every rank, and for the wrong images the finest rank at which they are still right.

    "accuracy"      {rank: share of the images, [0, 1]}
    "wrong_images"  {rank: share of the images of a wrong class whose finest right rank it is, [0, 1]}, and "none";
                    the shares add up to 1, and are None if no image is wrong

    labels, predicted: as for `right_ranks`, n > 0
    """
    names, right = [name for name, _ in ranks], right_ranks(ranks, labels, predicted)
    wrong = right[:, ~right[-1]]
    # the finest right rank, counted from the finest; argmax finds the first True
    finest = np.where(wrong.any(0), len(names) - 1 - wrong[::-1].argmax(0), -1)
    shares = {name: float((finest == i).mean()) if finest.size else None for i, name in enumerate(names[:-1])}
    return {
        "accuracy": dict(zip(names, right.mean(1).tolist())),
        "wrong_images": shares | {NONE: float((finest == -1).mean()) if finest.size else None},
    }


def choose_nodes(sets: list[ImageSet], groups: Hierarchy, rank: str) -> list[int]:
    """Return the nodes of a rank of which all sets have LEAST_OF_NODE images.

    sets: labelled; groups: the hierarchy whose superclasses are the nodes

    Raises ValueError if there is no such node.
    """
    enough = np.ones(groups.num_super_classes, dtype=bool)
    for each in sets:
        if each.labels is None:
            counts = np.array([each.gaussians[name].n or 0 for name in groups.superclasses])
        else:
            counts = np.bincount(groups.parents.numpy()[each.labels], minlength=len(enough))
        enough &= counts >= LEAST_OF_NODE
    if not enough.any():
        raise ValueError(
            f"No node of the rank {rank} has {LEAST_OF_NODE} images in every set, expected at least one: name a coarser --rank."
        )
    return np.flatnonzero(enough).tolist()
