"""Draw the paper's figures and fill its tables from adapters, folders of images and evaluations.

    python -m tools.figures KIND ... [--out STEM]

Writes STEM.png and STEM.pdf; `tsne` also STEM.json, and `tables` only STEM.md. See docs/figures.md.
"""

import argparse
import os
from pathlib import Path

from runtime.cli import Parser, check_range, run_command
from runtime.files import nearest_existing
from sampling.options import add_options, check_options
from tools.figures import figures, plots, worst_classes

ADAPTER = "results/inat/adapters/0200000.safetensors"
RUNS = "--runs Full=results/full FineDiffusion=results/inat --metrics eval/*/metrics.json"
EXAMPLES = {  # kind: command lines without "python -m tools.figures"
    "grid": (f"grid --ckpt {ADAPTER} --columns 8 --out figures/grid", "grid --images samples --hierarchy inat2021"),
    "compare": (
        f"compare --real inat/val --adapters Full=full.safetensors FineDiffusion={ADAPTER}",
        f'compare --real inat/val --adapters FineDiffusion={ADAPTER} --classes "Vulpes vulpes" 207',
    ),
    "text-to-image": (
        f'text-to-image --ckpt {ADAPTER} --pipeline stabilityai/sd-turbo --classes "Vulpes vulpes"',
        f"text-to-image --ckpt {ADAPTER} --pipeline stabilityai/sd-turbo --pipeline-steps 4 --real inat/val",
    ),
    "tsne": (f"tsne --ckpt {ADAPTER}", "tsne --ckpt finediffusion.pt --hierarchy inat2021 --neighbours 20"),
    "tradeoff": (f"tradeoff {RUNS}", f"tradeoff {RUNS} --metric kid"),
    "convergence": (f"convergence {RUNS}", f"convergence {RUNS} --metric lpips"),
    "worst": ("worst --evaluation evaluation/inat", "worst --evaluation evaluation/inat --count 20 --by lpips"),
    "tables": (f"tables {RUNS}", "tables --out paper"),
}
DRAW = {
    "grid": figures.grid,
    "compare": figures.compare,
    "text-to-image": figures.text_to_image,
    "tsne": figures.tsne,
    "tradeoff": figures.tradeoff,
    "convergence": figures.convergence,
    "worst": worst_classes.worst,
    "tables": figures.tables,
}
SAMPLING_KINDS = ("grid", "compare", "text-to-image")


# ---- flags ---------------------------------------------------------------------------------------


def output_stem(text: str) -> Path:
    """Return --out without the suffix of a file that this command writes."""
    path = Path(text)
    return path.with_suffix("") if path.suffix in (".png", ".pdf", ".md", ".json") else path


def add_sampling_options(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()):
    """Add the flags of sample.py, except those in `without`, and the choice of classes."""
    add_options(parser, ("--preset", *without))
    add = parser.add_argument_group("images").add_argument
    add(
        "--classes",
        nargs="+",
        help='indices or names, such as 207 or "Vulpes vulpes" (default: a few, evenly spaced)',
    )
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--batch-size", type=int, default=16, help="images per batch")


def add_run_options(parser: argparse.ArgumentParser, required: bool = True):
    """Add the flags that name runs and their evaluations."""
    add = parser.add_argument_group("runs").add_argument
    add("--runs", nargs="+", required=required, metavar="NAME=PATH", help="runs of train.py, adapters or checkpoints")
    add("--metrics", nargs="+", required=required, metavar="FILE", help="metrics.json files of evaluate.py")


