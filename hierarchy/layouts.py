"""Read the folder layouts of data sets; no image is opened here.

superclass/class/*.jpg                 two levels
superclass/.../class/*.jpg             more levels, each a rank
class/*.jpg                            one level
NNNNN_Kingdom_..._epithet/*.jpg        iNaturalist, also in train_mini/, train/ or val/
veg200_images/class/v_SS_NN_IIII.jpg   VegFru's release, with fru92_images/ and vegfru_list/
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from runtime.files import LOCK_FILE
from runtime.text import shorten

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif")
INAT_RANKS = ("number", "kingdom", "phylum", "class", "order", "family", "genus", "epithet")
INAT_NAME = re.compile(r"\d+(_[^_]+){7}")
INAT_FOLDERS = ("train_mini", "train", "val")
RESERVED_NAMES = ("rows", "digests", "settings.json", "grid.png", LOCK_FILE)  # of files beside the folders of samples
VEGFRU_FOLDERS = ("veg200_images", "fru92_images")
VEGFRU_LISTS = "vegfru_list"
VEGFRU_FILE = re.compile(r"([vf]_\d+)_\d+_\d+\.\w+")


# ---- entries of a folder -------------------------------------------------------------------------


def sorted_entries(path: str | os.PathLike) -> list[os.DirEntry]:
    """Return the entries of a folder, sorted by name."""
    with os.scandir(path) as found:
        return sorted(found, key=lambda entry: entry.name)


def is_hidden(entry: os.DirEntry) -> bool:
    """Return True for .DS_Store, ._*, .ipynb_checkpoints and the like."""
    return entry.name.startswith(".")


def visible_entries(path: str | os.PathLike) -> list[os.DirEntry]:
    return [entry for entry in sorted_entries(path) if not is_hidden(entry)]


def entry_is(entry: os.DirEntry, kind: str) -> bool:
    """Return True if an entry, or the target of a link, is a "file" or "dir"; a broken or circular link is neither."""
    if entry.is_symlink():
        return getattr(os.path, f"is{kind}")(entry.path)  # DirEntry raises OSError for a circular link
    return getattr(entry, f"is_{kind}")()


def subfolders(path: str | os.PathLike) -> list[str]:
    """Return the names of the visible folders in a folder."""
    return [entry.name for entry in visible_entries(path) if entry_is(entry, "dir")]


def is_image(entry: os.DirEntry) -> bool:
    """Return True for a visible file whose name has the suffix of an image."""
    return entry.name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(entry) and entry_is(entry, "file")


# ---- class folders -------------------------------------------------------------------------------


def is_inat(names: Sequence[str]) -> bool:
    """Return True if all names, at least one, are iNaturalist directory names."""
    return bool(names) and all(INAT_NAME.fullmatch(name) for name in names)


def is_vegfru(root: Path) -> bool:
    """Return True if a folder is VegFru's release."""
    return any((root / folder).is_dir() for folder in VEGFRU_FOLDERS)


def release_root(path: str | os.PathLike) -> Path:
    """Return the folder of a --data-path: the path itself, or the release's folder for a list file of VegFru."""
    path = Path(path)
    if path.is_dir():
        return path
    if path.suffix == ".txt" and path.is_file() and is_vegfru(path.absolute().parent.parent):
        return path.absolute().parent.parent
    if path.exists():
        raise ValueError(f"{path} is a file, expected a folder of images or a list of the VegFru release.")
    raise ValueError(f"There is no image folder {str(path)!r}: pass an existing --data-path.")


def image_root(root: Path) -> Path:
    """Return the folder that holds the class or superclass folders: `root`, or iNaturalist's `train_mini` in it."""
    inner = [root / name for name in INAT_FOLDERS if (root / name).is_dir()]
    inner = [path for path in inner if is_inat(subfolders(path))]
    if len(inner) > 1:
        raise ValueError(f"{root} holds several image folders ({shorten(path.name for path in inner)}): pass one.")
    return inner[0] if inner else root


def class_folders(root: Path) -> list[Path]:
    """Return the class folders of a data set in any of the layouts, sorted by path."""
    if is_vegfru(root):
        return [root / f / name for f in VEGFRU_FOLDERS if (root / f).is_dir() for name in subfolders(root / f)]
    root = image_root(root)
    names = subfolders(root)
    if not names and any(is_image(entry) for entry in visible_entries(root)):
        raise ValueError(
            f"{root} holds images but no folders, expected class/*.jpg or superclass/class/*.jpg: put the images of each "
            "class into a folder of its name."
        )
    if not names:
        raise ValueError(f"{root} has no class folders, expected class/*.jpg or superclass/class/*.jpg.")
    folders, depth = [root / name for name in names], 1
    while not is_inat(names) and has_deeper_level(root, folders, depth):
        folders, depth = [folder / name for folder in folders for name in subfolders(folder)], depth + 1
    return folders


def has_deeper_level(root: Path, folders: Sequence[Path], depth: int) -> bool:
    """Return True if the folders `depth` levels below the root hold folders, and False if they are those of the classes.

    Below the first level, a level with images is that of the classes, whatever else it holds. Raises ValueError for a mixture.
    """
    if depth > 1 and any(is_image(entry) for folder in folders for entry in visible_entries(folder)):
        return False
    deep = [folder for folder in folders if subfolders(folder)]
    if deep and len(deep) < len(folders):
        flat = next(folder for folder in folders if folder not in set(deep))
        raise ValueError(
            f"{root}: {str(deep[0].relative_to(root))!r} has folders in it and {str(flat.relative_to(root))!r} has none, "
            "expected superclass/class/*.jpg or class/*.jpg throughout."
        )
    return bool(deep)


