"""The paper's figures and tables, from adapters, folders of images and evaluations.

    python -m tools.figures grid --ckpt results/inat/adapters/0200000.safetensors --columns 8 --out figures/grid
    python -m tools.figures compare --real inat/val --adapters Full=A.safetensors FineDiffusion=B.safetensors
    python -m tools.figures text-to-image --ckpt B.safetensors --pipeline stabilityai/sd-turbo --classes "Vulpes vulpes"
    python -m tools.figures tsne --ckpt B.safetensors
    python -m tools.figures tradeoff --runs Full=results/full FineDiffusion=results/inat --metrics eval/*/metrics.json
    python -m tools.figures convergence --metric kid --runs ... --metrics ...
    python -m tools.figures tables --runs ... --metrics ...

Each writes OUT.png and OUT.pdf; `tsne` its numbers as OUT.json besides, `tables` OUT.md alone. See docs/figures.md.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch

from checkpoint.format import is_adapter, read_description
from evaluation.image_sets import Folder
from hierarchy import Hierarchy
from runtime.cli import Parser, check_range, run_command
from runtime.files import atomic_write
from sampling.grid import caption
from sampling.options import add_options, check_options
from tools.figures import class_rows, gallery, plots, scores

PAPER = Path(__file__).resolve().parent / "paper.json"
ROWS = 5  # classes of compare and text-to-image, without --classes


def named(entries, flag):
    """{name: path} of NAME=PATH."""
    pairs = [entry.partition("=") for entry in entries]
    for (name, _, path), entry in zip(pairs, entries):
        if not name or not path:
            raise ValueError(f"{flag} has {entry}, expected NAME=PATH: give it a name.")
    found = {name: path for name, _, path in pairs}
    if len(found) < len(pairs):
        raise ValueError(f"{flag} gives a name twice ({', '.join(name for name, _, _ in pairs)}): change one.")
    return found


def spread(labels, count):
    """`count` of the labels, or all, evenly over their order."""
    places = np.linspace(0, len(labels) - 1, min(count, len(labels))).round().astype(int)
    return [int(labels[i]) for i in places]


# ---- images --------------------------------------------------------------------------------------------------------


def chosen(args, hierarchy):
    """Labels of --classes, or a few of all."""
    if args.classes:
        return [hierarchy.find(query) for query in args.classes]
    return spread(range(hierarchy.num_classes), ROWS)


def beside(hierarchy, labels, columns):
    """A row for each of `labels`; `columns`: {title: its images}."""
    names = [caption(hierarchy.classes[label]) for label in labels]
    return plots.mosaic(list(zip(*columns.values())), row_titles=names, column_titles=list(columns))


def grid(args):
    """Rows of superclasses: the paper's Figures 1 and 4."""
    if (args.ckpt is None) == (args.images is None):
        raise ValueError("grid shows the images of --ckpt or those in --images, expected one of the two: pass it.")
    if args.images:
        folder = Folder(Path(args.images))
        hierarchy = Hierarchy.load(args.hierarchy) if args.hierarchy else folder.own_hierarchy()
        folder.label(hierarchy)
        there = sorted(set(folder.labels.tolist()))
    else:
        source = gallery.opened(args, args.ckpt)
        hierarchy = source.description.hierarchy
        there = range(hierarchy.num_classes)
    there = chosen(args, hierarchy) if args.classes else there
    rows = [[c for c in there if hierarchy.parents[c] == s] for s in range(hierarchy.num_super_classes)]
    rows = [row[: args.columns] if args.classes else spread(row, args.columns) for row in rows]
    labels = [label for row in rows for label in row]
    if args.images:
        images = iter(gallery.first_images(folder, hierarchy, labels))
    else:
        images = iter(gallery.sampled(args, source, labels, labels, "grid"))
    names = [[caption(hierarchy.classes[label]) for label in row] for row in rows if row]
    titles = [name.replace("_", " ") for name, row in zip(hierarchy.superclasses, rows) if row]
    return plots.mosaic([[next(images) for _ in row] for row in rows if row], names, titles)


