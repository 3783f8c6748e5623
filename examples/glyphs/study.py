"""Compare fine-tuning methods on glyphs, each with several seeds and guidance scales, by a classifier's reading.

    python -m examples.glyphs.study --data quickstart --out study --train "--resume examples/glyphs/base.safetensors ..."

`make study` runs it with the data and settings of the quick start. FineDiffusion is guided by superclasses, a method
with a null row by that row. There are two controls: the parameters of FineDiffusion with a null row instead of
superclasses, and FineDiffusion with superclasses assigned at random for each seed. The same command resumes an
interrupted study. Writes study.json and study.md.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import nn

from autoencoder import Autoencoder, load_autoencoder
from checkpoint.loading import load_adapted
from evaluation.metrics import features_root, frechet_distance
from examples.glyphs import read
from guidance import Guidance
from hierarchy import Hierarchy
from runtime.cli import Parser, run_command
from runtime.files import atomic_write
from runtime.progress import progress_bar
from runtime.text import markdown_table
from sampling.samplers import sample_keyed, to_uint8

ROOT = Path(__file__).resolve().parents[2]
SHUFFLED = "finediffusion, shuffled"  # with randomly assigned superclasses
METHODS = {  # name: flags of train.py
    "finediffusion": [],
    "finediffusion, null row": ["--embedder", "null"],
    SHUFFLED: [],
    "bitfit": ["--method", "bitfit"],
    "difffit": ["--method", "difffit"],
    "full": ["--method", "full"],
}
SCALES = (1.0, 1.5, 2.0, 4.0)
STEPS, BATCH = 20, 64  # of DDIM, and images at a time
REAL = "real, other faces"
TABLES = (  # metric, title, factor, digits
    ("class", "right class, %", 100, 1),
    ("superclass", "right superclass, %", 100, 1),
    ("distance", "Frechet distance on the classifier's features", 1, 2),
)
EXAMPLES = """
    make study
    python -m examples.glyphs.study --data quickstart --out study --seeds 0 --train "--resume examples/glyphs/base.safetensors"
"""


# ---- training ------------------------------------------------------------------------------------


def run(*command: str | os.PathLike | int):
    """Run a command of the project on one core; raise ValueError with the last line of its output if it fails."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"{shlex.join(map(str, command))} failed ({result.stderr.strip().splitlines()[-1]}).")


def encode(data: Path, out: Path, *flags: str | os.PathLike):
    """Encode the images of a folder, without mirror images."""
    settings = "--image-size", 64, "--vae", "examples/glyphs/vae", "--no-flip", "--num-workers", 0
    run("-m", "tools.encode_latents", "--data-path", data, *settings, "--out", out, *flags)


def newest_adapter(run: Path) -> Path:
    """Return the last adapter of a run's folder."""
    return max((run / "adapters").glob("*.safetensors"))


def shuffle_superclasses(hierarchy: Hierarchy, seed: int) -> Hierarchy:
    """Return the same classes under randomly assigned superclasses of the same sizes."""
    parents = hierarchy.parents[torch.randperm(len(hierarchy.parents), generator=torch.Generator().manual_seed(seed))]
    return Hierarchy(hierarchy.classes, hierarchy.superclasses, parents, "shuffled")


def run_folder(out: Path, method: str, seed: int) -> Path:
    """Return the folder of a method's run."""
    return out / f"runs/{re.sub('[, ]+', '-', method)}-{seed}"


def train_all(
    args: argparse.Namespace, hierarchy: Hierarchy, methods: dict[str, list[str]]
) -> dict[tuple[str, int], Path]:
    """Train every method with every seed, `--jobs` at a time; return {(method, seed): adapter}.

    methods: {name: flags of train.py}. train.py resumes or skips the runs that already exist.
    """
    out = args.out
    latents = {"latents": []}  # folder: flags of its encoding
    for seed in args.seeds if SHUFFLED in methods else ():
        spec, text = out / f"shuffled-{seed}.json", json.dumps(shuffle_superclasses(hierarchy, seed).to_dict())
        atomic_write(spec, lambda part, text=text: part.write_text(text))
        latents[f"latents-shuffled-{seed}"] = ["--hierarchy", spec]
    for name, flags in latents.items():
        encode(args.data / "train", out / name, *flags)
    folders = {(method, seed): run_folder(out, method, seed) for method in methods for seed in args.seeds}

    def train(job):
        method, seed = job
        name = f"latents-shuffled-{seed}" if method == SHUFFLED else "latents"
        flags = ["--latents", out / name, "--results-dir", out / "runs", "--experiment", folders[job].name]
        flags += ["--global-seed", seed, "--preview-images", 0]
        run("train.py", *shlex.split(args.train), *flags, *methods[method])

    with ThreadPoolExecutor(args.jobs) as pool:
        list(progress_bar(pool.map(train, folders), total=len(folders), desc="training", unit="run"))
    return {job: newest_adapter(folder) for job, folder in folders.items()}


# ---- sampling and reading ------------------------------------------------------------------------


