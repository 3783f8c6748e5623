"""Scientific and common names of iNaturalist's 10,000 species, in a cache that `tools.names` writes.

The built-in hierarchy inat2021 and the released checkpoints have only numbers for classes. The cache is
`~/.cache/finediffusion/inat2021.json`, or in the folder of FINEDIFFUSION_CACHE: a list of pairs in the order of the labels,
the name of iNaturalist's class folder, which has all ranks, and the common name, "" if there is none.
"""

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from hierarchy.layouts import is_inat
from hierarchy.search import find_all, find_name
from runtime.files import atomic_write

Names = tuple[tuple[str, str], ...]


# ---- the cache -----------------------------------------------------------------------------------


def cache_path() -> Path:
    """Return the path of the cache, which need not exist."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("FINEDIFFUSION_CACHE") or caches / "finediffusion") / "inat2021.json"


def write_names(names: Sequence[tuple[str, str]]) -> Path:
    """Write the cache and return its path."""
    path = cache_path()
    atomic_write(path, lambda part: part.write_text(json.dumps(list(names), indent=0) + "\n", encoding="utf-8"))
    return path


def read_names() -> Names:
    """Return (folder name, common name) by label; empty without the cache. Raises ValueError if it is damaged."""
    path = cache_path()
    return read_file(path, path.stat().st_mtime_ns) if path.is_file() else ()


@lru_cache(maxsize=1)
def read_file(path: Path, changed: int) -> Names:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        return tuple((str(folder), str(common)) for folder, common in names)
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged, expected names: run python -m tools.names inat2021 again.") from None


# ---- names of the classes of a hierarchy ---------------------------------------------------------


class Named(Protocol):
    """The attributes of a `Hierarchy` that the functions below read."""

    name: str
    classes: tuple[str, ...]
    num_classes: int
    numbered: bool
    is_inat2021: bool


def full_names(hierarchy: Named) -> tuple[str, ...]:
    """Return the names of the classes: those of iNaturalist's folders if it has iNaturalist's numbers and there is a cache."""
    known = read_names()
    if len(known) == hierarchy.num_classes and hierarchy.is_inat2021:
        return tuple(folder for folder, _ in known)
    return hierarchy.classes


def all_names(hierarchy: Named) -> list[tuple[str, ...]]:
    """Return all known names of each class: its own, that of iNaturalist's folder, and the common name."""
    common = dict(read_names())
    pairs = zip(hierarchy.classes, full_names(hierarchy))
    return [tuple(filter(None, dict.fromkeys((own, full, common.get(full))))) for own, full in pairs]


def titles(hierarchy: Named) -> list[str]:
    """Return names for people: "Vulpes vulpes (Red Fox)", or a class's own name if it has no known common name."""
    common, found = dict(read_names()), []
    for own, full in zip(hierarchy.classes, full_names(hierarchy)):
        species = " ".join(full.split("_")[-2:]) if is_inat([full]) and (own != full or common.get(full)) else own
        found.append(f"{species} ({common[full]})" if common.get(full) else species)
    return found


def find_class(hierarchy: Named, query: str) -> int:
    """Return the label of the one class with a name that fits `query`, see `find_name`."""
    return find_name(query, all_names(hierarchy), titles(hierarchy), hierarchy.name, how_to_name(hierarchy))


def matches(hierarchy: Named, text: str) -> list[int]:
    """Return the labels of all classes with a name that contains `text`. Raises ValueError if there is none."""
    labels = find_all(text, all_names(hierarchy))
    if not labels:
        reason = how_to_name(hierarchy) or f"has names such as {titles(hierarchy)[0]!r}"
        raise ValueError(f"No class {text!r}: {hierarchy.name} {reason}.")
    return labels


def how_to_name(hierarchy: Named) -> str:
    """Return how to get names for classes that have only numbers; "" if they have names."""
    if not hierarchy.numbered or full_names(hierarchy) != hierarchy.classes:
        return ""
    numbers = f"has only numbers, 0..{hierarchy.num_classes - 1}: for names"
    run = "run python -m tools.names inat2021 once, or " if hierarchy.is_inat2021 else ""
    return f"{numbers} {run}pass the image folder or its annotation file as --hierarchy"
