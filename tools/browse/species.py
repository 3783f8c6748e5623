"""The species of a model as the page shows them: names, ranks and real images."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dataset.images import read_crop
from dataset.listing import match_classes
from hierarchy import Hierarchy, names
from hierarchy.layouts import INAT_RANKS, class_folders, is_image, is_inat, visible_entries
from sampling.grid import caption

REAL_IMAGES, REAL_PIXELS = 6, 192  # images in a strip of real ones, pixels per side of each


def name_pairs(hierarchy: Hierarchy) -> list[tuple[str, str]]:
    """Return the scientific and the common name of each class; "" if no common one is known."""
    common = dict(names.read_names())
    return [(caption(full), common.get(full, "")) for full in names.full_names(hierarchy)]


def tiers(hierarchy: Hierarchy) -> list[dict]:
    """Return the ranks above the classes, coarse to fine: their name, their nodes, and the node of each class.

    A hierarchy without further ranks gets those in iNaturalist's names, if its classes have such names.
    """
    found, ranks, full = [], getattr(hierarchy, "ranks", ()), names.full_names(hierarchy)
    if hierarchy.has_parents and not hierarchy.is_plain:
        found.append(dict(name="superclass", nodes=hierarchy.superclasses, of=hierarchy.parents.tolist()))
    if not ranks and is_inat(full):
        parts = list(zip(*(name.split("_") for name in full)))
        return found + [tier(INAT_RANKS[i], parts[i]) for i in range(3, 7)]  # class to genus
    return found + [dict(name=rank.name, nodes=rank.nodes, of=rank.of_class.tolist()) for rank in ranks]


def tier(name: str, nodes: Sequence[str]) -> dict:
    """Return a rank from the node of each class."""
    number = {node: i for i, node in enumerate(dict.fromkeys(nodes))}
    return dict(name=name, nodes=list(number), of=[number[node] for node in nodes])


def real_folders(path: str, hierarchy: Hierarchy) -> dict[int, Path]:
    """Return the folder of each label. Raises ValueError if the folders are not the classes."""
    folders = class_folders(Path(path))
    label_of = match_classes([folder.name for folder in folders], hierarchy, Path(path))
    return {label_of[folder.name]: folder for folder in folders}


def real_strip(folder: Path) -> Image.Image:
    """Return the first images of a folder side by side. Raises UnreadableImage for a damaged one."""
    found = [entry.path for entry in visible_entries(folder) if is_image(entry)][:REAL_IMAGES]
    strip = Image.new("RGB", (REAL_PIXELS * max(1, len(found)), REAL_PIXELS))
    for i, path in enumerate(found):
        strip.paste(read_crop(path, REAL_PIXELS), (i * REAL_PIXELS, 0))
    return strip
