"""Classes, their superclasses and the map between them, and the ranks in between if there are any.

The paper's superclasses come from the data set: iNaturalist 2021 has 10,000 species in 11 superclasses,
VegFru has 292 classes in 25. The files `hierarchy/*.json` describe these two. Any other data set brings its
hierarchy as a folder `superclass/class/*.jpg` or as a JSON file:

    {"name": "pets",                        optional
     "superclasses": ["cats", "dogs"],      by superclass label
     "classes": ["beagle", "manx", "pug"],  by label; optional, the default is "00000", "00001", ...
     "parents": [1, 0, 1]}                  by label, a superclass label or name; or inclusive ranges
                                            of labels {"cats": [[1, 1]], "dogs": [[0, 0], [2, 2]]}

Deeper folders have further ranks, and so have JSON files in the forms of `hierarchy/ranks.py`.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hierarchy import names
from hierarchy.checks import checked_names, checked_parents, expand_ranges, numbered_names, short_repr
from hierarchy.layouts import (
    annotation_names,
    check_unique_folders,
    class_folders,
    image_root,
    inat_superclass,
    is_inat,
    is_vegfru,
    release_root,
    vegfru_prefixes,
)
from hierarchy.ranks import Pairs, Rank, check_ranks, inat_ranks, rank_from_names, rank_of_paths, ranks_from_record
from runtime.text import one_line

BUILT_IN = Path(__file__).resolve().parent
SUPERCLASS = "superclass"  # the usual name of the coarsest rank
NULL_CLASS = ("null",)  # the superclasses of a hierarchy without any


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Hierarchy:
    """Classes, superclasses, the map between them, and further ranks. Hierarchies that differ in `name` alone are equal.

    classes       unique names by label, num_classes of them
    superclasses  unique names by superclass label, num_super_classes of them
    parents       the superclass label of each class, int64 (num_classes,); each superclass has at least one class.
                  If it is unknown, pass None; reading it then raises ValueError
    name          what messages call the hierarchy
    ranks         the ranks between superclasses and classes, from coarse to fine
    top           name of the rank of the superclasses
    """

    classes: tuple[str, ...]
    superclasses: tuple[str, ...]
    parents: torch.Tensor  # the property below
    name: str
    ranks: tuple[Rank, ...]
    top: str

    def __init__(
        self,
        classes: Sequence[str],
        superclasses: Sequence[str],
        parents: torch.Tensor | Sequence[int] | None,
        name: str = "hierarchy",
        ranks: Sequence[Rank] = (),
        top: str = SUPERCLASS,
    ):
        classes = checked_names(classes, f"{name}: classes")
        superclasses = checked_names(superclasses, f"{name}: superclasses")
        if parents is not None:
            parents = checked_parents(parents, classes, superclasses, name)
        # past the frozen __setattr__
        vars(self).update(classes=classes, superclasses=superclasses, _parents=parents, name=name)
        vars(self).update(ranks=tuple(ranks), top=top)
        check_ranks(self.tiers, classes, name)

    @property
    def parents(self) -> torch.Tensor:
        if self._parents is None:
            raise ValueError(
                f"{self.name} has the names of classes and superclasses, but not the superclass of each class: pass the "
                f"folder of the {self.name} release as --hierarchy."
            )
        return self._parents

    @property
    def has_parents(self) -> bool:
        return self._parents is not None

    @property
    def tiers(self) -> tuple[Rank, ...]:
        """All ranks above the classes, from coarse to fine: the superclasses and `ranks`."""
        return Rank(self.top, self.superclasses, self._parents), *self.ranks

    @property
    def leaf(self) -> str:
        """The name of the rank of the classes."""
        return "species" if is_inat(self.classes) or "class" in (tier.name for tier in self.tiers) else "class"

    @property
    def has_ancestors(self) -> bool:
        """True if the nodes of each class are known in all tiers."""
        return all(tier.of_class is not None for tier in self.tiers)

    @property
    def ancestors(self) -> torch.Tensor:
        """The nodes of each class, int64 (tiers, num_classes). Raises ValueError if they are unknown."""
        unknown = [rank.name for rank in self.ranks if rank.of_class is None]
        if unknown:
            raise ValueError(
                f"{self.name} has the number of nodes of rank {unknown[0]}, but not the node of each class: pass the image "
                "folder or its annotation file instead."
            )
        return torch.stack([self.parents, *(rank.of_class for rank in self.ranks)])

    @property
    def is_plain(self) -> bool:
        """True if the one superclass is the null class of a plain DiT."""
        return self.superclasses == NULL_CLASS

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def num_super_classes(self) -> int:
        return len(self.superclasses)

    @property
    def numbered(self) -> bool:
        """True if the names of the classes are their zero-padded labels."""
        return self.classes == numbered_names(self.num_classes)

    @property
    def is_inat2021(self) -> bool:
        """True for the built-in hierarchy inat2021, which the released checkpoints have: its classes are numbers."""
        return self.numbered and self == Hierarchy.load("inat2021")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hierarchy) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        counts = (len(tier.nodes) for tier in reversed(self.tiers))
        return f"Hierarchy({self.name}: {' / '.join(map(str, (self.num_classes, *counts)))})"

    def keep(self, *wanted: str) -> "Hierarchy":
        """Return the hierarchy with these tiers alone, the coarsest of which are its superclasses; without names the first.

        wanted: names of tiers, in any order; "superclass" is the first. Raises ValueError if there is no such tier.
        """
        own = {tier.name: tier for tier in self.tiers}
        wanted = [self.top if name == SUPERCLASS else name for name in wanted]
        unknown = [name for name in wanted if name not in own]
        if unknown:
            raise ValueError(f"{self.name} has no rank {unknown[0]!r}, expected one of {', '.join(own)}.")
        top, *ranks = [tier for tier in self.tiers if tier.name in (wanted or [self.top])]
        return Hierarchy(self.classes, top.nodes, top.of_class, self.name, ranks, top.name)

    @classmethod
    def load(cls, spec: str | os.PathLike, counted: bool = False) -> "Hierarchy":
        """Read a built-in hierarchy, a JSON file or an image folder.

        spec: inat2021, vegfru, a file in the form of the module docstring, an annotation file of iNaturalist, or a
        folder, see `from_folder`. With `counted` a built-in one has ranks with numbered nodes. Raises ValueError if it is
        none of these or invalid.
        """
        built_in = {file.stem: file for file in sorted(BUILT_IN.glob("*.json"))}
        if str(spec) in built_in:
            record = read_json(built_in[str(spec)])
            return cls.from_dict(record if counted else {key: record[key] for key in record if key != "ranks"})
        path = Path(spec)
        if path.is_dir() or path.suffix == ".txt":
            return cls.from_folder(path)
        if not path.exists():
            raise ValueError(
                f"There is no hierarchy or path {str(spec)!r}, expected {', '.join(built_in)}, a .json file or an image "
                "folder: check the spelling."
            )
        record = read_json(path)
        if isinstance(record, dict) and "categories" in record:
            return cls.from_class_names(annotation_names(record["categories"], path), path.stem)
        try:
            return cls.from_dict(record, path.stem)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_folder(cls, path: str | os.PathLike, allow_flat: bool = False) -> "Hierarchy":
        """Read the hierarchy of an image folder, or of a list file of VegFru; the folder may have any name.

        The superclasses are the first level of `superclass/class/*.jpg`, the file prefixes of VegFru's release, or
        follow from iNaturalist's class names. Other folders `class/*.jpg` need a `hierarchy.json` in or beside them; with
        `allow_flat` they may also have none, and their one superclass is then the null class of a plain DiT.
        """
        root = release_root(path)
        return hierarchy_from_vegfru(root) if is_vegfru(root) else hierarchy_from_folders(root, allow_flat)

    @classmethod
    def plain(cls, classes: Sequence[str], name: str) -> "Hierarchy":
        """Build the hierarchy of a plain DiT: its one superclass is the null class."""
        return cls(classes, NULL_CLASS, [0] * len(classes), name)

    @classmethod
    def from_class_names(cls, names: Iterable[str], name: str = "inaturalist") -> "Hierarchy":
        """Build the hierarchy of iNaturalist directory names `NNNNN_Kingdom_Phylum_..._epithet`.

        The rule and the order of superclasses are those of `hierarchy/inat2021.json`; superclasses without a class
        are left out. The further ranks are class, order, family and genus. Raises ValueError if a name has another form or
        its kingdom is unknown.
        """
        record = read_json(BUILT_IN / "inat2021.json")
        names = list(names)
        found = [inat_superclass(record["rule"], class_name) for class_name in names]
        superclasses = [s for s in record["superclasses"] if s in set(found)]
        return cls(names, superclasses, [superclasses.index(s) for s in found], name, inat_ranks(names))

    @classmethod
    def from_dict(cls, record: dict, name: str = "hierarchy") -> "Hierarchy":
        """Build a hierarchy from a record in any form of the module docstring; the inverse of `to_dict`."""
        two_tiers = isinstance(record, dict) and {"superclasses", "parents"} <= record.keys()
        if not two_tiers and not (isinstance(record, dict) and "ranks" in record):
            raise ValueError(
                "A hierarchy must be a JSON object with 'superclasses' and 'parents', or with 'classes' and 'ranks', got "
                f"{short_repr(record)}."
            )
        name = record.get("name", name)
        if not two_tiers:
            classes, (top, *ranks) = ranks_from_record(record, name)
            return cls(classes, top.nodes, top.of_class, name, ranks, top.name)
        superclasses = record["superclasses"]
        classes, parents = record.get("classes"), record["parents"]
        if isinstance(parents, dict):
            parents = expand_ranges(parents, name)
        if not isinstance(superclasses, list) or not isinstance(parents, list | type(None)):
            raise ValueError(
                f"{name}: 'superclasses' must be a list of names and 'parents' a list or an object of ranges, got "
                f"{short_repr(superclasses)} and {short_repr(parents)}."
            )
        if parents is not None:
            label_of = {s: label for label, s in enumerate(superclasses) if isinstance(s, str)}
            unknown = [p for p in parents if isinstance(p, str) and p not in label_of]
            if unknown:
                raise ValueError(f"{name}: parent {unknown[0]!r} is not among the superclasses: add it to them.")
            parents = [label_of[p] if isinstance(p, str) else p for p in parents]
            classes = numbered_names(len(parents)) if classes is None else classes
        further = record.get("ranks", {})
        if not isinstance(further, dict):
            raise ValueError(
                f"{name}: 'ranks' is {short_repr(further)}, expected an object of ranks from coarse to fine."
            )
        ranks = [rank_from_names(rank, nodes, len(classes), name) for rank, nodes in further.items()]
        return cls(classes, superclasses, parents, name, ranks, record.get("superclass_rank", SUPERCLASS))

    def to_dict(self) -> dict:
        """Return the JSON form, without "classes" if they are numbered; "parents" is None if unknown.

        Only a hierarchy that has them gets "ranks", with a name per class or a number of nodes, and "superclass_rank".
        """
        record = {"name": self.name, "superclasses": list(self.superclasses)}
        if not (self.numbered and self.has_parents):
            record["classes"] = list(self.classes)
        record["parents"] = self.parents.tolist() if self.has_parents else None
        if self.top != SUPERCLASS:
            record["superclass_rank"] = self.top
        if self.ranks:
            known = {rank.name: rank.of_class is not None for rank in self.ranks}
            record["ranks"] = {r.name: r.names() if known[r.name] else len(r.nodes) for r in self.ranks}
        return record

    def digest(self) -> str:
        """Return the SHA-256 (hex) of classes, superclasses, parents and further ranks."""
        parents = self.parents.tolist() if self.has_parents else None
        parts = [self.classes, self.superclasses, parents, *([self.to_dict()["ranks"]] if self.ranks else [])]
        text = json.dumps(parts, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def find(self, query: str | int) -> int:
        """Return the label of a class, given as a label, a name or a part of one name, see `search.find_name`.

        Raises ValueError if the query fits no class or several.
        """
        query = str(query).strip()
        if query in self.classes:
            label = self.classes.index(query)
            index = int(query) if re.fullmatch("[1-9][0-9]*", query) else label
            if index != label and index < self.num_classes:
                raise ValueError(
                    f"{query!r} is the name of class {label} and the label of class {self.classes[index]!r}: write the "
                    f"label with a leading zero, 0{label} or 0{query}."
                )
            return label
        if re.fullmatch(r"-?\d+", query):
            if 0 <= int(query) < self.num_classes:
                return int(query)
            raise ValueError(f"Class {query} is out of range: {self.name} has 0..{self.num_classes - 1}.")
        return names.find_class(self, query)


def read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=Pairs)
    except (ValueError, RecursionError) as error:  # invalid UTF-8 or JSON
        raise ValueError(f"{path} is not JSON ({one_line(error)}): pass a hierarchy as JSON.") from None


# ---- checks --------------------------------------------------------------------------------------


def check_counts(hierarchy: Hierarchy, num_classes: int | None, num_super_classes: int | None):
    """Raise ValueError if a count that the user gave (None: not given) differs from the hierarchy's."""
    for flag, given, found in (
        ("--num-classes", num_classes, hierarchy.num_classes),
        ("--num-super-classes", num_super_classes, hierarchy.num_super_classes),
    ):
        if given is not None and given != found:
            raise ValueError(
                f"{flag} is {given}, but {hierarchy.name} has {found}: drop the flag or pass another --hierarchy."
            )


