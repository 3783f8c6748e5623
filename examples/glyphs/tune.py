"""Tune fine-tuning methods equally on glyphs, before the study compares them.

    python -m examples.glyphs.tune --data quickstart --out tuning --train "--resume examples/glyphs/base.safetensors ..."

Every method gets the same number of trials with one seed: three learning rates for its parameters outside the class table,
whose learning rate is that of --train. A trial is judged by the Frechet distance to fresh drawings of the training faces, so
that the held-out faces stay unseen. Writes tuned.json, the flags of each method for the study's --methods, and tune.md with
all trials. The same command resumes.
"""

import argparse
import json
import shlex
from pathlib import Path

from autoencoder import load_autoencoder
from examples.glyphs import draw, study
from hierarchy import Hierarchy
from runtime.cli import Parser, run_command
from runtime.files import atomic_write
from runtime.text import markdown_table

SEED, SCALE = 0, 2.0  # of the trials, and the guidance scale they are judged at
RATES = {  # flag of the other parameters' learning rate, and its values
    "bias": ("--lr", ("1e-3", "2e-3", "4e-3")),
    "full": ("--lr", ("3e-4", "1e-3", "2e-3")),
    "lora": ("--lora-lr", ("1e-3", "3e-3", "8e-3")),
}
METHODS = {  # name: flags of train.py, and the rates to try
    "finediffusion": ("", "bias"),
    **{
        f"finediffusion+lora, {targets} {rank}": (
            f"--method finediffusion+lora --lora-targets {targets} --lora-rank {rank}",
            "lora",
        )
        for targets, rank in (("adaln", 8), ("adaln", 16), ("all", 5), ("all", 10), ("all", 22))
    },
    "full": ("--method full", "full"),
}
EXAMPLES = """
    make tune
    python -m examples.glyphs.tune --data quickstart --out tuning --methods full finediffusion --train "--max-steps 800"
"""


def trials(method: str) -> dict[str, list[str]]:
    """Return {name of a trial: flags of train.py} of a method."""
    flags, kind = METHODS[method]
    flag, rates = RATES[kind]
    return {f"{method}, {rate}": [*shlex.split(flags), flag, rate] for rate in rates}


def tune(args: argparse.Namespace):
    """Train and judge all trials, and write the best of each method."""
    hierarchy = Hierarchy.from_folder(args.data / "train")
    validation = args.out / "validation"
    draw.write_images_once(validation, "new", held_out=False, per_class=6, seed=1)
    todo = {name: flags for method in args.methods for name, flags in trials(method).items()}
    adapters = study.train_all(args, hierarchy, todo)
    measure, _ = study.make_judge(args.data / "train", validation)
    rows = study.sample_all(args, adapters, load_autoencoder("examples/glyphs/vae"), measure, [SCALE])
    found = {name: {metric: values[0] for metric, values in row[str(SCALE)].items()} for name, row in rows.items()}

    best = {method: min(trials(method), key=lambda name: found[name]["distance"]) for method in args.methods}
    chosen = {method: todo[name] for method, name in best.items()}
    atomic_write(args.out / "tuned.json", lambda part: part.write_text(json.dumps(chosen, indent=1) + "\n"))
    cells = [
        [name + " (best)" * (name in best.values()), f"{row['distance']:.2f}", f"{100 * row['class']:.1f}"]
        for name, row in found.items()
    ]
    lines = markdown_table(["trial", "Frechet distance", "right class, %"], cells, align="lrr")
    atomic_write(args.out / "tune.md", lambda part: part.write_text("\n".join(lines) + "\n"))
    print("\n".join(lines))


def main():
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with the glyphs train/")
    add("--out", type=Path, required=True, help="folder for runs and results; the same one resumes")
    add("--train", required=True, help="flags of train.py that all methods share, without learning rates")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="methods to tune")
    add("--per-class", type=int, default=4, help="images to sample per class")
    add("--jobs", type=int, default=2, help="training runs at a time, each on one core")
    args = parser.parse_args()
    args.seeds = [SEED]
    tune(args)


if __name__ == "__main__":
    run_command(main)