def compare(args):
    """The same classes and noise under several adapters, real images first: Figure 5."""
    adapters = named(args.adapters, "--adapters")
    for path in adapters.values():
        if not is_adapter(path):
            raise ValueError(f"{path} is not an adapter, expected one that train.py wrote: name another file.")
    about = {name: read_description(path) for name, path in adapters.items()}
    first = next(iter(about.values()))
    hierarchy, size = first.hierarchy, max(each.image_size for each in about.values())
    labels = chosen(args, hierarchy)
    columns = {"Real": gallery.real_images(args.real, hierarchy, labels, size)}
    own = {name: [each.hierarchy.find(hierarchy.classes[label]) for label in labels] for name, each in about.items()}
    for name, path in adapters.items():
        columns[name] = gallery.sampled(args, gallery.opened(args, path), own[name], labels, name)
    return beside(hierarchy, labels, columns)


def text_to_image(args):
    """The same classes by a text-to-image pipeline, from the prompt "a photo of X", and by an adapter: Figure 6."""
    if args.ckpt is None:
        raise ValueError("text-to-image stands beside an adapter's images, expected --ckpt: pass it.")
    if args.pipeline_steps is not None:
        check_range(args, pipeline_steps=(1, 1000))
    pipeline = gallery.load_pipeline(args.pipeline)
    source = gallery.opened(args, args.ckpt)
    hierarchy, size = source.description.hierarchy, source.description.image_size
    if hierarchy.numbered:
        raise ValueError(
            f"{hierarchy.name} has only numbers for classes, expected names for the prompts: pass the image folder as "
            "--hierarchy."
        )
    labels = chosen(args, hierarchy)
    columns = {"Real": gallery.real_images(args.real, hierarchy, labels, size)} if args.real else {}
    columns[Path(args.pipeline).name] = gallery.painted(pipeline, hierarchy, labels, args.seed, args.pipeline_steps)
    columns[args.title] = gallery.sampled(args, source, labels, labels, args.title)
    return beside(hierarchy, labels, columns)


# ---- the class table -----------------------------------------------------------------------------------------------


def tsne(args):
    """The class table by superclass: Figure 7, and what does not depend on t-SNE."""
    check_range(args, neighbours=(1, 10**6), seed=(0, 2**32 - 1), perplexity=(1, 10**6))
    rows, tops, hierarchy = class_rows.table_of(args.ckpt, args.hierarchy)
    if hierarchy.num_super_classes < 2 or len(rows) <= args.neighbours:
        raise ValueError(
            f"{hierarchy!r} is too small for {args.neighbours} neighbours, expected more classes, and two superclasses or more: "
            "pass fewer --neighbours, or another --ckpt."
        )
    groups, names = hierarchy.parents, [name.replace("_", " ") for name in hierarchy.superclasses]
    means = torch.stack([rows[groups == s].mean(0) for s in range(len(names))])
    parts = [rows, means] + [tops] * (tops is not None)
    points = class_rows.tsne(torch.cat(parts), args.perplexity, args.seed).split([len(part) for part in parts])
    found = class_rows.summary(rows, hierarchy, args.neighbours)
    text = (
        f"{found['neighbours']} nearest class rows, same superclass: {found['purity']:.1%} "
        f"(by chance {found['purity_by_chance']:.1%})\nsilhouette {found['silhouette']:.3f}; both on the rows themselves"
    )
    marks = dict(zip(("mean of the class rows", "superclass row"), points[1:]))
    figure = plots.embedding(points[0], groups, names, marks, text)
    atomic_write(f"{args.out}.json", lambda part: part.write_text(json.dumps(found, indent=1) + "\n"))
    print(text.replace("\n", "; "))
    return figure


# ---- runs ----------------------------------------------------------------------------------------------------------------


def evaluated(args):
    """({run: its scores by step}, what to write at the axis, and over a figure) of --runs and --metrics."""
    found = scores.match(named(args.runs, "--runs"), args.metrics)
    scores.check_alike(found)
    title, _, better = scores.FORMATS.get(args.metric, (args.metric, "", ""))
    return scores.by_run(found), f"{title} ({better} is better)" if better else title, scores.stamp(found)


def tradeoff(args):
    """A metric against trained parameters and training time: Figure 2."""
    runs, label, stamp = evaluated(args)
    last = {name: several[-1] for name, several in runs.items()}
    counts = {name: (score.figure("trained_params"), score.figure(args.metric)) for name, score in last.items()}
    times = {
        name: [(score.figures["hours"], score.figure(args.metric)) for score in several if "hours" in score.figures]
        for name, several in runs.items()
    }
    for name in [name for name, points in times.items() if not points]:
        print(f"{name}: its metrics.jsonl does not go as far as its adapters, so its time is not known")
        del times[name]
    return plots.tradeoff(counts, times, label, stamp)


