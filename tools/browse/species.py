"""The species of a model as the page shows them: names, ranks and real images."""

from pathlib import Path

from PIL import Image

from dataset.images import read_crop
from dataset.listing import match_classes
from hierarchy import Hierarchy, names
from hierarchy.layouts import class_folders, is_image, is_inat, visible_entries
from hierarchy.ranks import inat_ranks
from sampling.grid import caption

REAL_IMAGES, REAL_PIXELS = 6, 192  # images in a strip of real ones, pixels per side of each


def name_pairs(hierarchy: Hierarchy) -> list[tuple[str, str]]:
    """Return the scientific and the common name of each class; "" if no common one is known."""
    common = dict(names.read_names())
    return [(caption(full), common.get(full, "")) for full in names.full_names(hierarchy)]


def known_ranks(hierarchy: Hierarchy) -> list[dict]:
    """Return the ranks above the classes, from coarse to fine: their name, their nodes, and the node of each class.

    A hierarchy with superclasses alone gets the ranks in iNaturalist's names, if its classes have such names.
    """
    full = names.full_names(hierarchy)
    more = inat_ranks(full) if is_inat(full) and not hierarchy.ranks else []
    known = [rank for rank in (*hierarchy.tiers, *more) if rank.of_class is not None and len(rank.nodes) > 1]
    return [dict(name=rank.name, nodes=rank.nodes, of=rank.of_class.tolist()) for rank in known]


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
