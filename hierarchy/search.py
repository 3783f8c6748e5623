"""Find classes by a part of their names."""

import difflib
from collections.abc import Sequence

from hierarchy.layouts import INAT_NAME
from runtime.text import shorten


def plain(name: str) -> str:
    """Return a name in the form that is compared: case, underscores and spaces make no difference."""
    return " ".join(name.lower().replace("_", " ").split())


def find_name(
    query: str, names: Sequence[tuple[str, ...]], titles: Sequence[str], hierarchy: str, hint: str = ""
) -> int:
    """Return the label of the one class with a name that fits `query`.

    The best kind of fit counts: the complete name, its end (words), words anywhere in it, a part of it.
    Raises ValueError if several classes fit equally well, or none; then it names the closest ones.

    names, titles  all names of each class, and what messages call it
    hierarchy      the hierarchy's name, for the messages
    hint           end of the message if no class fits, instead of the closest ones
    """
    wanted = plain(query)
    one_word = " " not in wanted  # "Vulpes" is a genus, although Vulpes vulpes ends in it
    fits = (
        lambda name, inat: name == wanted,
        lambda name, inat: name.endswith(" " + wanted) and not (one_word and inat),
        lambda name, inat: f" {wanted} " in f" {name} ",
        lambda name, inat: wanted in name,
    )
    known = [[(plain(name), bool(INAT_NAME.fullmatch(name))) for name in each] for each in names]
    for fit in fits if wanted else ():
        labels = [label for label, each in enumerate(known) if any(fit(*name) for name in each)]
        if len(labels) == 1:
            return labels[0]
        if labels:
            found = shorten(titles[label] for label in labels)
            raise ValueError(f"{query!r} fits {len(labels)} classes of {hierarchy} ({found}): write more of the name.")
    if hint:
        raise ValueError(f"No class {query!r}: {hierarchy} {hint}.")
    near = [titles[label] for label in closest_names(wanted, names)]
    nearest = f"the nearest are {shorten(near)}" if near else f"it has {shorten(titles)}"
    raise ValueError(f"No class of {hierarchy} is called {query!r}: {nearest}.")


def find_all(text: str, names: Sequence[tuple[str, ...]]) -> list[int]:
    """Return the labels of all classes with a name that contains the text."""
    wanted = plain(text)
    return [label for label, each in enumerate(names) if any(wanted in plain(name) for name in each)]


def closest_names(wanted: str, names: Sequence[tuple[str, ...]]) -> list[int]:
    """Return the labels of up to three classes with a name, or species if it is iNaturalist's, spelled like `wanted`."""
    label_of = {}
    for label, each in enumerate(names):
        for name in each:
            label_of.setdefault(plain(name), label)
            if INAT_NAME.fullmatch(name):
                label_of.setdefault(" ".join(plain(name).split(" ")[-2:]), label)
    close = difflib.get_close_matches(wanted, label_of, n=3, cutoff=0.5)
    return list(dict.fromkeys(label_of[name] for name in close))
