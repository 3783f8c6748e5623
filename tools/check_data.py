"""Check the images of a data set before a training: count them by class, and name damaged and unusual ones.

    python -m tools.check_data inat/train_mini --hierarchy inat2021 --compare inat/val --json findings.json

Every image is decoded completely, in parallel. The folder is read as train.py reads it: superclass/class/*, class/*,
iNaturalist or VegFru as they unpack, or a list file of VegFru.
"""

import contextlib
import json
import os
import statistics
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

from PIL import Image

from dataset.images import ImageData, to_rgb
from hierarchy import Hierarchy
from runtime.cli import Parser, run_command
from runtime.files import atomic_write, sha256
from runtime.progress import progress_bar
from runtime.text import shorten

UNREADABLE = {  # finding: what a training does with such an image
    "unreadable": "not an image, or damaged: the next image of its class is shown",
    "truncated": "the file ends too early: the next image of its class is shown",
}
TOLERATED = {
    "small": "the short side is below --image-size: enlarged",
    "cmyk": "converted to RGB",
    "palette": "converted to RGB",
    "16-bit": "scaled to 8 bits",
    "animated": "the first frame is used",
    "transparent": "the alpha channel is dropped: transparent pixels show the colour stored under them",
    "rotated": "the EXIF orientation is ignored: shown as stored, turned or mirrored",
    "duplicate": "the same bytes as another image: both are used",
    "shared": "the same bytes as an image of --compare",
}
DESCRIPTION = f"""{__doc__.splitlines()[0]}

exit codes:
  0  no findings
  1  findings that a training tolerates: {", ".join(TOLERATED)}
  2  wrong flags, or a folder that is not a data set
  3  images that cannot be read: {", ".join(UNREADABLE)}
"""
EXAMPLES = """
python -m tools.check_data data/pets
python -m tools.check_data inat/train_mini --hierarchy inat2021 --compare inat/val --json findings.json
"""
OTHER_CLASS = ", which is another class"
ORIENTATION = 0x0112  # EXIF tag: 1 is upright, 2 to 8 are turned or mirrored


# ---- examination ---------------------------------------------------------------------------------


def examine(path: str | os.PathLike, image_size: int) -> dict[str, str]:
    """Return {finding: detail} for an image file."""
    found = {}
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # about odd metadata, or many pixels
            raw_modes = [image.mode, *(str(tile[3]) for tile in image.tile)]  # such as "RGB;16B", which opens as RGB
            if min(image.size) < image_size:
                found["small"] = f"{image.width} x {image.height}"
            if image.mode == "CMYK":
                found["cmyk"] = image.mode
            if image.mode in ("P", "PA"):
                found["palette"] = image.mode
            if any(";16" in mode or mode in ("I", "F") for mode in raw_modes):
                found["16-bit"] = raw_modes[-1]
            to_rgb(image)
            if has_transparent_pixels(image):
                found["transparent"] = image.mode
            if (turned := orientation(image)) != 1:
                found["rotated"] = f"orientation {turned}"
            if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photograph with a preview
                found["animated"] = image.format
    except Exception as error:  # decoders raise exceptions of many types
        kind = "truncated" if isinstance(error, EOFError) or "truncated" in str(error).lower() else "unreadable"
        found[kind] = f"{type(error).__name__}: {error}"
    return found


def has_transparent_pixels(image: Image.Image) -> bool:
    """Return whether a decoded image has a pixel that is not opaque, by its alpha channel, palette or a colour key."""
    least = 0
    with contextlib.suppress(ValueError):  # a mode that Pillow does not convert
        least = image.convert("RGBA").getextrema()[3][0] if image.has_transparency_data else 255
    return least < 255


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that a decoded image still needs, 1 to 8; Pillow applies that of a TIFF itself."""
    value = 1
    with contextlib.suppress(Exception):  # damaged EXIF data, which a training does not read
        value = image.getexif().get(ORIENTATION, 1)
    return value if value in range(2, 9) else 1


def examine_all(data: ImageData, workers: int, other: ImageData | None = None) -> dict[str, dict[int, str]]:
    """Return {finding: {index of an image: detail}} for all images, in their order.

    other: a data set to compare with, see `find_equal_files`
    """
    files = image_files(data)
    others = image_files(other) if other else []
    findings = {kind: {} for kind in UNREADABLE | TOLERATED}
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(examine, files, repeat(data.image_size), chunksize=16)
        for i, found in enumerate(progress_bar(results, total=len(files), unit="image")):
            for kind, detail in found.items():
                findings[kind][i] = detail
        readable = set(range(len(files))).difference(*(findings[kind] for kind in UNREADABLE))
        compared = find_equal_files(pool, files, sorted(readable), others)
    for own, theirs in compared:
        for i in own[1:]:
            other_class = data.labels[i] != data.labels[own[0]]
            findings["duplicate"][i] = data.paths[own[0]] + (OTHER_CLASS if other_class else "")
        for i in own if theirs else ():
            path, twin = Path(data.paths[i]), Path(other.paths[theirs[0]])
            other_class = path.parent.name != twin.parent.name
            findings["shared"][i] = str(twin) + (OTHER_CLASS if other_class else "")
    return findings


def image_files(data: ImageData) -> list[str]:
    return [os.path.join(data.root, path) for path in data.paths]


def find_equal_files(
    pool: ProcessPoolExecutor, files: Sequence[str], readable: Sequence[int], others: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Return (indices among `files`, indices among `others`) for each set of files with the same bytes.

    readable: indices of the `files` to compare
    """
    every, count = [*files, *others], len(files)
    same_size = group_equal({i: os.path.getsize(every[i]) for i in (*readable, *range(count, len(every)))})
    candidates = [i for group in same_size if group[0] < count for i in group]
    hashes = pool.map(sha256, [every[i] for i in candidates], chunksize=16)
    groups = group_equal(dict(zip(candidates, hashes)))
    return [([i for i in group if i < count], [i - count for i in group if i >= count]) for group in groups]


