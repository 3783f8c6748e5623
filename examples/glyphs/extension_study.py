"""Classes added later: new rows alone, all parameters, or training from the start, with few images per new class.

    python -m examples.glyphs.extension_study --data quickstart --out extension --train "--resume BASE ..."

`make study-extension` runs it with the settings of the quick start. Adds the eight classes of `draw --set more` to the quick
start's adapter of 48, from 1, 5 and 39 images per class and with several seeds. `train.py --extend --train rows` and
`--train all` see the new images alone; the third way trains a model of 56 classes from the base on all images. A classifier
of 56 classes reads samples of the new and of the old classes: the latter show forgetting. The same command resumes.
Writes extension.json and extension.md.
"""

import argparse
import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from autoencoder import load_autoencoder
from checkpoint.format import read_description
from evaluation.metrics import features_root, frechet_distance
from examples.glyphs import draw, read, study
from guidance import Guidance
from hierarchy import Hierarchy
from runtime.cli import Parser, run_command
from runtime.files import atomic_write
from runtime.progress import progress_bar
from runtime.text import markdown_table

BEFORE = "before"
WAYS = ("rows", "all", "from the start")
SCALE = 2.0
EXTEND = [  # flags of train.py --extend
    *("--no-flip", "--num-workers", 0, "--global-batch-size", 8, "--ema-decay", 0.99, "--lr-schedule", "cosine"),
    *("--lr", 1e-3, "--table-lr", 1e-2, "--preview-images", 0),
]
EXAMPLES = """
    make study-extension
    python -m examples.glyphs.extension_study --data quickstart --out extension --images 1 --train "--resume BASE"
"""

Job = tuple[str, int, int]  # way, images per new class, seed


def link_classes(out: Path, *folders: Path):
    """Make a folder with links to the class folders of others, superclass/class."""
    for folder in folders:
        for path in sorted(folder.glob("*/*")):
            link = out / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(path.resolve())


def train(args: argparse.Namespace, adapter: Path, job: Job) -> Path:
    """Train in one way, or resume or skip a run that exists; return its adapter. adapter: the one to extend"""
    way, images, seed = job
    new, folder = args.out / f"data/{images}-{seed}", study.run_folder(args.out, f"{way} {images}", seed)
    flags = ["--results-dir", folder.parent, "--experiment", folder.name, "--global-seed", seed]
    if way == "from the start":
        both = args.out / f"data/all-{images}-{seed}"
        link_classes(both, args.data / "train", new)
        study.run("train.py", *shlex.split(args.train), "--data-path", both, "--preview-images", 0, *flags)
    else:
        flags += ["--extend", "--resume", adapter, "--train", way, "--max-steps", args.steps]
        study.run("train.py", *EXTEND, "--data-path", new, *flags)
    return study.newest_adapter(folder)


class Judge:
    """A classifier of all 56 classes, which measures samples of the old and of the new classes of an adapter."""

    def __init__(self, args: argparse.Namespace):
        for name, held_out, count in (("more", False, 39), ("more-held-out", True, 6)):
            draw.write_images_once(args.out / name, "more", held_out, count, seed=0)
        link_classes(args.out / "train", args.data / "train", args.out / "more")
        link_classes(args.out / "held-out", args.data / "held-out", args.out / "more-held-out")
        self.hierarchy = Hierarchy.load(args.out / "train")
        images, labels = read.load_images(args.out / "train", self.hierarchy)
        self.features, self.reader = read.train_reader(images, labels, self.hierarchy.num_classes)
        added = set(Hierarchy.load(args.out / "more").classes)
        self.is_new = torch.tensor([name in added for name in self.hierarchy.classes])
        images, labels = read.load_images(args.out / "held-out", self.hierarchy)
        self.real = {
            new: features_root(read.run_network(self.features, images[self.is_new[labels] == new]))
            for new in (False, True)
        }
        self.of_real = self.measure(images, labels)
        self.autoencoder = load_autoencoder("examples/glyphs/vae")

    def measure(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Return accuracy and Frechet distance of the old and of the new classes; labels: of the judge's hierarchy."""
        found = {}
        for part, new in (("old", False), ("new", True)):
            which = self.is_new[labels] == new
            if which.any():
                shares = read.accuracies(
                    read.run_network(self.reader, images[which]), labels[which], self.hierarchy.parents
                )
                features = features_root(read.run_network(self.features, images[which]))
                found |= {part: shares["class"], f"{part} distance": float(frechet_distance(features, self.real[new]))}
        return found

    def read_samples(self, path: Path, per_class: int) -> dict[str, float]:
        """Sample an adapter and measure the images."""
        images, labels = study.sample(path, self.autoencoder, Guidance("superclass", SCALE), per_class)
        names = read_description(path).hierarchy.classes
        return self.measure(images, torch.tensor([self.hierarchy.classes.index(names[label]) for label in labels]))


def main():
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the quick start with train/, held-out/ and run/")
    add("--train", required=True, help="flags of train.py for training from the start")
    add("--out", type=Path, required=True, help="folder for data, runs and results; the same one resumes")
    add("--images", type=int, nargs="+", default=[1, 5, 39], help="images per new class")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of new images and training")
    add("--steps", type=int, default=400, help="training steps of an extension")
    add("--per-class", type=int, default=8, help="images to sample per class")
    add("--jobs", type=int, default=2, help="training runs at a time, each on one core")
    compare(parser.parse_args())


def compare(args: argparse.Namespace):
    """Train in all ways, read the samples, and write the results."""
    if not (args.data / "run/adapters").is_dir():
        raise ValueError(f"{args.data} has no adapter in run/, expected the folder of make quickstart: run that first.")
    adapter = study.newest_adapter(args.data / "run")
    jobs = [(way, images, seed) for way in WAYS for images in args.images for seed in args.seeds]
    for images in args.images:
        for seed in args.seeds:
            draw.write_images_once(args.out / f"data/{images}-{seed}", "more", False, images, seed)
    with ThreadPoolExecutor(args.jobs) as pool:
        paths = progress_bar(
            pool.map(lambda job: train(args, adapter, job), jobs), total=len(jobs), desc="training", unit="run"
        )
        adapters = {"|".join(map(str, job)): path for job, path in zip(jobs, paths)}
    kept, judge = args.out / "extension.json", Judge(args)
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    for key, path in progress_bar({BEFORE: adapter, **adapters}.items(), desc="sampling", unit="adapter"):
        if key not in found:
            found[key] = judge.read_samples(path, args.per_class)
            atomic_write(kept, lambda part: part.write_text(json.dumps(found, indent=1) + "\n"))

    def cells(*rows):
        columns = ("new", 100, 1), ("new distance", 1, 2), ("old", 100, 1), ("old distance", 1, 2)
        return [
            study.mean_and_deviation([factor * row[name] for row in rows], digits) if name in rows[0] else ""
            for name, factor, digits in columns
        ]

    rows = [["real, other faces", "", *cells(judge.of_real)], ["before", "", *cells(found[BEFORE])]]
    rows += [
        [way, str(images), *cells(*(found[f"{way}|{images}|{seed}"] for seed in args.seeds))]
        for images in args.images
        for way in WAYS
    ]
    header = [
        "trained",
        "images per new class",
        "new: right class, %",
        "new: Frechet",
        "old: right class, %",
        "old: Frechet",
    ]
    text = "\n".join(markdown_table(header, rows, align="lrrrrr")) + "\n"
    atomic_write(args.out / "extension.md", lambda part: part.write_text(text))
    print(text)


if __name__ == "__main__":
    run_command(main)
