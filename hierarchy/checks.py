"""The parts of a hierarchy as they are given: names, parents and ranges, and their checks."""

from collections import Counter
from collections.abc import Sequence

import torch

MOST_CLASSES = 1 << 20


def numbered_names(count: int) -> tuple[str, ...]:
    return tuple(f"{label:05d}" for label in range(count))


def short_repr(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


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
