"""Measure on glyphs whether generated images help a classifier if real images are few.

    python -m examples.glyphs.usefulness --data quickstart --out usefulness --train "--max-steps 800 ..."

`make usefulness` runs it with the data and settings of the quick start. For every seed, the classes get 39 to 1 of their
training images, in a random order of the classes. A generator is fine-tuned on these images alone, and sample_ddp.py fills
every class to 39 images. The same small network is then trained from scratch, for the same number of steps, on the sets of
ARMS, and tried on faces that neither the generator, nor its base model, nor a classifier has seen. The same command
resumes. Writes usefulness.json and usefulness.md.
"""

import json
import shlex
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from dataset.listing import list_files
from examples.glyphs import draw, study
from hierarchy import Hierarchy
from runtime.cli import Parser, run_command
from runtime.files import atomic_write
from runtime.text import markdown_table
from tools import filter_images, train_classifier

MOST = 39  # images of the largest class; the smallest has 1
SAMPLING = "--cfg-scale 2 --sampler unipc --num-sampling-steps 10"
TOP_K = 5  # of the filter: keep an image if its class is among the first 5 of 48
CLASSIFIER = (
    "--model test_resnet --input-size 32 --image-size 64 --crop 0.7 --no-flip --max-steps 400 --batch-size 64 --lr 3e-3 "
    "--num-workers 0 --save-every 100"
)
HELD_OUT_EACH = 24  # images of each class in faces that nobody has seen
STRENGTH = 0.5  # of the variations of real images
REAL, REPEATED = "real", "real, repeated"  # every image equally often, or every class
GENERATED, FILTERED = "real + generated", "real + generated, filtered"
VARIED = "real + varied real"  # variations of the real images fill the classes
ONLY = "generated only"  # 39 of each class: the classification accuracy score
ARMS = REAL, REPEATED, GENERATED, FILTERED, VARIED, ONLY
BINS = (1, 1), (2, 4), (5, 12), (13, MOST)  # first and last number of real images of a class
EXAMPLES = """
    make usefulness
    python -m examples.glyphs.usefulness --data quickstart --out usefulness --train "--resume examples/glyphs/base.safetensors"
"""


# ---- data ----------------------------------------------------------------------------------------


def tail_counts(classes: int, most: int, seed: int) -> np.ndarray:
    """Return the number of images of each class, int64 (classes,): `most` to 1, falling exponentially, in random order."""
    counts = np.empty(classes, np.int64)
    falling = np.round(most ** (1 - np.arange(classes) / (classes - 1)))
    counts[np.random.default_rng(seed).permutation(classes)] = falling
    return counts


def write_tail(data: Path, out: Path, seed: int):
    """Copy a long tail of the images of `data`, chosen at random within each class, to `out`."""
    hierarchy = Hierarchy.from_folder(data)
    listing = list_files(data, hierarchy)
    labels, draws = np.array(listing.labels), np.random.default_rng((seed, 1))
    held_out = [path for path in listing.paths if path.endswith(tuple(f"_{face}.png" for face in draw.HELD_OUT))]
    assert not held_out, held_out
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for label, count in enumerate(tail_counts(hierarchy.num_classes, MOST, seed)):
        for row in draws.permutation(np.flatnonzero(labels == label))[:count]:
            path = part / listing.paths[row]
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / listing.paths[row], path)
    part.rename(out)


# ---- one seed ------------------------------------------------------------------------------------


def generate(folder: Path, seed: int, train_flags: Sequence[str]):
    """Fine-tune a generator on the images in folder/train, and sample the images of all sets.

    Those in `fill` and `varied` fill the classes to MOST images; `rest` are as many of each class as it has real ones.
    """
    study.encode(folder / "train", folder / "latents")
    place = ["--latents", folder / "latents", "--results-dir", folder, "--experiment", "generator"]
    study.run("train.py", *train_flags, *place, "--global-seed", seed, "--preview-images", 0)
    hierarchy = Hierarchy.from_folder(folder / "train")
    counts = json.dumps(dict(zip(hierarchy.classes, count_images(folder / "train", hierarchy).tolist())))
    atomic_write(folder / "rest.json", lambda part: part.write_text(counts))
    fill = "--fill-to", MOST, "--data-path", folder / "train"
    flags = {
        "fill": ["--global-seed", seed, *fill],
        "varied": ["--global-seed", seed, *fill, "--init-images", folder / "train", "--strength", STRENGTH],
        "rest": ["--global-seed", seed + 1000, "--counts", folder / "rest.json"],  # other noise than that of `fill`
    }
    for name, more in flags.items():
        place = "--sample-dir", folder, "--name", name
        study.run(
            "sample_ddp.py", "--ckpt", study.newest_adapter(folder / "generator"), *place, *more, *shlex.split(SAMPLING)
        )


def count_images(folder: Path, hierarchy: Hierarchy) -> np.ndarray:
    """Return the number of images of each class, int64 (num_classes,)."""
    return np.bincount(list_files(folder, hierarchy).labels)


