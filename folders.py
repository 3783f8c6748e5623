"""How data sets lie on the disk and name their classes; no image is opened here.

superclass/class/*.jpg                 two levels
class/*.jpg                            one level
NNNNN_Kingdom_..._epithet/*.jpg        iNaturalist, also in train_mini/ or val/
veg200_images/class/v_SS_NN_IIII.jpg   VegFru's release, with fru92_images/ and vegfru_list/
"""

import os
import re
from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif")
INAT_RANKS = ("number", "kingdom", "phylum", "class", "order", "family", "genus", "epithet")
INAT_NAME = re.compile(r"\d+(_[^_]+){7}")
INAT_FOLDERS = ("train_mini", "train", "val")
VEGFRU_FOLDERS = ("veg200_images", "fru92_images")
VEGFRU_LISTS = "vegfru_list"
VEGFRU_FILE = re.compile(r"([vf]_\d+)_\d+_\d+\.\w+")


def few(names, limit: int = 3) -> str:
    """'a', 'b', 'c' and 7 more"""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + rest


def visible(path) -> list[os.DirEntry]:
    """Entries of a folder by name, without hidden ones (.DS_Store, ._*, .ipynb_checkpoints)."""
    with os.scandir(path) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def subfolders(path) -> list[str]:
    return [entry.name for entry in visible(path) if entry.is_dir()]