def parse_args() -> argparse.Namespace:
    def examples(kinds):
        return "\n".join(f"python -m tools.figures {line}" for line in kinds)

    parser = Parser(
        description=__doc__.split("\n")[0], examples=examples([EXAMPLES["grid"][0], EXAMPLES["tradeoff"][0]])
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    parsers = {}
    for kind, draw in DRAW.items():
        text = draw.__doc__.split("\n")[0]
        parsers[kind] = kinds.add_parser(kind, help=text, description=text, examples=examples(EXAMPLES[kind]))
        files = "STEM.md" if kind == "tables" else "STEM.png and STEM.pdf"
        help = f"write {files}; may end in such a suffix"
        add = parsers[kind].add_argument_group("output").add_argument
        add("--out", type=output_stem, default=f"figures/{kind}", metavar="STEM", help=help)

    add_sampling_options(parsers["grid"])
    add = parsers["grid"].add_argument_group("grid").add_argument
    add("--images", help="folder of generated images, instead of --ckpt")
    add("--columns", type=int, default=8, help="most classes per superclass")

    add_sampling_options(parsers["compare"], without=("--ckpt", "--base", "--weak"))
    add = parsers["compare"].add_argument_group("compare").add_argument
    add("--adapters", nargs="+", required=True, metavar="NAME=PATH", help="adapters, one column each")
    add("--real", required=True, help="folder of real images, the first column")

    add_sampling_options(parsers["text-to-image"])
    add = parsers["text-to-image"].add_argument_group("text-to-image").add_argument
    add("--pipeline", required=True, help="folder in diffusers' form, or a name on the Hugging Face Hub")
    add("--pipeline-steps", type=int, help="sampling steps of the pipeline (default: its own)")
    add("--title", default="FineDiffusion", help="title of the images of --ckpt")
    add("--real", help="folder of real images, the first column")

    add = parsers["tsne"].add_argument_group("tsne").add_argument
    add("--ckpt", required=True, help="adapter or checkpoint")
    add("--hierarchy", help="hierarchy of a checkpoint: inat2021, a .json file or an image folder")
    add("--neighbours", type=int, default=10, help="nearest rows that the purity looks at")
    add("--perplexity", type=float, default=30.0, help="perplexity of t-SNE")
    add("--seed", type=int, default=0, help="seed of t-SNE")

    add = parsers["worst"].add_argument_group("worst").add_argument
    add("--evaluation", required=True, metavar="DIR", help="folder of evaluate.py --output, with its classes.csv")
    add(
        "--by",
        choices=list(worst_classes.WORST),
        default="top1",
        help="lowest accuracy, or LPIPS furthest from the real one",
    )
    add("--count", type=int, default=50, help="number of classes")
    add("--per-class", type=int, default=3, help="images of each class from either set, the first ones")
    for name in ("real", "fake"):
        add(f"--{name}", help=f"{name.upper()} of the evaluation (default: the path in its metrics.json)")
    add("--hierarchy", help="hierarchy of the evaluation (default: that of the images)")

    for kind in ("tradeoff", "convergence", "tables"):
        add_run_options(parsers[kind], required=kind != "tables")
    for kind in ("tradeoff", "convergence"):
        parsers[kind].add_argument("--metric", default="fid", help="a key of metrics.json: fid, kid, lpips, ...")
    return parser.parse_args()


def check_settings(args: argparse.Namespace):
    """Raise ValueError if flags are invalid or the output cannot be written, before any long work."""
    folder = nearest_existing(args.out.parent)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"{folder} cannot be written, expected a folder for the figure: choose another --out.")
    if args.kind in SAMPLING_KINDS:
        check_options(args)
        check_range(args, seed=(0, 2**63 - 1), batch_size=(1, 10**9))
    if args.kind == "grid":
        check_range(args, columns=(1, 100))
        if (args.ckpt is None) == (args.images is None):
            found = "neither" if args.ckpt is None else "both"
            raise ValueError(f"Found {found} of --ckpt and --images, expected one of the two: pass it alone.")
    if args.kind == "text-to-image":
        check_range(args, pipeline_steps=(1, 1000))
        if args.ckpt is None:
            raise ValueError("text-to-image needs an adapter to compare with, expected --ckpt: pass it.")
    if args.kind == "tables" and (args.runs is None) != (args.metrics is None):
        missing = "--runs" if args.runs is None else "--metrics"
        raise ValueError(f"{missing} is missing, expected both --runs and --metrics, or neither for the paper alone.")
    if args.kind == "worst":
        check_range(args, count=(1, 1000), per_class=(1, 10))
    if args.kind == "tsne":
        check_range(args, neighbours=(1, 10**6), seed=(0, 2**32 - 1), perplexity=(1, 10**6))


# ---- the command ---------------------------------------------------------------------------------


def main():
    args = parse_args()
    check_settings(args)
    figure = DRAW[args.kind](args)
    if figure:
        print(" ".join(map(str, plots.save(figure, args.out))))


if __name__ == "__main__":
    run_command(main)
