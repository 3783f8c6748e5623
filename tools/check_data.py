"""Look through the images of a data set before a training: how many each class has, and which are damaged or unusual.

    python -m tools.check_data inat/train_mini --hierarchy inat2021 --json findings.json

Every image is decoded to its last pixel, in parallel. The folder is read as train.py reads it: superclass/class/*,
class/*, iNaturalist or VegFru as they unpack, or one of the lists of VegFru.
"""

import argparse
import json
import os
import statistics
import sys
import warnings
from collections import Counter, defaultdict
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

UNREADABLE = {  # finding: what a training makes of such an image
    "unreadable": "no image, or damaged: the next of its class is shown",
    "truncated": "the file ends too early: the next of its class is shown",
}
TOLERATED = {
    "small": "the short side is below --image-size: enlarged",
    "cmyk": "converted to RGB",
    "palette": "converted to RGB",
    "16-bit": "scaled to 8 bits",
    "animated": "the first frame is used",
    "duplicate": "the bytes of another image: shown as often as it is there",
}
MOST_WORKERS = len(os.sched_getaffinity(0))
CODES = f"""exit codes:
  0  nothing found
  1  findings that a training tolerates: {", ".join(TOLERATED)}
  2  wrong flags, or a folder that is no data set
  3  images that cannot be read: {", ".join(UNREADABLE)}
"""


# ---- one image -----------------------------------------------------------------------------------


def examine(path, image_size):
    """{finding: detail} of an image file."""
    found = {}
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # of odd metadata, or many pixels
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
    except Exception as error:  # decoders raise all sorts of them at a damaged file
        kind = "truncated" if isinstance(error, EOFError) or "truncated" in str(error).lower() else "unreadable"
        found[kind] = f"{type(error).__name__}: {error}"
    return found


# ---- all images ----------------------------------------------------------------------------------


def examine_all(data, workers):
    """{finding: {number of an image: detail}}, in the order of the images."""
    paths = [os.path.join(data.root, name) for name in data.names]
    findings = {kind: {} for kind in UNREADABLE | TOLERATED}
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(examine, paths, repeat(data.image_size), chunksize=16)
        for i, found in enumerate(tqdm(results, total=len(paths), unit="image")):
            for kind, detail in found.items():
                findings[kind][i] = detail
        broken = {i for kind in UNREADABLE for i in findings[kind]}
        same_size = groups({i: os.path.getsize(path) for i, path in enumerate(paths) if i not in broken})
        twice = [i for group in same_size for i in group]
        hashes = pool.map(sha256, [paths[i] for i in twice], chunksize=16)
        for first, *others in groups(dict(zip(twice, hashes))):
            for i in others:
                other_class = data.labels[i] != data.labels[first]
                findings["duplicate"][i] = data.name(first) + (", which is another class" if other_class else "")
    return findings


def groups(values):
    """Keys of {key: value} that share a value, for those values that several share."""
    keys = defaultdict(list)
    for key, value in values.items():
        keys[value].append(key)
    return [group for group in keys.values() if len(group) > 1]


# ---- what is said --------------------------------------------------------------------------------


def counts(data, hierarchy):
    """({class: images}, {superclass: {class: images}})"""
    number = Counter(data.labels.tolist())
    classes = {name: number[label] for label, name in enumerate(hierarchy.classes)}
    superclasses = {name: {} for name in hierarchy.superclasses}
    for (name, count), parent in zip(classes.items(), hierarchy.parents.tolist()):
        superclasses[hierarchy.superclasses[parent]][name] = count
    return classes, superclasses


def say(data, classes, superclasses, findings):
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
            print(f"{len(findings[kind]):,} {kind} ({meaning}): {shorten(data.name(i) for i in findings[kind])}")
    if not any(findings.values()):
        print("Nothing found.")


def main(argv=None):
    parser = Parser(
        description=__doc__.split("\n")[0], epilog=CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data_path", metavar="DIR", help="folder of images, see folders.py")
    add("--hierarchy", help="inat2021, vegfru, a .json file or a folder (default: the data's own)")
    add("--image-size", type=int, default=256, help="smaller images are reported (default %(default)s)")
    add("--num-workers", type=int, default=MOST_WORKERS, help="processes (default: one a core, %(default)s)")
    add("--json", metavar="FILE", help="write the counts and every finding there")
    args = parser.parse_args(argv)
    if args.num_workers < 1:
        raise ValueError(f"--num-workers is {args.num_workers}, expected at least 1: change it.")

    hierarchy = Hierarchy.load(args.hierarchy) if args.hierarchy else Hierarchy.from_folder(args.data_path)
    data = ImageData(args.data_path, hierarchy, args.image_size)
    classes, superclasses = counts(data, hierarchy)
    findings = examine_all(data, args.num_workers)
    say(data, classes, superclasses, findings)
    if args.json:
        record = {
            "root": str(data.root),
            "hierarchy": hierarchy.name,
            "image_size": args.image_size,
            "images": len(data),
            "superclasses": superclasses,
            "ignored": data.ignored,
            "warnings": data.warnings,
            "findings": {kind: {data.name(i): detail for i, detail in at.items()} for kind, at in findings.items()},
        }
        atomic_write(Path(args.json), lambda part: part.write_text(json.dumps(record, indent=1) + "\n"))
    sys.exit(3 if any(findings[kind] for kind in UNREADABLE) else int(any(findings.values())))


if __name__ == "__main__":
    run_command(main)
