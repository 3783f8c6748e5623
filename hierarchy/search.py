"""Find a class by a part of its name."""

import difflib
from collections.abc import Sequence

from hierarchy.layouts import INAT_NAME, is_inat
from runtime.text import shorten


def find_name(query: str, classes: Sequence[str], hierarchy: str, numbered: bool) -> int:
    """Return the label of the one class whose name fits `query`; case, underscores and spaces make no difference.

    The best kind of fit counts: the complete name, its end (words), words anywhere in it, a part of it.
    Raises ValueError if several classes fit equally well, or none; then it names the closest ones.

    hierarchy, numbered: the hierarchy's name, and whether its classes have only numbers, for the messages.
    """
    names = [name.lower().replace("_", " ") for name in classes]
    wanted = " ".join(query.lower().replace("_", " ").split())
    genus_only = " " not in wanted and is_inat(classes)  # "Vulpes" is a genus, although Vulpes vulpes ends in it
    fits = (
        lambda name: name == wanted,
        lambda name: name.endswith(" " + wanted) and not genus_only,
        lambda name: f" {wanted} " in f" {name} ",
        lambda name: wanted in name,
    )
    for fit in fits if wanted else ():
        labels = [label for label, name in enumerate(names) if fit(name)]
        if len(labels) == 1:
            return labels[0]
        if labels:
            found = shorten(classes[label] for label in labels)
            raise ValueError(f"{query!r} fits {len(labels)} classes of {hierarchy} ({found}): write more of the name.")
    if numbered:
        raise ValueError(
            f"No class {query!r}: {hierarchy} has only numbers, 0..{len(classes) - 1}; for names pass the image folder or "
            "its annotation file as --hierarchy."
        )
    near = closest_names(wanted, classes, names)
    hint = f"the nearest are {shorten(near)}" if near else f"it has {shorten(classes)}"
    raise ValueError(f"No class of {hierarchy} is called {query!r}: {hint}.")


def closest_names(wanted: str, classes: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return up to three classes whose plain name, or species if it is iNaturalist's, is spelled like `wanted`."""
    label_of = {}
    for label, name in enumerate(names):
        label_of.setdefault(name, label)
        if INAT_NAME.fullmatch(classes[label]):
            label_of.setdefault(" ".join(name.split(" ")[-2:]), label)
    close = difflib.get_close_matches(wanted, label_of, n=3, cutoff=0.5)
    return list(dict.fromkeys(classes[label_of[name]] for name in close))