def check_unique_folders(folders: Iterable[Path]):
    """Raise ValueError if two class folders have the same name."""
    first = {}
    for folder in folders:
        other = first.setdefault(folder.name, folder)
        if other is not folder:
            raise ValueError(
                f"Class {folder.name!r} is in {other.parent} and in {folder.parent}: rename one, or pass only one of the "
                "two if they are splits."
            )


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Return a folder name for each class, unique and safe.

    Separators become "_". A name that several classes would get, or that is in RESERVED_NAMES, is followed by the label of
    the class, repeated until no class has that name.
    """
    plain = ["".join("_" if c in "/\\:\0" else c for c in name).strip(". ") or "_" for name in class_names]
    taken = {*plain, *RESERVED_NAMES}
    repeated = {name for name, count in Counter(plain).items() if count > 1}
    names = []
    for label, name in enumerate(plain):
        if name in repeated or name in RESERVED_NAMES:
            while name in taken:
                name += f"-{label}"
            taken.add(name)
        names.append(name)
    return names


# ---- iNaturalist ---------------------------------------------------------------------------------


def inat_superclass(rule: Iterable[Sequence[str]], class_name: str) -> str:
    """Return the superclass of an iNaturalist directory name: that of the first (rank, value, superclass) that fits."""
    if not INAT_NAME.fullmatch(class_name):
        raise ValueError(
            f"{class_name!r} is not an iNaturalist directory name, expected 8 parts, "
            "NNNNN_Kingdom_Phylum_Class_Order_Family_Genus_epithet."
        )
    taxon = dict(zip(INAT_RANKS, class_name.split("_")))
    for rank, value, superclass in rule:
        if taxon[rank] == value:
            return superclass
    raise ValueError(
        f"{class_name!r} is of kingdom {taxon['kingdom']!r}, which has no known superclass: pass a hierarchy as JSON."
    )


def annotation_names(categories: Iterable[dict], path: Path) -> list[str]:
    """Return the directory names, by category id, of the categories in an iNaturalist 2021 annotation file."""
    try:
        categories = sorted(categories, key=lambda category: category["id"])
        return [category.get("image_dir_name") or taxon_name(category) for category in categories]
    except (TypeError, KeyError):
        raise ValueError(
            f"{path}: its categories lack 'id' or both 'image_dir_name' and the ranks, expected an annotation file of "
            "iNaturalist 2021 (train_mini.json, val.json)."
        ) from None


def taxon_name(category: dict) -> str:
    ranks = [category[rank] for rank in (*INAT_RANKS[1:-1], "specific_epithet")]
    return "_".join([f"{category['id']:05d}", *ranks])


# ---- VegFru --------------------------------------------------------------------------------------


def vegfru_prefixes(root: Path, known: Sequence[str]) -> dict[str, str]:
    """Return {class: prefix}, with a prefix `v_SS` or `f_SS` from its files, among `known` and as in the lists."""
    prefix_of = {}
    for folder in class_folders(root):
        files = [VEGFRU_FILE.fullmatch(entry.name) for entry in visible_entries(folder)]
        found = sorted({match[1] for match in files if match})
        if len(found) != 1 or found[0] not in known:
            raise ValueError(
                f"{folder} has files with the prefixes {found}, expected one of {known[0]} to {known[-1]} throughout, as in "
                "the VegFru release."
            )
        prefix_of[folder.name] = found[0]
    for path in sorted((root / VEGFRU_LISTS).glob("supvegfru_*.txt")):
        check_vegfru_list(path, prefix_of, known)
    return prefix_of


def read_vegfru_list(path: Path) -> list[tuple[Path, int]]:
    """Return (`veg200_images/class/file`, label) for every line; the smallest label differs between releases."""
    found = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        words = line.rsplit(maxsplit=1)
        if words and not (len(words) == 2 and words[1].isdecimal()):
            raise ValueError(
                f"{path} is not a list of VegFru (line {number}: {line[:80]!r}), expected lines such as "
                "'veg200_images/carrot/v_13_01_0001.jpg 12'."
            )
        if words:
            found.append((Path(*Path(words[0]).parts[-3:]), int(words[1])))
    return found


def check_vegfru_list(path: Path, prefix_of: dict[str, str], known: Sequence[str]):
    """Raise ValueError unless the superclass labels of a list, by size, are in the order of the prefixes."""
    entries = [(image.parent.name, label) for image, label in read_vegfru_list(path)]
    entries = [(name, label) for name, label in dict.fromkeys(entries) if name in prefix_of]
    used = [prefix for prefix in known if prefix in {prefix_of[name] for name, _ in entries}]
    labels = sorted({label for _, label in entries})
    for name, label in entries:
        if labels.index(label) != used.index(prefix_of[name]):
            raise ValueError(
                f"{path} gives {name!r} the superclass label {label}, but its files have the prefix {prefix_of[name]}: "
                "restore the files of the VegFru release."
            )
