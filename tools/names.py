"""Store the scientific and common names of iNaturalist's species, for --classes and --list.

    python -m tools.names inat2021

The names come from an annotation file of iNaturalist 2021, such as val.json.tar.gz, which is downloaded unless --file names
one. They go into a cache in the home folder, see hierarchy/names.py; then every command knows them, as in
`sample.py --classes "red fox"`. Classes and superclasses stay as they are.
"""

import argparse
import hashlib
import json
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checkpoint.download import download_file
from hierarchy import Hierarchy
from hierarchy.layouts import annotation_names
from hierarchy.names import write_names
from runtime.cli import Parser, run_command
from runtime.text import one_line

URL = "https://ml-inat-competition-datasets.s3.amazonaws.com/2021/val.json.tar.gz"
MD5 = "4d761e0f6a86cc63e8f7afc91f6a8f0b"
LARGEST = 1 << 30  # bytes of an unpacked annotation file
EXAMPLES = """
python -m tools.names inat2021
python -m tools.names inat2021 --file val.json.tar.gz
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    parser.add_argument("dataset", choices=["inat2021"], help="the data set whose names to store")
    parser.add_argument("--file", help="annotation file, .json or .json.tar.gz; if not given, it is downloaded")
    return parser.parse_args(argv)


def read_annotations(path: Path) -> list[dict]:
    """Return the categories in an annotation file, .json or .json.tar.gz. Raises ValueError if it has none."""
    try:
        if path.suffix == ".json":
            record = json.loads(path.read_bytes())
        else:
            with tarfile.open(path) as archive:
                member = next((each for each in archive if each.isfile() and each.name.endswith(".json")), None)
                if member is None or member.size > LARGEST:
                    raise ValueError("it holds no .json file")
                record = json.loads(archive.extractfile(member).read())
        return record["categories"]
    except (ValueError, KeyError, TypeError, RecursionError, tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{path} is not an annotation file ({one_line(error)}), expected val.json.tar.gz of iNaturalist 2021: download it "
            f"from {URL}."
        ) from None


def download_annotations(folder: Path) -> Path:
    """Download the published annotation file into a folder and return its path. Raises ValueError if that fails."""
    path = folder / URL.rsplit("/", 1)[1]
    advice = "fetch it elsewhere and pass its path as --file"
    download_file(URL, path, advice=advice)
    found = hashlib.md5(path.read_bytes()).hexdigest()
    if found != MD5:
        raise ValueError(f"{URL} has the MD5 {found}, expected {MD5}: {advice}.")
    return path


def store_names(path: Path) -> tuple[Path, int]:
    """Store the names in an annotation file; return the path of the cache and the number of classes with a common name.

    Raises ValueError if the file is not of iNaturalist 2021.
    """
    categories = read_annotations(path)
    folders, built_in = annotation_names(categories, path), Hierarchy.load("inat2021")
    found = Hierarchy.from_class_names(folders, "inat2021")
    if found.superclasses != built_in.superclasses or not found.parents.equal(built_in.parents):
        raise ValueError(
            f"{path} has {len(folders)} categories, expected the {built_in.num_classes:,} of iNaturalist 2021 in their order: "
            f"download it from {URL}."
        )
    common = {category["id"]: category.get("common_name") or "" for category in categories}
    names = list(zip(folders, (common[number] for number in sorted(common))))
    return write_names(names), sum(bool(name) for _, name in names)


def main(argv: Sequence[str] | None = None):
    args = parse_args(argv)
    if args.file:
        path, count = store_names(Path(args.file))
    else:
        with tempfile.TemporaryDirectory() as folder:
            path, count = store_names(download_annotations(Path(folder)))
    print(f"names of {Hierarchy.load('inat2021').num_classes:,} species, {count:,} with a common name, in {path}")


if __name__ == "__main__":
    run_command(main)
