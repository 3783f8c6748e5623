"""Match the classes of a file with those of the comparison, by their names.

iNaturalist's classes have two kinds of names: the built-in hierarchy and the official checkpoints number them, 00042,
and folders are called 00042_Animalia_..., which starts with the same number.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hierarchy import Hierarchy
from hierarchy.checks import numbered_names
from hierarchy.layouts import is_inat


class Matching(NamedTuple):
    """Labels in the comparison's hierarchy of the classes of a file, and how they were found.

    labels   int64 (classes,), -1 for a class that the hierarchy lacks
    by_name  False if one side has numbers only, so that the order of the classes decided
    """

    labels: np.ndarray
    by_name: bool


def match_names(names: Sequence[str], hierarchy: Hierarchy) -> Matching:
    """Return the labels of classes, given by their names, in a hierarchy.

    If one side has numbers only and the other iNaturalist's names, the first parts of the names are compared. If one side
    has numbers only and both have equally many classes, each class has the label of its position.
    """
    names = tuple(names)
    numbers_only = names == numbered_names(len(names)) or hierarchy.numbered
    if names == hierarchy.classes or not numbers_only:
        return Matching(find_labels(names, hierarchy.classes), True)
    positions = np.arange(len(names))
    if is_inat(names if hierarchy.numbered else hierarchy.classes):
        labels = find_labels(*([name.split("_")[0] for name in each] for each in (names, hierarchy.classes)))
        if len(names) != hierarchy.num_classes or np.array_equal(labels, positions):
            return Matching(labels, True)
    return Matching(positions if len(names) == hierarchy.num_classes else np.full(len(names), -1), False)


def find_labels(names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Return the position of each name among the classes, int64 (names,), -1 if it is absent."""
    label = {name: i for i, name in enumerate(classes)}
    return np.array([label.get(name, -1) for name in names], dtype=np.int64)


def same_members(own: Hierarchy, hierarchy: Hierarchy) -> bool:
    """Return whether two hierarchies have the same classes under superclasses of the same names, in any order."""
    labels = match_names(own.classes, hierarchy).labels
    if sorted(labels) != list(range(hierarchy.num_classes)):
        return False
    superclasses = [hierarchy.superclasses[s] for s in hierarchy.parents[labels]]
    return superclasses == [own.superclasses[s] for s in own.parents]
