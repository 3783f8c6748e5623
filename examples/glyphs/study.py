"""Fine-tuning methods side by side on glyphs: each with several seeds, at several guidance scales, read by a classifier.

    python -m examples.glyphs.study --data quickstart --out study --train "--resume examples/glyphs/base.safetensors ..."

`make study` runs it with the quick start's data and settings. FineDiffusion is guided by superclasses; the methods with
a null row by it. Two controls: FineDiffusion's parameters with a null row in place of superclasses, and superclasses
dealt out at random. What is done is not done again: the same command goes on. Writes study.json and study.md.
"""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from autoencoder import load_autoencoder
from checkpoint.loading import load_adapted
from evaluation.metrics import features_root, frechet_distance
from examples.glyphs import read as read_glyphs
from guidance import Guidance
from hierarchy import Hierarchy
from runtime.cli import Parser, run_command
from runtime.files import atomic_write
from sampling.samplers import sample_keyed, to_uint8

ROOT = Path(__file__).resolve().parents[2]
METHODS = {  # name: flags of train.py
    "finediffusion": [],
    "finediffusion, null row": ["--embedder", "null"],
    "finediffusion, shuffled": [],  # with superclasses dealt out at random
    "bitfit": ["--method", "bitfit"],
    "difffit": ["--method", "difffit"],
    "full": ["--method", "full"],
}
SHUFFLED = "finediffusion, shuffled"
SCALES = (1.0, 1.5, 2.0, 4.0)
STEPS, BATCH = 20, 64  # of DDIM, and images at a time


def run(*command):
    """A command of the project on one core; its last words where it fails."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"{shlex.join(map(str, command))} failed ({result.stderr.strip().splitlines()[-1]}).")


def shuffled(hierarchy, seed=0):
    """The same classes under superclasses of the same sizes, dealt out at random."""
    parents = hierarchy.parents[torch.randperm(len(hierarchy.parents), generator=torch.Generator().manual_seed(seed))]
    return Hierarchy(hierarchy.classes, hierarchy.superclasses, parents, "shuffled")


def train_all(args, out, hierarchy):
    """{(method, seed): adapter} of all trainings, those that are not there trained `--jobs` at a time."""
    spec = out / "shuffled.json"
    atomic_write(spec, lambda part: part.write_text(json.dumps(shuffled(hierarchy).to_dict())))
    for name, flags in (("latents", []), ("latents-shuffled", ["--hierarchy", spec])):
        encode = ["--data-path", args.data / "train", "--image-size", 64, "--vae", "examples/glyphs/vae", "--no-flip"]
        run("-m", "tools.encode_latents", *encode, "--num-workers", 0, "--out", out / name, *flags)
    done = {
        (method, seed): out / f"runs/{re.sub('[, ]+', '-', method)}-{seed}" for method in METHODS for seed in args.seeds
    }

    def train(job):
        method, seed = job
        latents = out / ("latents-shuffled" if method == SHUFFLED else "latents")
        flags = [
            "--latents",
            latents,
            "--results-dir",
            out / "runs",
            "--experiment",
            done[job].name,
            "--global-seed",
            seed,
        ]
        run("train.py", *shlex.split(args.train), *flags, "--preview-images", 0, *METHODS[method])

    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(train, done), total=len(done), desc="training", unit="run"))
    return {job: max((folder / "adapters").glob("*.safetensors")) for job, folder in done.items()}


def sample(path, autoencoder, scale, per_class):
    """uint8 (N, 3, H, W) of all classes of an adapter, `per_class` of each, and labels (N,)."""
    model, description = load_adapted(path)
    jobs = [(label, k) for label in range(description.hierarchy.num_classes) for k in range(per_class)]
    images, guidance = [], Guidance("superclass", scale)
    for i in range(0, len(jobs), BATCH):
        labels = [label for label, _ in jobs[i : i + BATCH]]
        keys = [(0, *job) for job in jobs[i : i + BATCH]]
        latents = sample_keyed(model, labels, keys, guidance, sampler="ddim", steps=STEPS)
        images.append(to_uint8(autoencoder.decode(latents)))
    return torch.cat(images), torch.tensor([label for label, _ in jobs])


def figures(reader, features, images, labels, parents, real):
    """Shares read as the right class and superclass, and the Frechet distance of the reader's features to `real`'s."""
    found = read_glyphs.shares(read_glyphs.apply(reader, images), labels, parents)
    return found | {"distance": float(frechet_distance(features_root(read_glyphs.apply(features, images)), real))}


def table(rows):
    """Markdown: mean and standard deviation over the seeds, of {method: {scale: {figure: [values]}}}."""
    lines = []
    for figure, title, factor, digits in (
        ("class", "right class, %", 100, 1),
        ("superclass", "right superclass, %", 100, 1),
        ("distance", "Frechet distance of the reader's features", 1, 2),
    ):
        lines += [f"**{title}**", "", f"| method | {' | '.join(f'w = {w:g}' for w in SCALES)} |"]
        lines += ["|---|" + "---:|" * len(SCALES)]
        for method, scales in rows.items():
            cells = []
            for scale in SCALES:
                values = [factor * value for value in scales[str(scale)][figure]]
                spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with the glyphs train/ and held-out/")
    add("--out", type=Path, required=True)
    add("--train", required=True, help="flags of train.py that all methods share")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--per-class", type=int, default=4, help="images to sample of each class")
    add("--jobs", type=int, default=2, help="trainings at a time, each on one core")
    args = parser.parse_args()

    hierarchy = Hierarchy.from_folder(args.data / "train")
    adapters = train_all(args, args.out, hierarchy)
    features, reader = read_glyphs.train(*read_glyphs.load(args.data / "train", hierarchy), hierarchy.num_classes)
    autoencoder = load_autoencoder("examples/glyphs/vae")
    images, labels = read_glyphs.load(args.data / "held-out", hierarchy)
    of = partial(figures, reader, features, parents=hierarchy.parents)
    real = features_root(read_glyphs.apply(features, images))
    rows = {"real, other faces": of(images, labels, real=real)}
    kept = args.out / "figures.json"  # of the adapters read so far
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    for (method, seed), path in tqdm(adapters.items(), desc="sampling", unit="adapter"):
        for scale in SCALES:
            key = f"{method} {seed} {scale} {path.name} {args.per_class}"
            if key not in known:
                known[key] = of(*sample(path, autoencoder, scale, args.per_class), real=real)
                atomic_write(kept, lambda part: part.write_text(json.dumps(known, indent=1) + "\n"))
            row = rows.setdefault(method, {}).setdefault(str(scale), {name: [] for name in known[key]})
            for name, value in known[key].items():
                row[name].append(value)
    atomic_write(args.out / "study.json", lambda part: part.write_text(json.dumps(rows, indent=1) + "\n"))
    first = rows.pop("real, other faces")
    text = (
        f"{len(args.seeds)} seeds, {args.per_class} images of each of {hierarchy.num_classes} classes at each scale; mean and "
        f"standard deviation over the seeds. Real glyphs in faces that the reader did not see: {100 * first['class']:.1f}% right "
        f"class, {100 * first['superclass']:.1f}% right superclass.\n\n{table(rows)}"
    )
    atomic_write(args.out / "study.md", lambda part: part.write_text(text))
    print(text)


if __name__ == "__main__":
    run_command(main)