def train_arms(folder: Path, seed: int, held_out: Path) -> dict[str, dict]:
    """Train the classifier on every set; return {arm: report of tools.train_classifier}."""
    names = "train", "fill", "kept.json", "varied", "rest"
    train, fill, kept, varied, rest = (str(folder / name) for name in names)
    flags = {
        REAL: ["--real", train],
        REPEATED: ["--real", train, "--balance"],
        GENERATED: ["--real", train, "--generated", fill, "--balance"],
        FILTERED: ["--real", train, "--generated", kept, "--balance"],
        VARIED: ["--real", train, "--generated", varied, "--balance"],
        ONLY: ["--generated", fill, rest, "--hierarchy", train, "--balance"],
    }
    reports = {}
    for arm in ARMS:
        out = folder / "classifiers" / f"{arm.replace(' + ', '-').replace(', ', '-')}.safetensors"
        if arm == FILTERED:
            judge = f"test_resnet@32={folder / 'classifiers/real-repeated.safetensors'}"
            options = ["--image-size", "64", "--num-workers", "0", "--top-k", str(TOP_K), "--hierarchy", train]
            filter_images.main(["--images", fill, "--classifier", judge, *options, "--out", kept])
        more = [*shlex.split(CLASSIFIER), "--seed", str(seed), "--test", str(held_out), "--out", str(out)]
        train_classifier.main([*flags[arm], *more])
        reports[arm] = json.loads(out.with_suffix(".scores.json").read_text())
    return reports


def group_accuracies(report: dict, counts: dict[str, int]) -> dict[str, float]:
    """Return the mean top-1 accuracy, in %, of all classes and of those with each number of real images.

    counts: {class: number of real images}
    """
    accuracy = {name: 100 * row["top1"] for name, row in report["classes"].items()}
    groups = {"all classes": list(accuracy)}
    groups |= {bin_title(*ends): [name for name in accuracy if ends[0] <= counts[name] <= ends[1]] for ends in BINS}
    return {title: statistics.mean(accuracy[name] for name in names) for title, names in groups.items() if names}


def bin_title(first: int, last: int) -> str:
    """Return the title of the classes with `first` to `last` real images."""
    return f"{first}" if first == last else f"{first} to {last}"


# ---- report --------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95% interval (Student's t) over the seeds; 0 wide for one value."""
    mean, n = statistics.mean(values), len(values)
    return mean, 0.0 if n < 2 else float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5


def tables(rows: dict[str, list[dict[str, float]]]) -> str:
    """Return Markdown tables of accuracies and of paired differences; rows: {arm: `group_accuracies` of each seed}."""
    groups = list(rows[REAL][0])

    def cells(values, sign=""):
        return [f"{mean:{sign}.1f} ± {half:.1f}" for mean, half in map(interval, values)]

    header, align = ["trained on", *groups], "l" + "r" * len(groups)
    shares = [[arm, *cells([[each[group] for each in seeds] for group in groups])] for arm, seeds in rows.items()]
    lines = markdown_table(header, shares, align)
    for base in (REAL, REPEATED):
        lines += ["", f"**difference to {base!r}, in points, paired by seed**", ""]
        differences = [
            [arm, *cells([[a[g] - b[g] for a, b in zip(seeds, rows[base])] for g in groups], "+")]
            for arm, seeds in rows.items()
            if ARMS.index(arm) > ARMS.index(base)
        ]
        lines += markdown_table(header, differences, align)
    return "\n".join(lines)


def main():
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with the glyphs train/")
    add("--out", type=Path, required=True, help="folder for runs and results; the same one resumes")
    add("--train", required=True, help="flags of train.py for the generators")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        help="seeds; each has its own tail, generator and classifiers",
    )
    args = parser.parse_args()
    held_out = args.out / "held-out"
    draw.write_images_once(held_out, "new", held_out=True, per_class=HELD_OUT_EACH, seed=1)

    rows, reports, kept = {arm: [] for arm in ARMS}, {}, []
    for seed in args.seeds:
        folder = args.out / str(seed)
        if not (folder / "train").is_dir():
            write_tail(args.data / "train", folder / "train", seed)
        generate(folder, seed, shlex.split(args.train))
        hierarchy = Hierarchy.from_folder(folder / "train")
        counts = dict(zip(hierarchy.classes, count_images(folder / "train", hierarchy).tolist()))
        reports[seed] = train_arms(folder, seed, held_out)
        for arm, report in reports[seed].items():
            rows[arm].append(group_accuracies(report, counts))
        listed = json.loads((folder / "kept.json").read_text())["images"]
        kept.append(100 * len(listed) / (MOST * len(counts) - sum(counts.values())))
        report = json.dumps({"seeds": args.seeds, "rows": rows, "kept": kept, "reports": reports}, indent=1) + "\n"
        atomic_write(args.out / "usefulness.json", lambda part, text=report: part.write_text(text))
    text = (
        f"Right class on held-out faces, in %, by the number of real images of a class; mean and 95% interval over "
        f"{len(args.seeds)} seeds. The filter kept {interval(kept)[0]:.0f}% of the generated images.\n\n{tables(rows)}\n"
    )
    atomic_write(args.out / "usefulness.md", lambda part: part.write_text(text))
    print(text)


if __name__ == "__main__":
    run_command(main)
