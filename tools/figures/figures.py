"""Draw each kind of figure from the flags of `python -m tools.figures KIND`.

Each function returns a matplotlib Figure; `tables` writes Markdown and returns None.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from checkpoint.format import is_adapter, read_description
from evaluation.image_sets import Folder
from hierarchy import Hierarchy
from runtime.files import atomic_write
from sampling.grid import caption
from tools.figures import class_rows, gallery, paper_tables, plots, scores

ROWS = 5  # classes of compare and text-to-image without --classes


def parse_named(entries: Sequence[str], flag: str) -> dict[str, str]:
    """Return {name: path} of entries NAME=PATH; raise ValueError if a name is missing or repeated."""
    pairs = [entry.partition("=") for entry in entries]
    for (name, _, path), entry in zip(pairs, entries):
        if not name or not path:
            raise ValueError(f"{flag} has {entry}, expected NAME=PATH: give it a name.")
    found = {name: path for name, _, path in pairs}
    if len(found) < len(pairs):
        raise ValueError(f"{flag} gives a name twice ({', '.join(name for name, _, _ in pairs)}): change one.")
    return found


def spread_evenly(labels: Sequence[int], count: int) -> list[int]:
    """Return at most `count` labels, evenly spaced over `labels`."""
    places = np.linspace(0, len(labels) - 1, min(count, len(labels))).round().astype(int)
    return [int(labels[i]) for i in places]


# ---- images --------------------------------------------------------------------------------------


def choose_labels(args: argparse.Namespace, hierarchy: Hierarchy) -> list[int]:
    """Return the labels of --classes, or ROWS evenly spaced ones."""
    if args.classes:
        return [hierarchy.find(query) for query in args.classes]
    return spread_evenly(range(hierarchy.num_classes), ROWS)


def side_by_side(hierarchy: Hierarchy, labels: list[int], columns: dict[str, list[np.ndarray]]) -> Figure:
    """Draw a row per label and a column per title; columns: {title: one image per label}"""
    names = [caption(hierarchy.classes[label]) for label in labels]
    return plots.mosaic(list(zip(*columns.values())), row_titles=names, column_titles=list(columns))


def grid(args: argparse.Namespace) -> Figure:
    """Draw a row of classes per superclass (the paper's Figures 1 and 4)."""
    if args.images:
        folder = Folder(Path(args.images))
        hierarchy = Hierarchy.load(args.hierarchy) if args.hierarchy else folder.own_hierarchy()
        folder.label(hierarchy)
        labels = sorted(set(folder.labels.tolist()))
    else:
        source = gallery.load_source(args, args.ckpt)
        hierarchy = source.description.hierarchy
        labels = range(hierarchy.num_classes)
    if args.classes:
        labels = choose_labels(args, hierarchy)
    # rows of labels, one per superclass that has any
    rows = [[c for c in labels if hierarchy.parents[c] == s] for s in range(hierarchy.num_super_classes)]
    rows = [row[: args.columns] if args.classes else spread_evenly(row, args.columns) for row in rows if row]
    labels = [label for row in rows for label in row]
    if args.images:
        images = iter(gallery.first_images(folder, hierarchy, labels))
    else:
        images = iter(gallery.sample_images(args, source, labels, labels, "grid"))
    captions = [[caption(hierarchy.classes[label]) for label in row] for row in rows]
    titles = [hierarchy.superclasses[hierarchy.parents[row[0]]].replace("_", " ") for row in rows]
    return plots.mosaic([[next(images) for _ in row] for row in rows], captions, titles)


def compare(args: argparse.Namespace) -> Figure:
    """Draw the same classes and noise under several adapters, real images first (Figure 5)."""
    adapters = parse_named(args.adapters, "--adapters")
    for path in adapters.values():
        if not is_adapter(path):
            raise ValueError(f"{path} is not an adapter, expected one that train.py wrote: name another file.")
    descriptions = {name: read_description(path) for name, path in adapters.items()}
    hierarchy = next(iter(descriptions.values())).hierarchy
    size = max(each.image_size for each in descriptions.values())
    labels = choose_labels(args, hierarchy)
    columns = {"Real": gallery.real_images(args.real, hierarchy, labels, size)}
    # adapters may number the classes differently: labels are each adapter's own, noise goes by the first adapter's
    own = {
        name: [each.hierarchy.find(hierarchy.classes[label]) for label in labels] for name, each in descriptions.items()
    }
    for name, path in adapters.items():
        columns[name] = gallery.sample_images(args, gallery.load_source(args, path), own[name], labels, name)
    return side_by_side(hierarchy, labels, columns)


def text_to_image(args: argparse.Namespace) -> Figure:
    """Draw the same classes from a text-to-image pipeline, prompt "a photo of X", and from --ckpt (Figure 6)."""
    pipeline = gallery.load_pipeline(args.pipeline)
    source = gallery.load_source(args, args.ckpt)
    hierarchy, size = source.description.hierarchy, source.description.image_size
    if hierarchy.numbered:
        raise ValueError(
            f"{hierarchy.name} has only numbers for classes, expected names for the prompts: pass the image folder as "
            "--hierarchy."
        )
    labels = choose_labels(args, hierarchy)
    columns = {"Real": gallery.real_images(args.real, hierarchy, labels, size)} if args.real else {}
    title = Path(args.pipeline).name
    columns[title] = gallery.prompt_images(pipeline, hierarchy, labels, args.seed, args.pipeline_steps)
    columns[args.title] = gallery.sample_images(args, source, labels, labels, args.title)
    return side_by_side(hierarchy, labels, columns)


# ---- class table ---------------------------------------------------------------------------------


def tsne(args: argparse.Namespace) -> Figure:
    """Draw a t-SNE map of the class table by superclass (Figure 7); measure the separation without t-SNE."""
    rows, superclass_rows, hierarchy = class_rows.read_class_table(args.ckpt, args.hierarchy)
    if hierarchy.num_super_classes < 2 or len(rows) <= args.neighbours:
        raise ValueError(
            f"{hierarchy!r} is too small for {args.neighbours} neighbours, expected more classes, and two superclasses or more: "
            "pass fewer --neighbours, or another --ckpt."
        )
    groups, names = hierarchy.parents, [name.replace("_", " ") for name in hierarchy.superclasses]
    means = torch.stack([rows[groups == s].mean(0) for s in range(len(names))])
    parts = [rows, means] if superclass_rows is None else [rows, means, superclass_rows]
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


# ---- runs ----------------------------------------------------------------------------------------


def load_scores(args: argparse.Namespace) -> tuple[dict[str, list[scores.Score]], str, str]:
    """Return the scores of --runs and --metrics by legend and step, the label of the metric's axis, and a warning or ""."""
    found = scores.match(parse_named(args.runs, "--runs"), args.metrics)
    scores.check_alike(found)
    runs = scores.by_run(found)
    legends, warning = scores.legends(runs), scores.comparability_warning(found)
    return {legends[name]: several for name, several in runs.items()}, scores.axis_label(args.metric), warning


def tradeoff(args: argparse.Namespace) -> Figure:
    """Draw a metric against trained parameters and training time (Figure 2)."""
    runs, label, warning = load_scores(args)
    last = {name: several[-1] for name, several in runs.items()}
    counts = {name: (score.metric("trained_params"), score.metric(args.metric)) for name, score in last.items()}
    times = {
        name: [(score.metrics["hours"], score.metric(args.metric)) for score in several if "hours" in score.metrics]
        for name, several in runs.items()
    }
    for name in [name for name, points in times.items() if not points]:
        print(f"{name}: metrics.jsonl ends before its adapters, so its training time is unknown")
        del times[name]
    return plots.tradeoff(counts, times, label, warning)


def convergence(args: argparse.Namespace) -> Figure:
    """Draw a metric against training steps."""
    runs, label, warning = load_scores(args)
    points = {name: [(score.step, score.metric(args.metric)) for score in several] for name, several in runs.items()}
    if max(map(len, points.values())) < 2:
        raise ValueError(
            "Every run was evaluated at one step, expected several: pass the metrics.json of more adapters."
        )
    return plots.curves(points, "training steps", label, warning)


def tables(args: argparse.Namespace):
    """Write the paper's Tables 1 to 4 in Markdown with ours beside them, and tables of other data sets."""
    found = scores.match(parse_named(args.runs, "--runs"), args.metrics) if args.runs else []
    text = paper_tables.all_tables(found)
    atomic_write(f"{args.out}.md", lambda part: part.write_text(text, encoding="utf-8"))
    print(text)
