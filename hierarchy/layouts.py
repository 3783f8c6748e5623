"""How data sets lie on the disk, name their classes and list their images; no image is opened here.

superclass/class/*.jpg                 two levels
class/*.jpg                            one level
NNNNN_Kingdom_..._epithet/*.jpg        iNaturalist, also in train_mini/ or val/
veg200_images/class/v_SS_NN_IIII.jpg   VegFru's release, with fru92_images/ and vegfru_list/
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from runtime.text import shorten

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif")
INAT_RANKS = ("number", "kingdom", "phylum", "class", "order", "family", "genus", "epithet")
INAT_NAME = re.compile(r"\d+(_[^_]+){7}")
INAT_FOLDERS = ("train_mini", "train", "val")
VEGFRU_FOLDERS = ("veg200_images", "fru92_images")
VEGFRU_LISTS = "vegfru_list"
VEGFRU_FILE = re.compile(r"([vf]_\d+)_\d+_\d+\.\w+")


def sorted_entries(path) -> list[os.DirEntry]:
    """Entries of a folder by name."""
    with os.scandir(path) as found:
        return sorted(found, key=lambda entry: entry.name)


def hidden(entry: os.DirEntry) -> bool:
    """.DS_Store, ._*, .ipynb_checkpoints"""
    return entry.name.startswith(".")


def visible_entries(path) -> list[os.DirEntry]:
    return [entry for entry in sorted_entries(path) if not hidden(entry)]


def entry_is(entry: os.DirEntry, kind: str) -> bool:
    """Whether an entry, or what it links to, is a "file" or "dir"; a link to nothing or to itself is neither."""
    if entry.is_symlink():
        return getattr(os.path, f"is{kind}")(entry.path)  # DirEntry raises where links go in a circle
    return getattr(entry, f"is_{kind}")()


def subfolders(path) -> list[str]:
    return [entry.name for entry in visible_entries(path) if entry_is(entry, "dir")]


def is_image(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith(IMAGE_SUFFIXES) and not hidden(entry) and entry_is(entry, "file")


def is_inat(names) -> bool:
    return bool(names) and all(INAT_NAME.fullmatch(name) for name in names)


def is_vegfru(root: Path) -> bool:
    return any((root / folder).is_dir() for folder in VEGFRU_FOLDERS)


def release_root(path: str | os.PathLike) -> Path:
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
        raise ValueError(f"{root} holds several image folders ({shorten(path.name for path in inner)}): pass one.")
    return inner[0] if inner else root


def has_two_levels(root: Path) -> bool:
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
    if not names and any(is_image(entry) for entry in visible_entries(root)):
        raise ValueError(
            f"{root} holds images but no folders; expected class/*.jpg or superclass/class/*.jpg, "
            "because the folder's name is the class."
        )
    if not names:
        raise ValueError(f"{root} has no class folders; expected class/*.jpg or superclass/class/*.jpg.")
    if has_two_levels(root):
        return [root / s / name for s in names for name in subfolders(root / s)]
    return [root / name for name in names]


def check_unique_folders(folders: list[Path]):
    """ValueError if two of the class folders have one name."""
    first = {}
    for folder in folders:
        other = first.setdefault(folder.name, folder)
        if other is not folder:
            raise ValueError(
                f"Class {folder.name!r} is in {other.parent} and in {folder.parent}: rename one, "
                "or pass one of the two if they are splits."
            )


# ---- images --------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """The images of a data set, by class and within a class by name.

    root     folder of the classes or superclasses, or of the VegFru release
    names    path of each image below `root`, with "/"; no line breaks
    labels   label of each image
    ignored  paths below `root` of what was passed over: hidden entries, what is no image in a class
             folder, images outside of one, links to nothing
    """

    root: Path
    names: list[str]
    labels: list[int]
    ignored: list[str]


def list_files(path: str | os.PathLike, hierarchy) -> Listing:
    """The images under `path`, with the labels of a `Hierarchy`.

    `path` is `superclass/class/*`, `class/*`, iNaturalist or VegFru as they unpack, or one of the
    lists of VegFru (`vegfru_list/vegfru_val.txt`). VegFru's folder stands for its train list if
    the lists are there, else for all images. Classes are matched by name, or by the number at the
    head of an iNaturalist name if the hierarchy has only numbers; superclasses are the
    hierarchy's, whatever folder the class lies in.
    """
    path, root = Path(path), release_root(path)
    train = root / VEGFRU_LISTS / "vegfru_train.txt"
    if path.is_file() or is_vegfru(root) and train.is_file():
        listing = list_vegfru(path if path.is_file() else train, root, hierarchy)
    else:
        listing = list_class_folders(root, class_folders(root), hierarchy)
    broken = [name for name in listing.names if "\n" in name]
    if broken:
        raise ValueError(
            f"{root} has a line break in the path of {len(broken)} of its images ({shorten(broken)}), expected names of one "
            "line: rename them."
        )
    return listing


def list_class_folders(root: Path, folders: list[Path], hierarchy) -> Listing:
    check_unique_folders(folders)
    root = root if is_vegfru(root) else image_root(root)
    label = labels_by_folder([folder.name for folder in folders], hierarchy, root)
    names, labels, ignored = [], [], []
    for above in sorted({root, *(folder.parent for folder in folders)}):
        ignored += [entry.path for entry in sorted_entries(above) if hidden(entry) or is_image(entry)]
    for folder in sorted(folders, key=lambda folder: label[folder.name]):
        found = {entry.name: is_image(entry) for entry in sorted_entries(folder)}
        if not any(found.values()):
            raise ValueError(
                f"Class folder {folder} has no images in it ({', '.join(IMAGE_SUFFIXES)}): "
                "add some or remove it from folder and hierarchy."
            )
        below = folder.relative_to(root).as_posix()
        names += [f"{below}/{name}" for name, image in found.items() if image]
        ignored += [folder / name for name, image in found.items() if not image]
        labels += [label[folder.name]] * sum(found.values())
    return Listing(root, names, labels, [Path(path).relative_to(root).as_posix() for path in ignored])


def list_vegfru(path: Path, root: Path, hierarchy) -> Listing:
    images = sorted(image for image, _ in read_vegfru_list(path))
    missing = [str(image) for image in images if not (root / image).is_file()]
    if missing or not images:
        raise ValueError(
            f"{path} names {len(images)} images, of which {root} lacks {len(missing)} "
            f"({shorten(missing)}): unpack the VegFru release again."
        )
    label = labels_by_folder(list({image.parent.name: 0 for image in images}), hierarchy, path)
    images.sort(key=lambda image: label[image.parent.name])
    return Listing(root, [image.as_posix() for image in images], [label[image.parent.name] for image in images], [])


def labels_by_folder(names: list[str], hierarchy, root: Path) -> dict[str, int]:
    """Folder name -> label; names and classes must be the same set."""
    index = {name: i for i, name in enumerate(hierarchy.classes)}
    key = {name: name for name in names}
    if hierarchy.numbered:
        key = {name: name.split("_")[0] for name in names}
    unknown = [name for name in names if key[name] not in index]
    if unknown:
        raise ValueError(
            f"{root} has {len(unknown)} class folders that {hierarchy.name} lacks "
            f"({shorten(unknown)}): remove them or pass the --hierarchy that has them."
        )
    missing = sorted(index.keys() - set(key.values()), key=index.get)
    if missing:
        raise ValueError(
            f"{root} lacks {len(missing)} of the {hierarchy.num_classes} classes of "
            f"{hierarchy.name} ({shorten(missing)}): add their images or pass a smaller --hierarchy."
        )
    return {name: index[key[name]] for name in names}


def sorted_as_text(names) -> bool:
    """True if the names begin with numbers of unequal length that are not in order, such as 1, 10, 2."""
    heads = [re.match(r"\d+", name) for name in names]
    if not all(heads):
        return False
    numbers = [head[0] for head in heads]
    return len({len(number) for number in numbers}) > 1 and sorted(numbers, key=int) != numbers


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
        files = [VEGFRU_FILE.fullmatch(entry.name) for entry in visible_entries(folder)]
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
    found = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        words = line.rsplit(maxsplit=1)
        if words and not (len(words) == 2 and words[1].isdecimal()):
            raise ValueError(
                f"{path} is not a list of VegFru (line {number}: {line[:80]!r}); expected lines such as "
                "'veg200_images/carrot/v_13_01_0001.jpg 12'."
            )
        if words:
            found.append((Path(*Path(words[0]).parts[-3:]), int(words[1])))
    return found


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


def folder_names(names):
    """Class names as names of folders, one for each: what a file system would not take is replaced, twins get their label."""
    plain = ["".join("_" if c in "/\\:\0" else c for c in name).strip(". ") or "_" for name in names]
    twins = {name for name, count in Counter(plain).items() if count > 1}
    return [f"{name}-{label}" if name in twins else name for label, name in enumerate(plain)]