def group_equal(values: dict) -> list[list]:
    """Return the keys with equal values as lists of two or more."""
    groups = defaultdict(list)
    for key, value in values.items():
        groups[value].append(key)
    return [group for group in groups.values() if len(group) > 1]


# ---- report --------------------------------------------------------------------------------------


def count_images(data: ImageData, hierarchy: Hierarchy) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Return {class: number of images} and {superclass: {class: number of images}}."""
    number = Counter(data.labels.tolist())
    classes = {name: number[label] for label, name in enumerate(hierarchy.classes)}
    superclasses = {name: {} for name in hierarchy.superclasses}
    for (name, count), parent in zip(classes.items(), hierarchy.parents.tolist()):
        superclasses[hierarchy.superclasses[parent]][name] = count
    return classes, superclasses


def print_report(
    data: ImageData,
    classes: dict[str, int],
    superclasses: dict[str, dict[str, int]],
    findings: dict[str, dict[int, str]],
):
    """Print a table of the counts, then the warnings and the findings."""
    width = max(map(len, ["superclass", *superclasses]))
    print(f"{'superclass':{width}}  classes   images  per class: least  median  most")
    for name, members in {**superclasses, "all": classes}.items():
        each = sorted(members.values())
        middle = f"{statistics.median(each):g}"
        print(f"{name:{width}}  {len(each):7,}  {sum(each):7,}  {each[0]:16,}  {middle:>6}  {each[-1]:4,}")
    by_count = sorted(classes, key=classes.get)
    for word, names in (("fewest", by_count[:5]), ("most", by_count[:-6:-1])):
        print(f"{word} images: {', '.join(f'{name} ({classes[name]:,})' for name in names)}")
    for warning in data.warnings:
        print(warning)
    for kind, meaning in (UNREADABLE | TOLERATED).items():
        if at := findings[kind]:
            paired = kind in ("duplicate", "shared")
            names = [describe_pair(data.paths[i], twin) if paired else repr(data.paths[i]) for i, twin in at.items()]
            print(f"{len(names):,} {kind} ({meaning}): {shorten(names, str)}")
    if not any(findings.values()):
        print("No findings.")


def describe_pair(path: str, twin: str) -> str:
    """Return "'a.jpg' is 'b.jpg'"; `twin` may end with OTHER_CLASS."""
    name = twin.removesuffix(OTHER_CLASS)
    return f"{path!r} is {name!r}{twin[len(name) :]}"


def count_cores() -> int:
    """Return the number of CPU cores that this process may use; macOS reports all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_hierarchy(spec: str | None, folder: str) -> Hierarchy:
    """Return the hierarchy of --hierarchy, or else that of the folder."""
    return Hierarchy.load(spec) if spec else Hierarchy.from_folder(folder, allow_flat=True)


def main(argv: Sequence[str] | None = None):
    parser = Parser(description=DESCRIPTION, examples=EXAMPLES)
    add = parser.add_argument
    add("data_path", metavar="DIR", help="folder of images: superclass/class/*.jpg or class/*.jpg")
    add(
        "--hierarchy",
        help="inat2021, vegfru, a .json file or a folder of images; if not given, the data's own",
    )
    add("--image-size", type=int, default=256, help="pixels per side; smaller images are reported")
    add(
        "--num-workers",
        type=int,
        default=count_cores(),
        help="processes that decode images; if not given, one per core",
    )
    add(
        "--compare",
        metavar="DIR",
        help="another data set, such as the validation images: report images that are in both",
    )
    add("--json", metavar="FILE", help="file for the counts and all findings")
    args = parser.parse_args(argv)
    if args.num_workers < 1:
        raise ValueError(f"--num-workers is {args.num_workers}, expected at least 1.")

    hierarchy = open_hierarchy(args.hierarchy, args.data_path)
    data = ImageData(args.data_path, hierarchy, args.image_size)
    classes, superclasses = count_images(data, hierarchy)
    other = None
    if args.compare:
        own = open_hierarchy(args.hierarchy, args.compare)
        other = ImageData(args.compare, own, args.image_size)
    findings = examine_all(data, args.num_workers, other)
    print_report(data, classes, superclasses, findings)
    if args.json:
        record = {
            "root": str(data.root),
            "hierarchy": hierarchy.name,
            "image_size": args.image_size,
            "images": len(data),
            "superclasses": superclasses,
            "ignored": data.ignored,
            "warnings": data.warnings,
            "findings": {kind: {data.paths[i]: detail for i, detail in at.items()} for kind, at in findings.items()},
        }
        atomic_write(Path(args.json), lambda part: part.write_text(json.dumps(record, indent=1) + "\n"))
    sys.exit(3 if any(findings[kind] for kind in UNREADABLE) else int(any(findings.values())))


if __name__ == "__main__":
    run_command(main)
