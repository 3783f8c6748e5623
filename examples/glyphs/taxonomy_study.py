"""Do rows for further ranks help? Compare class tables on glyphs in three tiers, with few images per class.

    python -m examples.glyphs.taxonomy_study --out taxonomy --train "--resume BASE ..."

`make study-taxonomy` runs it with the settings of the quick start. A superclass is a Unicode block, `level2` a letter, and a
class the letter with diacritics (`draw --set letters`). Every table is trained with 1, 2, 5 and 39 images per class and
several seeds, and its samples are guided by each of its tiers. There are two kinds of controls: a null row instead of tiers,
and classes in randomly assigned blocks and letters. A classifier trained on 39 images per class reads the samples. The same
command resumes. Writes taxonomy.json and taxonomy.md.
"""

import argparse
import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from autoencoder import load_autoencoder
from examples.glyphs import draw, study
from guidance import Guidance
from hierarchy import Hierarchy
from hierarchy.ranks import Rank
from runtime.cli import Parser, run_command
from runtime.files import atomic_write
from runtime.progress import progress_bar
from runtime.text import markdown_table

TIERS = ["--tiers", "superclass", "level2"]
METHODS = {  # name: (flags of train.py, tiers to guide by: their names, whether classes are assigned at random)
    "null row": (["--embedder", "null"], ("null",), False),
    "blocks": ([], ("block",), False),
    "blocks and letters": (TIERS, ("block", "letter"), False),
    "blocks and letters, path": ([*TIERS, "--embedder", "path"], ("block", "letter"), False),
    "blocks and letters, random": (TIERS, ("block", "letter"), True),
    "blocks and letters, path, random": ([*TIERS, "--embedder", "path"], ("block", "letter"), True),
}
BATCH = 48  # an image of each class, at least
MEASURES = (("class", "right class, %", 100, 1), ("distance", "Frechet distance", 1, 2))
EXAMPLES = """
    make study-taxonomy
    python -m examples.glyphs.taxonomy_study --out taxonomy --images 1 39 --seeds 0 --train "--resume BASE"
"""

Job = tuple[str, int, int]  # method, images per class, seed


def shuffle(hierarchy: Hierarchy, seed: int) -> Hierarchy:
    """Return the same classes on randomly assigned places of the tree."""
    order = torch.randperm(hierarchy.num_classes, generator=torch.Generator().manual_seed(seed)).tolist()
    ranks = [Rank.of_names(rank.name, [rank.names()[place] for place in order]) for rank in hierarchy.ranks]
    return Hierarchy(hierarchy.classes, hierarchy.superclasses, hierarchy.parents[order], "random", ranks)


def prepare(out: Path, images: int, seed: int):
    """Draw the training images of a seed, and encode them with the true tree and with a random one."""
    data, spec = out / f"data/{images}-{seed}", out / f"random-{seed}.json"
    draw.write_images_once(data, "letters", held_out=False, per_class=images, seed=seed)
    text = json.dumps(shuffle(Hierarchy.load(data), seed).to_dict())
    atomic_write(spec, lambda part: part.write_text(text))
    for name, flags in (("true", []), ("random", ["--hierarchy", spec])):
        study.encode(data, out / f"latents/{images}-{seed}-{name}", *flags)


def train(args: argparse.Namespace, job: Job) -> Path:
    """Train a table, or resume or skip a run that exists; return its adapter."""
    method, images, seed = job
    flags, _, random = METHODS[method]
    folder = study.run_folder(args.out, f"{method}, {images}", seed)
    latents = args.out / f"latents/{images}-{seed}-{'random' if random else 'true'}"
    place = ["--latents", latents, "--results-dir", folder.parent, "--experiment", folder.name]
    place += ["--global-batch-size", BATCH, "--max-steps", args.max_steps, "--global-seed", seed, "--preview-images", 0]
    study.run("train.py", *shlex.split(args.train), *place, *flags)
    return study.newest_adapter(folder)


