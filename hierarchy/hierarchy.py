"""Classes, their superclasses and the map between them.

The paper's superclasses come from the data set: iNaturalist 2021 has 10,000 species in 11 superclasses,
VegFru has 292 classes in 25. The files `hierarchy/*.json` describe these two. Any other data set brings its
hierarchy as a folder `superclass/class/*.jpg` or as a JSON file:

    {"name": "pets",                        optional
     "superclasses": ["cats", "dogs"],      by superclass label
     "classes": ["beagle", "manx", "pug"],  by label; optional, the default is "00000", "00001", ...
     "parents": [1, 0, 1]}                  by label, a superclass label or name; or inclusive ranges
                                            of labels {"cats": [[1, 1]], "dogs": [[0, 0], [2, 2]]}
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hierarchy import names
from hierarchy.layouts import (
    annotation_names,
    check_unique_folders,
    class_folders,
    has_two_levels,
    image_root,
    inat_superclass,
    is_inat,
    is_vegfru,
    release_root,
    subfolders,
    vegfru_prefixes,
)
from runtime.text import one_line

BUILT_IN = Path(__file__).resolve().parent
MOST_CLASSES = 1 << 20
NULL_CLASS = ("null",)  # the superclasses of a hierarchy without any


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Hierarchy:
    """Classes, superclasses and the map between them. Hierarchies that differ in `name` alone are equal.

    classes       unique names by label, num_classes of them
    superclasses  unique names by superclass label, num_super_classes of them
    parents       the superclass label of each class, int64 (num_classes,); each superclass has at least one class.
                  If it is unknown, pass None; reading it then raises ValueError
    name          what messages call the hierarchy
    """

    classes: tuple[str, ...]
    superclasses: tuple[str, ...]
    parents: torch.Tensor  # the property below
    name: str

    def __init__(
        self,
        classes: Sequence[str],
        superclasses: Sequence[str],
        parents: torch.Tensor | Sequence[int] | None,
        name: str = "hierarchy",
    ):
        classes = checked_names(classes, f"{name}: classes")
        superclasses = checked_names(superclasses, f"{name}: superclasses")
        if parents is not None:
            parents = checked_parents(parents, classes, superclasses, name)
        # past the frozen __setattr__
        vars(self).update(classes=classes, superclasses=superclasses, _parents=parents, name=name)

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
        return f"Hierarchy({self.name}: {self.num_classes} / {self.num_super_classes})"

    @classmethod
    def load(cls, spec: str | os.PathLike) -> "Hierarchy":
        """Read a built-in hierarchy, a JSON file or an image folder.

        spec: inat2021, vegfru, a file in the form of the module docstring, an annotation file of iNaturalist, or a
        folder, see `from_folder`. Raises ValueError if it is none of these or invalid.
        """
        built_in = {file.stem: file for file in sorted(BUILT_IN.glob("*.json"))}
        if str(spec) in built_in:
            return cls.from_dict(read_json(built_in[str(spec)]))
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
        are left out. Raises ValueError if a name has another form or its kingdom is unknown.
        """
        record = read_json(BUILT_IN / "inat2021.json")
        names = list(names)
        found = [inat_superclass(record["rule"], class_name) for class_name in names]
        superclasses = [s for s in record["superclasses"] if s in set(found)]
        return cls(names, superclasses, [superclasses.index(s) for s in found], name)

    @classmethod
    def from_dict(cls, record: dict, name: str = "hierarchy") -> "Hierarchy":
        """Build a hierarchy from a record in any form of the module docstring; the inverse of `to_dict`."""
        if not isinstance(record, dict) or not {"superclasses", "parents"} <= record.keys():
            raise ValueError(
                f"A hierarchy must be a JSON object with 'superclasses' and 'parents', got {short_repr(record)}."
            )
        name, superclasses = record.get("name", name), record["superclasses"]
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
        return cls(classes, superclasses, parents, name)

    def to_dict(self) -> dict:
        """Return the JSON form, without "classes" if they are numbered; "parents" is None if unknown."""
        record = {"name": self.name, "superclasses": list(self.superclasses)}
        if not (self.numbered and self.has_parents):
            record["classes"] = list(self.classes)
        record["parents"] = self.parents.tolist() if self.has_parents else None
        return record

    def digest(self) -> str:
        """Return the SHA-256 (hex) of classes, superclasses and parents."""
        parents = self.parents.tolist() if self.has_parents else None
        text = json.dumps([self.classes, self.superclasses, parents], separators=(",", ":"))
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


def numbered_names(count: int) -> tuple[str, ...]:
    return tuple(f"{label:05d}" for label in range(count))


def short_repr(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # invalid UTF-8 or JSON
        raise ValueError(f"{path} is not JSON ({one_line(error)}): pass a hierarchy as JSON.") from None


# ---- checks --------------------------------------------------------------------------------------


def checked_names(names: Sequence[str], field: str) -> tuple[str, ...]:
    """Return the names as a tuple; raise ValueError unless they are unique strings and at least one."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{field} must be a list of names (strings), got {short_repr(names)}.")
    if not names:
        raise ValueError(f"{field} is empty, expected at least one name.")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        at = [i for i, name in enumerate(names) if name == twice]
        raise ValueError(f"{field} must be unique, but {twice!r} is at {at[0]} and {at[1]}.")
    return tuple(names)


def checked_parents(
    parents: torch.Tensor | Sequence[int], classes: Sequence[str], superclasses: Sequence[str], name: str
) -> torch.Tensor:
    """Return the parents as int64 (num_classes,); raise ValueError naming the first that is invalid."""
    labels = parents.tolist() if torch.is_tensor(parents) else list(parents)
    count = len(superclasses)
    if len(labels) != len(classes):
        raise ValueError(f"{name}: {len(labels)} parents for {len(classes)} classes, expected one for each.")
    for i, parent in enumerate(labels):
        if type(parent) is not int or not 0 <= parent < count:
            raise ValueError(
                f"{name}: class {i} ({classes[i]}) has parent {parent!r}, expected an index 0..{count - 1}."
            )
    empty = sorted(set(range(count)) - set(labels))
    if empty:
        raise ValueError(
            f"{name}: superclass {empty[0]} ({superclasses[empty[0]]}) has no class, expected at least one."
        )
    return torch.tensor(labels, dtype=torch.int64)


def expand_ranges(ranges: dict, name: str) -> list[str]:
    """Return the superclass name of each class, given {"superclass": [[first, last], ...], ...} with inclusive ends."""
    try:
        runs = sorted((int(a), int(b), s) for s, pairs in ranges.items() for a, b in pairs)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{name}: 'parents' is {short_repr(ranges)}, expected [[first, last], ...] for each superclass."
        ) from None
    parents = []
    for first, last, superclass in runs:
        if first != len(parents) or last < first:
            raise ValueError(
                f"{name}: range [{first}, {last}] of {superclass!r} leaves a gap or an overlap, expected a range that "
                f"begins at {len(parents)}."
            )
        if last >= MOST_CLASSES:
            raise ValueError(
                f"{name}: range [{first}, {last}] of {superclass!r} is too long, expected at most {MOST_CLASSES} classes."
            )
        parents += [superclass] * (last - first + 1)
    return parents


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
    if has_two_levels(root):
        check_unique_folders(folders)
        superclasses = subfolders(root)
        return Hierarchy(names, superclasses, [superclasses.index(f.parent.name) for f in folders], root.name)
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
