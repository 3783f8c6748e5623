"""Ranks between the superclasses and the classes, such as order, family and genus.

A JSON file gives all ranks above the classes, from coarse to fine, in one of two forms. Either each has a name per class,

    {"classes": ["lion", "wolf", "fox"],
     "ranks": {"order": ["Carnivora", "Carnivora", "Carnivora"], "genus": ["Panthera", "Canis", "Vulpes"]}}

or each node has a parent in the rank above:

    {"classes": {"lion": "Panthera", "wolf": "Canis", "fox": "Vulpes"},
     "ranks": {"order": ["Carnivora"], "genus": {"Panthera": "Carnivora", "Canis": "Carnivora", "Vulpes": "Carnivora"}}}

The first rank takes the place of the superclasses, unless the file also has "superclasses" and "parents".
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hierarchy.checks import numbered_names, short_repr
from hierarchy.layouts import INAT_RANKS

RANK_NAME = re.compile(r"[^\s=]+")


@dataclass(frozen=True, eq=False)
class Rank:
    """A rank of a hierarchy.

    name      a word, such as "order"
    nodes     unique names
    of_class  the node of each class, int64 (num_classes,); None if it is unknown
    """

    name: str
    nodes: tuple[str, ...]
    of_class: torch.Tensor | None

    @classmethod
    def of_names(cls, name: str, names: Sequence[str]) -> "Rank":
        """Build a rank from the name of each class's node; the nodes are in the order of their first class."""
        label_of = {}
        labels = [label_of.setdefault(node, len(label_of)) for node in names]
        return cls(name, tuple(label_of), torch.tensor(labels, dtype=torch.int64))

    def names(self) -> list[str]:
        """Return the name of each class's node."""
        return [self.nodes[label] for label in self.of_class.tolist()]


def check_ranks(tiers: Sequence[Rank], classes: Sequence[str], source: str):
    """Raise ValueError unless the ranks, from coarse to fine, have different names and are a tree."""
    names = [tier.name for tier in tiers]
    wrong = next((name for name in names if not RANK_NAME.fullmatch(name) or name == "null"), None)
    if wrong is not None or len(set(names)) < len(names):
        raise ValueError(f"{source}: the ranks are {names}, expected different names, each a word other than 'null'.")
    for coarse, fine in zip(tiers, tiers[1:]):
        if coarse.of_class is None or fine.of_class is None:
            continue
        parent_of = {}
        for label, (node, parent) in enumerate(zip(fine.of_class.tolist(), coarse.of_class.tolist())):
            other = parent_of.setdefault(node, parent)
            if other != parent:
                raise ValueError(
                    f"{source}: {fine.name} {fine.nodes[node]!r} is in {coarse.name} {coarse.nodes[other]!r} and, with class "
                    f"{classes[label]!r}, in {coarse.nodes[parent]!r}, expected one parent: rename one of the two."
                )


# ---- ranks from paths ----------------------------------------------------------------------------


def rank_of_paths(name: str, paths: Sequence[tuple[str, ...]]) -> Rank:
    """Build a rank from the path of each class's node, from the root down to the node.

    Nodes are told apart by their path. A homonym is named with its parent, "Ficus (Moraceae)", or if that does not
    suffice, by its path.
    """
    titles = {path: path[-1] for path in paths}
    for longer in (lambda path: f"{path[-1]} ({path[-2]})", "/".join):
        count = Counter(titles.values())
        titles = {path: longer(path) if count[title] > 1 else title for path, title in titles.items()}
    return Rank.of_names(name, [titles[path] for path in paths])


def inat_ranks(names: Sequence[str]) -> list[Rank]:
    """Return the ranks class, order, family and genus of iNaturalist's directory names."""
    parts = [tuple(name.split("_")[1:]) for name in names]  # without the number
    first = INAT_RANKS.index("class")
    return [
        rank_of_paths(rank, [path[:depth] for path in parts]) for depth, rank in enumerate(INAT_RANKS[first:-1], first)
    ]


# ---- JSON ----------------------------------------------------------------------------------------


class Pairs(dict):
    """A JSON object; `twice` is the first key that it has more than once, or None."""

    def __init__(self, pairs: Sequence[tuple[str, object]]):
        super().__init__(pairs)
        seen = set()
        self.twice = next((key for key, _ in pairs if key in seen or seen.add(key)), None)


def ranks_from_record(record: dict, source: str) -> tuple[list[str], list[Rank]]:
    """Return the classes and the ranks of a JSON record, in either form of the module docstring.

    Raises ValueError, which names `source`, if it has neither form.
    """
    ranks, classes = record["ranks"], record.get("classes")
    if not isinstance(ranks, dict) or not ranks or not isinstance(classes, dict | list):
        raise ValueError(
            f"{source}: 'ranks' is {short_repr(ranks)} and 'classes' {short_repr(classes)}, expected an object of ranks from "
            "coarse to fine, and the classes."
        )
    if isinstance(classes, list):
        return classes, [rank_from_names(name, names, len(classes), source) for name, names in ranks.items()]
    for name, nodes in (*ranks.items(), ("classes", classes)):
        if getattr(nodes, "twice", None) is not None:
            raise ValueError(f"{source}: {name} has {nodes.twice!r} twice, expected one parent: rename one of the two.")
    return list(classes), ranks_from_parents(ranks, classes, source)


def rank_from_names(name: str, names: object, count: int, source: str) -> Rank:
    """Read a rank from the name of each class's node, or an unknown one from the number of its nodes."""
    if type(names) is int and 0 < names <= count:
        return Rank(name, numbered_names(names), None)
    if not isinstance(names, list) or len(names) != count:
        raise ValueError(
            f"{source}: rank {name} is {short_repr(names)}, expected a list of {count} names, one per class."
        )
    for label, node in enumerate(names):
        if not isinstance(node, str) or not node:
            raise ValueError(f"{source}: class {label} has {name} {node!r}, expected a name: no rank can be skipped.")
    return Rank.of_names(name, names)


def ranks_from_parents(ranks: dict, classes: dict, source: str) -> list[Rank]:
    """Read ranks from the parents of their nodes and of the classes, {name: parent}; those of the first are a list."""
    (above, nodes), *finer = [*ranks.items(), ("class", classes)]
    if not isinstance(nodes, list) or not all(isinstance(node, str) for node in nodes):
        raise ValueError(
            f"{source}: rank {above} is {short_repr(nodes)}, expected a list of names, as it is the coarsest."
        )
    paths = {node: (node,) for node in nodes}  # from the coarsest rank down to each node
    for name, parents in finer:
        if not isinstance(parents, dict):
            raise ValueError(f"{source}: rank {name} is {short_repr(parents)}, expected an object {{name: parent}}.")
        used = set()
        for node, parent in parents.items():
            if not isinstance(parent, str) or parent not in paths:
                raise ValueError(
                    f"{source}: {name} {node!r} has parent {short_repr(parent)}, expected a name in {above}, the rank above."
                )
            used.add(parent)
        empty = next((node for node in paths if node not in used), None)
        if empty is not None:
            raise ValueError(f"{source}: {above} {empty!r} has no {name}, expected at least one: remove it.")
        paths, above = {node: (*paths[parent], node) for node, parent in parents.items()}, name
    by_class = [paths[name] for name in classes]
    return [Rank.of_names(name, [path[depth] for path in by_class]) for depth, name in enumerate(ranks)]
