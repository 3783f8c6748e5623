"""Check the images of a data set before a training: count them by class, and name damaged and unusual ones.

    python -m tools.check_data inat/train_mini --hierarchy inat2021 --json findings.json

Every image is decoded completely, in parallel. The folder is read as train.py reads it: superclass/class/*, class/*,
iNaturalist or VegFru as they unpack, or a list file of VegFru.
"""

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
from tqdm import tqdm

from dataset.images import ImageData, to_rgb
from hierarchy import Hierarchy
from runtime.cli import Parser, run_command
from runtime.files import atomic_write, sha256
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
    "duplicate": "the same bytes as another image: both are used",
}
CORES = len(os.sched_getaffinity(0))
DESCRIPTION = f"""{__doc__.splitlines()[0]}

exit codes:
  0  no findings
  1  findings that a training tolerates: {", ".join(TOLERATED)}
  2  wrong flags, or a folder that is not a data set
  3  images that cannot be read: {", ".join(UNREADABLE)}
"""
EXAMPLES = """
python -m tools.check_data data/pets
python -m tools.check_data inat/train_mini --hierarchy inat2021 --json findings.json
"""


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
            if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photograph with a preview
                found["animated"] = image.format
    except Exception as error:  # decoders raise exceptions of many types
        kind = "truncated" if isinstance(error, EOFError) or "truncated" in str(error).lower() else "unreadable"
        found[kind] = f"{type(error).__name__}: {error}"
    return found


def examine_all(data: ImageData, workers: int) -> dict[str, dict[int, str]]:
    """Return {finding: {index of an image: detail}} for all images, in their order."""
    files = [os.path.join(data.root, path) for path in data.paths]
    findings = {kind: {} for kind in UNREADABLE | TOLERATED}
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(examine, files, repeat(data.image_size), chunksize=16)
        for i, found in enumerate(tqdm(results, total=len(files), unit="image")):
            for kind, detail in found.items():
                findings[kind][i] = detail
        readable = set(range(len(files))).difference(*(findings[kind] for kind in UNREADABLE))
        same_size = group_equal({i: os.path.getsize(files[i]) for i in sorted(readable)})
        candidates = [i for group in same_size for i in group]
        hashes = pool.map(sha256, [files[i] for i in candidates], chunksize=16)
        for first, *others in group_equal(dict(zip(candidates, hashes))):
            for i in others:
                other_class = data.labels[i] != data.labels[first]
                findings["duplicate"][i] = data.paths[first] + (", which is another class" if other_class else "")
    return findings


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
        if findings[kind]:
            print(f"{len(findings[kind]):,} {kind} ({meaning}): {shorten(data.paths[i] for i in findings[kind])}")
    if not any(findings.values()):
        print("No findings.")


def main(argv: Sequence[str] | None = None):
    parser = Parser(description=DESCRIPTION, examples=EXAMPLES)
    add = parser.add_argument
    add("data_path", metavar="DIR", help="folder of images: superclass/class/*.jpg, or class/*.jpg with --hierarchy")
    add(
        "--hierarchy",
        help="inat2021, vegfru, a .json file or a folder of images; if not given, the data's own",
    )
    add("--image-size", type=int, default=256, help="pixels per side; smaller images are reported")
    add("--num-workers", type=int, default=CORES, help="processes that decode images; if not given, one per core")
    add("--json", metavar="FILE", help="file for the counts and all findings")
    args = parser.parse_args(argv)
    if args.num_workers < 1:
        raise ValueError(f"--num-workers is {args.num_workers}, expected at least 1.")

    hierarchy = Hierarchy.load(args.hierarchy) if args.hierarchy else Hierarchy.from_folder(args.data_path)
    data = ImageData(args.data_path, hierarchy, args.image_size)
    classes, superclasses = count_images(data, hierarchy)
    findings = examine_all(data, args.num_workers)
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