def measure_all(args: argparse.Namespace, adapters: dict[Job, Path]) -> dict[str, dict[str, float]]:
    """Sample and read every adapter at every scale, guided by each of its tiers.

    Returns {"method, guided by tier|images|seed|scale": metrics}, which figures.json keeps for a resumed study.
    """
    folders = {"train": (False, 39), "held-out": (True, 6)}  # faces, images per class of the classifier and its test
    for name, (held_out, count) in folders.items():
        draw.write_images_once(args.out / name, "letters", held_out, count, seed=0)
    measure, of_real = study.make_judge(args.out / "train", args.out / "held-out")
    autoencoder, kept = load_autoencoder("examples/glyphs/vae"), args.out / "figures.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    found[study.REAL] = of_real
    for (method, images, seed), path in progress_bar(adapters.items(), desc="sampling", unit="adapter"):
        for tier, name in enumerate(METHODS[method][1]):
            for scale in args.scales:
                key = f"{method}, guided by {name}|{images}|{seed}|{scale:g}"
                if key not in found:
                    guidance = Guidance("superclass", scale, tier=tier)
                    found[key] = measure(*study.sample(path, autoencoder, guidance, args.per_class))
                    atomic_write(kept, lambda part: part.write_text(json.dumps(found, indent=1) + "\n"))
    return found


def tables(args: argparse.Namespace, found: dict[str, dict[str, float]]) -> str:
    """Return a Markdown table per number of images and metric, mean and standard deviation over the seeds."""
    methods, lines = list(dict.fromkeys(key.split("|")[0] for key in found if "|" in key)), []
    for images in args.images:
        for metric, title, factor, digits in MEASURES:
            cells = []
            for method in methods:
                values = [
                    [factor * found[f"{method}|{images}|{seed}|{scale:g}"][metric] for seed in args.seeds]
                    for scale in args.scales
                ]
                cells.append([method, *(study.mean_and_deviation(each, digits) for each in values)])
            header = [f"{title}, {images} image{'s' * (images > 1)} per class", *(f"w = {w:g}" for w in args.scales)]
            lines += [*markdown_table(header, cells, align="l" + "r" * len(args.scales)), ""]
    return "\n".join(lines)


def main():
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for data, runs and results; the same one resumes")
    add("--train", required=True, help="flags of train.py that all runs share")
    add("--images", type=int, nargs="+", default=[1, 2, 5, 39], help="images per class")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of images, training and random trees")
    add("--scales", type=float, nargs="+", default=study.SCALES, help="guidance scales")
    add("--max-steps", type=int, default=400, help="training steps")
    add("--per-class", type=int, default=4, help="images to sample per class")
    add("--jobs", type=int, default=2, help="training runs at a time, each on one core")
    args = parser.parse_args()
    for images in args.images:
        for seed in args.seeds:
            prepare(args.out, images, seed)
    jobs = [(method, images, seed) for images in args.images for seed in args.seeds for method in METHODS]
    with ThreadPoolExecutor(args.jobs) as pool:
        paths = progress_bar(pool.map(lambda job: train(args, job), jobs), total=len(jobs), desc="training", unit="run")
        adapters = dict(zip(jobs, paths))
    found = measure_all(args, adapters)
    real = found[study.REAL]
    text = (
        f"{len(args.seeds)} seeds, {args.max_steps} steps, {args.per_class} images of each of 48 classes at each scale; mean and "
        "standard deviation over the seeds. Real glyphs in faces that the classifier never saw: "
        f"{100 * real['class']:.1f}% right class.\n\n{tables(args, found)}"
    )
    atomic_write(args.out / "taxonomy.json", lambda part: part.write_text(json.dumps(found, indent=1) + "\n"))
    atomic_write(args.out / "taxonomy.md", lambda part: part.write_text(text))
    print(text)


if __name__ == "__main__":
    run_command(main)