def convergence(args):
    """A metric against the steps of training."""
    runs, label, stamp = evaluated(args)
    points = {name: [(score.step, score.figure(args.metric)) for score in several] for name, several in runs.items()}
    if max(map(len, points.values())) < 2:
        raise ValueError(
            "Every run was evaluated at one step, expected several: pass the metrics.json of more adapters."
        )
    return plots.curves(points, "training steps", label, stamp)


def tables(args):
    """The paper's Tables 1 to 4, its figures beside ours, in Markdown."""
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    text = scores.paper_tables(paper, scores.match(named(args.runs, "--runs"), args.metrics))
    atomic_write(f"{args.out}.md", lambda part: part.write_text(text, encoding="utf-8"))
    print(text)


# ---- the command ---------------------------------------------------------------------------------------------------------


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    kinds = parser.add_subparsers(dest="figure", required=True)

    def kind(draw):
        name = draw.__name__.replace("_", "-")
        add = kinds.add_parser(name, help=draw.__doc__, description=draw.__doc__).add_argument
        add("--out", default=f"figures/{name}", help="where to write, without the suffix")
        return add

    def sampling(draw, *without):
        add = kind(draw)
        add_options(lambda *names, **options: names[0] in without or add(*names, **options))
        add(
            "--classes",
            nargs="+",
            help='indices or names, such as 207 or "Vulpes vulpes" (default: a few, evenly spread)',
        )
        add("--seed", type=int, default=0)
        add("--batch-size", type=int, default=16)
        return add

    add = sampling(grid)
    add("--images", help="folder of generated images, in place of --ckpt")
    add("--columns", type=int, default=8, help="most classes of a superclass")

    add = sampling(compare, "--ckpt", "--base", "--weak")
    add("--adapters", nargs="+", required=True, metavar="NAME=PATH")
    add("--real", required=True, help="folder of real images")

    add = sampling(text_to_image)
    add("--pipeline", required=True, help="folder in diffusers' form, or a name on the Hugging Face Hub")
    add("--pipeline-steps", type=int, help="default: the pipeline's own")
    add("--title", default="FineDiffusion", help="of the images of --ckpt")
    add("--real", help="folder of real images, to stand first")

    add = kind(tsne)
    add("--ckpt", required=True, help="adapter or checkpoint")
    add("--hierarchy", help="of a checkpoint: inat2021, a .json file or an image folder")
    add("--neighbours", type=int, default=10, help="of the purity")
    add("--perplexity", type=float, default=30.0)
    add("--seed", type=int, default=0)

    for draw in (tradeoff, convergence, tables):
        add = kind(draw)
        add("--runs", nargs="+", required=True, metavar="NAME=FOLDER", help="runs of train.py")
        add("--metrics", nargs="+", required=True, metavar="FILE", help="metrics.json of evaluate.py")
        if draw is not tables:
            add("--metric", default="fid", help="fid, kid, lpips, ... as it is called in metrics.json")
    return parser.parse_args()


def check_settings(args):
    """ValueError where a flag makes no sense or nothing can be written; long work comes after."""
    stem = Path(args.out)
    args.out = stem.with_suffix("") if stem.suffix in (".png", ".pdf", ".md", ".json") else stem
    there = next(each for each in args.out.absolute().parents if each.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"{there} cannot be written, expected a folder for the figure: choose another --out.")
    if "sampler" in args:
        args.__dict__.setdefault("base", None)
        args.__dict__.setdefault("weak", None)
        check_options(args)
        check_range(args, seed=(0, 2**63 - 1), batch_size=(1, 10**9))
    if args.figure == "grid":
        check_range(args, columns=(1, 100))


DRAW = {
    draw.__name__.replace("_", "-"): draw
    for draw in (grid, compare, text_to_image, tsne, tradeoff, convergence, tables)
}


def main():
    args = parse_args()
    check_settings(args)
    figure = DRAW[args.figure](args)
    if figure:
        print(" ".join(map(str, plots.save(figure, args.out))))


if __name__ == "__main__":
    run_command(main)