def is_image(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file()


def is_inat(names) -> bool:
    return bool(names) and all(INAT_NAME.fullmatch(name) for name in names)


def is_vegfru(root: Path) -> bool:
    return any((root / folder).is_dir() for folder in VEGFRU_FOLDERS)


def unpacked(path: str | os.PathLike) -> Path:
    """The folder that a --data-path means: itself, or that of the release for a list of VegFru."""
    path = Path(path)
    if path.is_dir():
        return path
    if path.suffix == ".txt" and path.is_file() and is_vegfru(path.absolute().parent.parent):
        return path.absolute().parent.parent
    if path.exists():
        raise ValueError(f"{path} is a file; expected a folder of images or a list of the VegFru release.")
    raise ValueError(f"There is no image folder {str(path)!r}: pass an existing --data-path.")


def image_root(root: Path) -> Path:
    """The folder that holds the class or superclass folders: `root`, or the `train_mini` in it."""
    inner = [root / name for name in INAT_FOLDERS if (root / name).is_dir()]
    inner = [path for path in inner if is_inat(subfolders(path))]
    if len(inner) > 1:
        raise ValueError(f"{root} holds several image folders ({few(path.name for path in inner)}): pass one.")
    return inner[0] if inner else root


def two_levels(root: Path) -> bool:
    """True for `superclass/class/*.jpg`, False for `class/*.jpg`; a mixture is a ValueError."""
    names = subfolders(root)
    if is_inat(names):
        return False
    deep = [name for name in names if subfolders(root / name)]
    if deep and len(deep) < len(names):
        flat = next(name for name in names if name not in deep)
        raise ValueError(
            f"{root}: {deep[0]!r} has folders in it and {flat!r} has none; "
            "expected superclass/class/*.jpg or class/*.jpg throughout."
        )
    return bool(deep)


def class_folders(root: Path) -> list[Path]:
    """The class folders under `root` in any of the layouts, sorted by path."""
    if is_vegfru(root):
        return [root / f / name for f in VEGFRU_FOLDERS if (root / f).is_dir() for name in subfolders(root / f)]
    root = image_root(root)
    names = subfolders(root)
    if not names and any(is_image(entry) for entry in visible(root)):
        raise ValueError(
            f"{root} holds images but no folders; expected class/*.jpg or superclass/class/*.jpg, "
            "because the folder's name is the class."
        )
    if not names:
        raise ValueError(f"{root} has no class folders; expected class/*.jpg or superclass/class/*.jpg.")
    if two_levels(root):
        return [root / s / name for s in names for name in subfolders(root / s)]
    return [root / name for name in names]


def check_once(folders: list[Path]):
    """ValueError if two of the class folders have one name."""
    first = {}
    for folder in folders:
        other = first.setdefault(folder.name, folder)
        if other is not folder:
            raise ValueError(
                f"Class {folder.name!r} is in {other.parent} and in {folder.parent}: rename one, "
                "or pass one of the two if they are splits."
            )


# ---- iNaturalist ---------------------------------------------------------------------------------


def inat_superclass(rule, class_name: str) -> str:
    """The superclass of the first (rank, value, superclass) of the rule that fits the name."""
    if not INAT_NAME.fullmatch(class_name):
        raise ValueError(
            f"{class_name!r} is not an iNaturalist directory name; expected 8 parts, "
            "NNNNN_Kingdom_Phylum_Class_Order_Family_Genus_epithet."
        )
    taxon = dict(zip(INAT_RANKS, class_name.split("_")))
    found = [superclass for rank, value, superclass in rule if taxon[rank] == value]
    if not found:
        raise ValueError(
            f"{class_name!r} is of kingdom {taxon['kingdom']!r}, for which no superclass is known; "
            "pass a hierarchy as JSON."
        )
    return found[0]


def annotation_names(categories, path: Path) -> list[str]:
    """Directory names, by category id, of an iNaturalist 2021 annotation file."""
    try:
        categories = sorted(categories, key=lambda c: c["id"])
        return [c.get("image_dir_name") or taxon_name(c) for c in categories]
    except (TypeError, KeyError):
        raise ValueError(
            f"{path}: its categories lack 'id' or both 'image_dir_name' and the ranks; expected "
            "an annotation file of iNaturalist 2021 (train_mini.json, val.json)."
        ) from None


def taxon_name(category: dict) -> str:
    ranks = [category[rank] for rank in (*INAT_RANKS[1:-1], "specific_epithet")]
    return "_".join([f"{category['id']:05d}", *ranks])


# ---- VegFru --------------------------------------------------------------------------------------


def vegfru_prefixes(root: Path, known: list[str]) -> dict[str, str]:
    """Class -> `v_SS` or `f_SS` (one of `known`), from its files and checked against the lists."""
    prefix = {}
    for folder in class_folders(root):
        files = [VEGFRU_FILE.fullmatch(entry.name) for entry in visible(folder)]
        found = sorted({match[1] for match in files if match})
        if len(found) != 1 or found[0] not in known:
            raise ValueError(
                f"{folder} has files with the prefixes {found}; expected one of {known[0]} to "
                f"{known[-1]} throughout, as in the VegFru release."
            )
        prefix[folder.name] = found[0]
    for path in sorted((root / VEGFRU_LISTS).glob("supvegfru_*.txt")):
        check_vegfru_list(path, prefix, known)
    return prefix


def read_vegfru_list(path: Path) -> list[tuple[Path, int]]:
    """(`veg200_images/class/file`, label) of every line; the label base differs by release."""
    lines = [line.rsplit(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
    try:
        return [(Path(*Path(image).parts[-3:]), int(label)) for image, label in lines]
    except ValueError:
        raise ValueError(
            f"{path} is not a list of VegFru; expected lines such as 'veg200_images/carrot/v_13_01_0001.jpg 12'."
        ) from None


def check_vegfru_list(path: Path, prefix: dict[str, str], known: list[str]):
    """The superclass labels of the list, less their minimum, must be the prefixes' order."""
    entries = [(image.parent.name, label) for image, label in read_vegfru_list(path)]
    entries = [(name, label) for name, label in dict.fromkeys(entries) if name in prefix]
    used = [p for p in known if p in {prefix[name] for name, _ in entries}]
    labels = sorted({label for _, label in entries})
    for name, label in entries:
        if labels.index(label) != used.index(prefix[name]):
            raise ValueError(
                f"{path} gives {name!r} the superclass label {label}, which disagrees with the "
                f"prefix {prefix[name]} of its files: restore the files of the VegFru release."
            )
