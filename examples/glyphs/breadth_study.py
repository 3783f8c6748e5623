"""How broad must the base be? Fine-tune base models of 1, 2, 5 and 11 Unicode blocks with several methods.

    python -m examples.glyphs.breadth_study --data quickstart --out breadth --train "--max-steps 400 ..."

`make study-breadth` runs it with the settings of the quick start. Every base is trained from random weights on the first
blocks of `draw --set base`, with the same number of steps and images: a narrow base sees fewer glyphs more often. Each is
then fine-tuned on the new glyphs with every method and seed. The same command resumes. Writes breadth.json and breadth.md.
"""

import argparse
import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from autoencoder import load_autoencoder
from examples.glyphs import draw, study
from hierarchy import Hierarchy
from runtime.cli import Parser, run_command
from runtime.files import atomic_write
from runtime.text import markdown_table

BASE = [  # flags of train.py for a base, close to those of base.safetensors
    *("--image-size", 64, "--vae", "examples/glyphs/vae", "--no-flip", "--num-workers", 0, "--preview-images", 0),
    *("--model", "DiT-Ti/2", "--method", "full", "--resume", "none", "--global-batch-size", 64, "--lr", 1.5e-3),
    *("--lr-schedule", "cosine", "--table-lr", 1e-2, "--table-std", 0.1, "--clip-grad", 1, "--ema-decay", 0.998),
]
LORA = "--method", "finediffusion+lora", "--lora-targets", "adaln", "--lora-rank", "16", "--lora-lr", "3e-3"
METHODS = {  # name: flags of train.py, the best of `make tune`
    "finediffusion": ["--lr", "4e-3"],
    "finediffusion+lora, adaln 16": [*LORA],
    "full": ["--method", "full", "--lr", "1e-3"],
}
EXAMPLES = """
    make study-breadth
    python -m examples.glyphs.breadth_study --data quickstart --out breadth --blocks 1 11 --seeds 0 --train "--max-steps 400"
"""


def train_base(args: argparse.Namespace, blocks: int) -> Path:
    """Train a base on the first blocks, or resume or skip a run that exists; return its adapter."""
    out = args.out / f"blocks-{blocks}"
    (out / "images").mkdir(parents=True, exist_ok=True)
    for block in list(draw.read_classes("base"))[:blocks]:
        folder = args.out / "images" / block.replace(" ", "_")
        link = out / "images" / folder.name
        if not link.is_symlink():
            link.symlink_to(folder.resolve())
    study.encode(out / "images", out / "base-latents")
    place = ["--latents", out / "base-latents", "--results-dir", out, "--experiment", "base"]
    study.run("train.py", *BASE, *place, "--max-steps", args.base_steps)
    return study.newest_adapter(out / "base")


def compare(args: argparse.Namespace):
    """Train the bases and the methods, read the samples, and write the results."""
    hierarchy = Hierarchy.load(args.data / "train")
    draw.write_images_once(args.out / "images", "base", held_out=False, per_class=args.base_images, seed=0)
    measure, of_real = study.make_judge(args.data / "train", args.data / "held-out")
    autoencoder, found = load_autoencoder("examples/glyphs/vae"), {}
    with ThreadPoolExecutor(args.jobs) as pool:
        bases = list(pool.map(lambda blocks: train_base(args, blocks), args.blocks))
    for blocks, base in zip(args.blocks, bases):
        train = f"{args.train} --resume {shlex.quote(str(base.resolve()))}"
        here = argparse.Namespace(**vars(args) | {"out": args.out / f"blocks-{blocks}", "train": train})
        adapters = study.train_all(here, hierarchy, METHODS)
        found[str(blocks)] = study.sample_all(here, adapters, autoencoder, measure, args.scales)
    report = json.dumps({study.REAL: of_real} | found, indent=1) + "\n"
    atomic_write(args.out / "breadth.json", lambda part: part.write_text(report))

    lines = []
    for scale in args.scales:
        for metric, title, factor, digits in study.TABLES:
            cells = [
                [blocks]
                + [
                    study.mean_and_deviation([factor * v for v in row[str(scale)][metric]], digits)
                    for row in rows.values()
                ]
                for blocks, rows in found.items()
            ]
            header = [f"blocks of the base; {title}, w = {scale:g}", *METHODS]
            lines += [*markdown_table(header, cells, align="l" + "r" * len(METHODS)), ""]
    atomic_write(args.out / "breadth.md", lambda part: part.write_text("\n".join(lines)))
    print("\n".join(lines))


def main():
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with the glyphs train/ and held-out/")
    add("--out", type=Path, required=True, help="folder for data, runs and results; the same one resumes")
    add("--train", required=True, help="flags of train.py that all methods share, without --resume")
    add(
        "--blocks", type=int, nargs="+", default=[1, 2, 5, 11], help="numbers of blocks, of which a base sees the first"
    )
    add("--base-steps", type=int, default=1500, help="training steps of a base")
    add("--base-images", type=int, default=26, help="images per class of a base")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds of each method on each base")
    add("--scales", type=float, nargs="+", default=[2.0, 4.0], help="guidance scales")
    add("--per-class", type=int, default=4, help="images to sample per class")
    add("--jobs", type=int, default=2, help="training runs at a time, each on one core")
    compare(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