def sample(
    path: Path, autoencoder: Autoencoder, guidance: Guidance, per_class: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample `per_class` images of every class of an adapter: uint8 (N, 3, H, W), and labels (N,)."""
    model, description = load_adapted(path)
    jobs = [(label, k) for label in range(description.hierarchy.num_classes) for k in range(per_class)]
    images = []
    for i in range(0, len(jobs), BATCH):
        labels = [label for label, _ in jobs[i : i + BATCH]]
        keys = [(0, *job) for job in jobs[i : i + BATCH]]
        latents = sample_keyed(model, labels, keys, guidance, sampler="ddim", steps=STEPS)
        images.append(to_uint8(autoencoder.decode(latents)))
    return torch.cat(images), torch.tensor([label for label, _ in jobs])


def compute_metrics(
    reader: nn.Module,
    features: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    parents: torch.Tensor,
    real: torch.Tensor,
) -> dict[str, float]:
    """Return the accuracies of the classifier, and the Frechet distance of its features to those of real glyphs.

    real: `features_root` of the real glyphs' features
    """
    found = read.accuracies(read.run_network(reader, images), labels, parents)
    return found | {"distance": float(frechet_distance(features_root(read.run_network(features, images)), real))}


def make_judge(train: Path, real: Path) -> tuple[Callable, dict[str, float]]:
    """Train the classifier on a folder of glyphs, and compare with those of another folder.

    Returns measure(images, labels) -> metrics, see `compute_metrics`, and the metrics of the real glyphs themselves.
    """
    hierarchy = Hierarchy.load(train)
    features, reader = read.train_reader(*read.load_images(train, hierarchy), hierarchy.num_classes)
    images, labels = read.load_images(real, hierarchy)
    root = features_root(read.run_network(features, images))
    measure = partial(compute_metrics, reader, features, parents=hierarchy.parents, real=root)
    return measure, measure(images, labels)


def sample_all(
    args: argparse.Namespace,
    adapters: dict[tuple[str, int], Path],
    autoencoder: Autoencoder,
    measure: Callable,
    scales: Sequence[float],
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Sample every adapter at every scale; return {method: {scale: {metric: [value for each seed]}}}.

    measure(images, labels) -> metrics. They are kept in figures.json, so that a resumed study samples no adapter again.
    """
    rows, kept = {}, args.out / "figures.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    for (method, seed), path in progress_bar(adapters.items(), desc="sampling", unit="adapter"):
        for scale in scales:
            key = f"{method} {seed} {scale} {path.name} {args.per_class}"
            if key not in known:
                known[key] = measure(*sample(path, autoencoder, Guidance("superclass", scale), args.per_class))
                atomic_write(kept, lambda part: part.write_text(json.dumps(known, indent=1) + "\n"))
            row = rows.setdefault(method, {}).setdefault(str(scale), {name: [] for name in known[key]})
            for name, value in known[key].items():
                row[name].append(value)
    return rows


# ---- results -------------------------------------------------------------------------------------


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Return "mean ± standard deviation", or the value alone."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(rows: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """Return a Markdown table per metric, mean and standard deviation over the seeds; rows: see `sample_all`."""
    lines = []
    for metric, title, factor, digits in TABLES:
        cells = [
            [method, *(mean_and_deviation([factor * v for v in scales[str(w)][metric]], digits) for w in SCALES)]
            for method, scales in rows.items()
        ]
        header = ["method", *(f"w = {w:g}" for w in SCALES)]
        lines += [f"**{title}**", "", *markdown_table(header, cells, align="l" + "r" * len(SCALES)), ""]
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with the glyphs train/ and held-out/")
    add("--out", type=Path, required=True, help="folder for runs and results; the same one resumes")
    add("--train", required=True, help="flags of train.py that all methods share")
    add(
        "--methods",
        type=Path,
        help="JSON file {name: flags of train.py}, as from the tuning; if not given, all methods",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds of each method")
    add("--per-class", type=int, default=4, help="images to sample per class")
    add("--jobs", type=int, default=2, help="training runs at a time, each on one core")
    return parser.parse_args()


def main():
    args = parse_args()
    hierarchy = Hierarchy.from_folder(args.data / "train")
    methods = json.loads(args.methods.read_text()) if args.methods else METHODS
    adapters = train_all(args, hierarchy, methods)
    measure, found = make_judge(args.data / "train", args.data / "held-out")
    rows = sample_all(args, adapters, load_autoencoder("examples/glyphs/vae"), measure, SCALES)
    report = json.dumps({REAL: found} | rows, indent=1) + "\n"
    atomic_write(args.out / "study.json", lambda part: part.write_text(report))
    text = (
        f"{len(args.seeds)} seeds, {args.per_class} images of each of {hierarchy.num_classes} classes at each scale; mean and "
        "standard deviation over the training seeds. Real glyphs in faces that the classifier never saw: "
        f"{100 * found['class']:.1f}% right class, {100 * found['superclass']:.1f}% right superclass.\n\n{table(rows)}"
    )
    atomic_write(args.out / "study.md", lambda part: part.write_text(text))
    print(text)


if __name__ == "__main__":
    run_command(main)