# ---- folders -------------------------------------------------------------------------------------


def hierarchy_from_folders(root: Path, allow_flat: bool = False) -> Hierarchy:
    """Read superclass/class/*, class/* with a hierarchy.json in or beside it, or iNaturalist's class folders.

    allow_flat: accept class/* without a hierarchy.json
    """
    folders = class_folders(root)
    root, names = image_root(root), [folder.name for folder in folders]
    depth = len(folders[0].relative_to(root).parts)
    if depth > 1:
        check_unique_folders(folders)
        paths = [folder.relative_to(root).parts for folder in folders]
        top, *ranks = [
            rank_of_paths(SUPERCLASS if level == 1 else f"level{level}", [path[:level] for path in paths])
            for level in range(1, depth)
        ]
        return Hierarchy(names, top.nodes, top.of_class, root.name, ranks)
    if is_inat(names):
        return Hierarchy.from_class_names(names, root.name)
    for path in (root / "hierarchy.json", root.resolve().parent / "hierarchy.json"):
        if path.is_file():
            return Hierarchy.load(path)
    if allow_flat:
        return Hierarchy.plain(names, root.name)
    raise ValueError(
        f"{root} has class folders but no superclasses: put a hierarchy.json in or beside it, or arrange it as "
        "superclass/class/*.jpg."
    )


def hierarchy_from_vegfru(root: Path) -> Hierarchy:
    """Read VegFru's release; the order of classes and superclasses is the release's."""
    record = read_json(BUILT_IN / "vegfru.json")
    prefix_of = vegfru_prefixes(root, record["prefixes"])
    order = {name: i for i, name in enumerate(record["classes"])}
    classes = sorted(prefix_of, key=lambda name: (order.get(name, len(order)), name.lower()))
    used = [prefix for prefix in record["prefixes"] if prefix in prefix_of.values()]
    superclasses = [record["superclasses"][record["prefixes"].index(prefix)] for prefix in used]
    return Hierarchy(classes, superclasses, [used.index(prefix_of[name]) for name in classes], record["name"])
