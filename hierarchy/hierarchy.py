"""Which superclass a class has, and what both are called.

The paper's tiers come from the data set: iNaturalist 2021 has 10,000 species under 11 superclasses,
VegFru 292 subordinate classes under 25. What is known of the two stands in `hierarchy/*.json`;
any other data set brings its own as a folder `superclass/class/*.jpg` or as a JSON file:

    {"name": "pets",                        optional
     "superclasses": ["cats", "dogs"],      order = order of the superclass rows
     "classes": ["beagle", "manx", "pug"],  order = class labels; left out: "00000", "00001", ...
     "parents": [1, 0, 1]}                  per class an index or a name; or inclusive index
                                            ranges {"cats": [[1, 1]], "dogs": [[0, 0], [2, 2]]}
"""

import difflib
import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from hierarchy.layouts import (
    INAT_NAME,
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
from runtime.text import shorten

BUILT_IN = Path(__file__).resolve().parent
MOST_CLASSES = 1 << 20


@dataclass(frozen=True, eq=False, repr=False)
class Hierarchy:
    """Classes, superclasses and the map between them.

    classes       names by label, length num_classes, unique
    superclasses  names by superclass label, length num_super_classes, unique
    parents       int64 tensor (num_classes,), values 0..num_super_classes-1, each at least once;
                  None where only names and counts are known: reading it is then a ValueError
    name          what messages call it
    """

    classes: tuple[str, ...]
    superclasses: tuple[str, ...]
    parents: torch.Tensor
    name: str = "hierarchy"

    def __post_init__(self):
        for field in ("classes", "superclasses"):
            names = getattr(self, field)
            if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
                raise ValueError(f"{self.name}: {field} must be a list of names (strings), got {short_repr(names)}.")
            object.__setattr__(self, field, tuple(names))
            check_unique(self, field)
        if self.parents is None:
            object.__delattr__(self, "parents")  # __getattr__ then says what is missing
        else:
            object.__setattr__(self, "parents", checked_parents(self, self.parents))

    def __getattr__(self, attribute):
        if attribute == "parents":
            raise ValueError(
                f"{self.name}: only names and counts are known here, not the superclass of each "
                f"class: pass the folder of the {self.name} release as --hierarchy."
            )
        raise AttributeError(attribute)

    def __eq__(self, other):
        return isinstance(other, Hierarchy) and self.digest() == other.digest()

    def __hash__(self):
        return hash(self.digest())

    def __repr__(self):
        return f"Hierarchy({self.name}: {self.num_classes} / {self.num_super_classes})"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def num_super_classes(self) -> int:
        return len(self.superclasses)

    @property
    def has_parents(self) -> bool:
        return "parents" in vars(self)

    @property
    def numbered(self) -> bool:
        """True if the classes have no names but their zero-padded labels."""
        return self.classes == numbered_names(self.num_classes)

    @classmethod
    def load(cls, spec: str | os.PathLike) -> "Hierarchy":
        """Read `inat2021`, `vegfru`, a JSON file or an image folder; see the module's head and
        `from_folder`. A JSON file may also be an annotation file of iNaturalist."""
        built_in = {file.stem: file for file in sorted(BUILT_IN.glob("*.json"))}
        if str(spec) in built_in:
            return cls.from_dict(read_json(built_in[str(spec)]))
        path = Path(spec)
        if path.is_dir() or path.suffix == ".txt":
            return cls.from_folder(path)
        if not path.exists():
            raise ValueError(
                f"There is no hierarchy or path {str(spec)!r}: expected "
                f"{', '.join(built_in)}, a .json file or an image folder."
            )
        record = read_json(path)
        if isinstance(record, dict) and "categories" in record:
            return cls.from_class_names(annotation_names(record["categories"], path), path.stem)
        try:
            return cls.from_dict(record, path.stem)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_folder(cls, path: str | os.PathLike) -> "Hierarchy":
        """The hierarchy of an image folder (or of a list of VegFru), whatever the folder's name.

        `superclass/class/*.jpg`: the two levels; VegFru's release: the prefixes of its files;
        iNaturalist's class folders: the rule; others: a `hierarchy.json` in or beside the folder.
        """
        root = release_root(path)
        return hierarchy_from_vegfru(root) if is_vegfru(root) else hierarchy_from_folders(root)

    @classmethod
    def from_class_names(cls, names, name: str = "inaturalist") -> "Hierarchy":
        """Superclasses of iNaturalist directory names `NNNNN_Kingdom_Phylum_..._epithet` by the
        rule of `hierarchy/inat2021.json`, in its order; those without a class are left out."""
        record = read_json(BUILT_IN / "inat2021.json")
        names = list(names)
        found = [inat_superclass(record["rule"], class_name) for class_name in names]
        superclasses = [s for s in record["superclasses"] if s in set(found)]
        return cls(names, superclasses, [superclasses.index(s) for s in found], name)

    @classmethod
    def from_dict(cls, record: dict, name: str = "hierarchy") -> "Hierarchy":
        """The inverse of `to_dict`; takes every form at the module's head."""
        if not isinstance(record, dict) or not {"superclasses", "parents"} <= record.keys():
            raise ValueError(
                f"A hierarchy is a JSON object with 'superclasses' and 'parents', got {short_repr(record)}."
            )
        name, superclasses = record.get("name", name), record["superclasses"]
        classes, parents = record.get("classes"), record["parents"]
        if isinstance(parents, dict):
            parents = expand_ranges(parents, name)
        if not isinstance(superclasses, list) or not isinstance(parents, list | type(None)):
            raise ValueError(
                f"{name}: 'superclasses' must be a list of names and 'parents' a list or "
                f"an object of ranges, got {short_repr(superclasses)} and {short_repr(parents)}."
            )
        if parents is not None:
            row = {s: i for i, s in enumerate(superclasses) if isinstance(s, str)}
            unknown = [p for p in parents if isinstance(p, str) and p not in row]
            if unknown:
                raise ValueError(f"{name}: parent {unknown[0]!r} is not among the superclasses; add it there.")
            parents = [row[p] if isinstance(p, str) else p for p in parents]
            classes = numbered_names(len(parents)) if classes is None else classes
        return cls(classes, superclasses, parents, name)

    def to_dict(self) -> dict:
        """JSON form; `classes` is absent if they are only numbers, `parents` null if unknown."""
        record = {"name": self.name, "superclasses": list(self.superclasses)}
        if not (self.numbered and self.has_parents):
            record["classes"] = list(self.classes)
        record["parents"] = self.parents.tolist() if self.has_parents else None
        return record

    def digest(self) -> str:
        """sha256 (hex) of classes, superclasses and parents; the name does not count."""
        parents = self.parents.tolist() if self.has_parents else None
        text = json.dumps([self.classes, self.superclasses, parents], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def find(self, query: str | int) -> int:
        """Label of the class meant by `query`: an index, a name, or a part of one name (any case,
        spaces for underscores; ending in the query as whole words beats merely holding it)."""
        query = str(query).strip()
        if query in self.classes:
            label = self.classes.index(query)
            index = int(query) if re.fullmatch("[1-9][0-9]*", query) else label
            if index != label and index < self.num_classes:
                raise ValueError(
                    f"{query!r} is the name of class {label} and the index of class "
                    f"{self.classes[index]!r}: write the index with a zero before it, "
                    f"0{label} or 0{query}."
                )
            return label
        if re.fullmatch(r"-?\d+", query):
            if 0 <= int(query) < self.num_classes:
                return int(query)
            raise ValueError(f"Class {query} is out of range: {self.name} has 0..{self.num_classes - 1}.")
        return find_by_name_part(self, query)


def numbered_names(count: int) -> tuple[str, ...]:
    return tuple(f"{i:05d}" for i in range(count))


def short_repr(value, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of UTF-8 or of JSON
        raise ValueError(f"{path} is not JSON ({error}): pass a hierarchy as JSON.") from None


# ---- checks --------------------------------------------------------------------------------------


def check_unique(hierarchy: Hierarchy, field: str):
    names = getattr(hierarchy, field)
    if not names:
        raise ValueError(f"{hierarchy.name}: {field} is empty; at least one name is needed.")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        at = [i for i, name in enumerate(names) if name == twice]
        raise ValueError(f"{hierarchy.name}: {field} must be unique, but {twice!r} is at {at[0]} and {at[1]}.")


def checked_parents(hierarchy: Hierarchy, parents) -> torch.Tensor:
    """Parents as an int64 tensor (num_classes,), or a ValueError that names the offender."""
    name, count = hierarchy.name, hierarchy.num_super_classes
    values = parents.tolist() if torch.is_tensor(parents) else list(parents)
    if len(values) != hierarchy.num_classes:
        raise ValueError(f"{name}: {len(values)} parents for {hierarchy.num_classes} classes; each class needs one.")
    for i, parent in enumerate(values):
        if type(parent) is not int or not 0 <= parent < count:
            raise ValueError(
                f"{name}: class {i} ({hierarchy.classes[i]}) has parent {parent!r}, expected an index 0..{count - 1}."
            )
    empty = sorted(set(range(count)) - set(values))
    if empty:
        raise ValueError(
            f"{name}: superclass {empty[0]} ({hierarchy.superclasses[empty[0]]}) has no class; "
            "every superclass needs at least one."
        )
    return torch.tensor(values, dtype=torch.int64)


def expand_ranges(ranges: dict, name: str) -> list[str]:
    """{"superclass": [[first, last], ...], ...} with inclusive bounds -> a name per class."""
    try:
        runs = sorted((int(a), int(b), s) for s, pairs in ranges.items() for a, b in pairs)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{name}: 'parents' is {short_repr(ranges)}, expected [[first, last], ...] per superclass."
        ) from None
    parents = []
    for first, last, superclass in runs:
        if first != len(parents) or last < first:
            raise ValueError(
                f"{name}: range [{first}, {last}] of {superclass!r} leaves a gap or an overlap; "
                f"expected one that begins at {len(parents)}."
            )
        if last >= MOST_CLASSES:
            raise ValueError(
                f"{name}: range [{first}, {last}] of {superclass!r} is too long; at most {MOST_CLASSES} classes."
            )
        parents += [superclass] * (last - first + 1)
    return parents


# ---- folders -------------------------------------------------------------------------------------


def hierarchy_from_folders(root: Path) -> Hierarchy:
    folders = class_folders(root)
    root, names = image_root(root), [folder.name for folder in folders]
    if has_two_levels(root):
        check_unique_folders(folders)
        superclasses = subfolders(root)
        row = {name: i for i, name in enumerate(superclasses)}
        return Hierarchy(names, superclasses, [row[f.parent.name] for f in folders], root.name)
    if is_inat(names):
        return Hierarchy.from_class_names(names, root.name)
    for path in (root / "hierarchy.json", root.resolve().parent / "hierarchy.json"):
        if path.is_file():
            return Hierarchy.load(path)
    raise ValueError(
        f"{root} has class folders but nothing says which superclass they have: put a "
        "hierarchy.json in or beside it, or sort it as superclass/class/*.jpg."
    )


def hierarchy_from_vegfru(root: Path) -> Hierarchy:
    """VegFru as it unpacks, classes and superclasses in the order of the release."""
    record = read_json(BUILT_IN / "vegfru.json")
    prefix = vegfru_prefixes(root, record["prefixes"])
    order = {name: i for i, name in enumerate(record["classes"])}
    classes = sorted(prefix, key=lambda name: (order.get(name, len(order)), name.lower()))
    used = [p for p in record["prefixes"] if p in prefix.values()]
    superclasses = [record["superclasses"][record["prefixes"].index(p)] for p in used]
    return Hierarchy(classes, superclasses, [used.index(prefix[name]) for name in classes], record["name"])


# ---- names ---------------------------------------------------------------------------------------


def find_by_name_part(hierarchy: Hierarchy, query: str) -> int:
    plain = [name.lower().replace("_", " ") for name in hierarchy.classes]
    wanted = " ".join(query.lower().replace("_", " ").split())
    # "Vulpes" means the genus, although the name of one species ends in it
    genus_only = " " not in wanted and is_inat(hierarchy.classes)
    tests = (
        lambda name: name == wanted,
        lambda name: name.endswith(" " + wanted) and not genus_only,
        lambda name: f" {wanted} " in f" {name} ",
        lambda name: wanted in name,
    )
    for test in tests if wanted else ():
        labels = [i for i, name in enumerate(plain) if test(name)]
        if len(labels) == 1:
            return labels[0]
        if labels:
            raise ValueError(
                f"{query!r} fits {len(labels)} classes of {hierarchy.name} "
                f"({shorten(hierarchy.classes[i] for i in labels)}): write more of the name."
            )
    if hierarchy.numbered:
        raise ValueError(
            f"No class {query!r}: {hierarchy.name} has only numbers, 0..{len(plain) - 1}; "
            "for names pass the image folder or its annotation file as --hierarchy."
        )
    labels = {}  # the whole name, and of an iNaturalist name the species
    for i, name in enumerate(plain):
        labels.setdefault(name, i)
        if INAT_NAME.fullmatch(hierarchy.classes[i]):
            labels.setdefault(" ".join(name.split(" ")[-2:]), i)
    close = difflib.get_close_matches(wanted, labels, n=3, cutoff=0.5)
    near = list(dict.fromkeys(hierarchy.classes[labels[name]] for name in close))
    hint = f"the nearest are {shorten(near)}" if near else f"it has {shorten(hierarchy.classes)}"
    raise ValueError(f"No class of {hierarchy.name} is called {query!r}: {hint}.")


# ---- which images, which labels ------------------------------------------------------------------


def check_counts(hierarchy: Hierarchy, num_classes: int | None, num_super_classes: int | None):
    """ValueError if a count the user gave (None: not given) is not the hierarchy's."""
    for flag, given, found in (
        ("--num-classes", num_classes, hierarchy.num_classes),
        ("--num-super-classes", num_super_classes, hierarchy.num_super_classes),
    ):
        if given is not None and given != found:
            raise ValueError(
                f"{flag} is {given}, but {hierarchy.name} has {found}: drop the flag or pass another --hierarchy."
            )
