"""The classes that the generated images show worst, real images beside generated ones, from a folder of evaluate.py."""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dataset.images import center_crop
from evaluation.image_sets import Arrays, Folder, choose_hierarchy, open_set
from evaluation.per_class import CLASSES_FILE
from runtime.text import one_line
from sampling.grid import caption
from tools.figures import plots

ACROSS, TEXT, CELL = 2, 1.22, 0.355  # blocks side by side; inches of the text of a block and of an image
WORST = {  # --by: the larger, the worse
    "top1": lambda row: (-row["top1"], row["top1_real"] or 0.0, -(row["top5"] or 0.0), row["mistaken"] or 0.0),
    "lpips": lambda row: (abs(row["lpips"] - row["lpips_real"]),),
}
NEEDED = {"top1": ("top1",), "lpips": ("lpips", "lpips_real")}  # columns
FLAGS = {"top1": "--classifier", "lpips": "--lpips-trunk"}  # of evaluate.py, that give them
NAMES = ("class", "superclass", "mistaken_for")  # columns of text
COLUMNS = ("n_real", "n_fake", "top1", "top1_real", "top5", "mistaken", "lpips", "lpips_real")  # of numbers


def read_evaluation(folder: Path) -> tuple[dict, list[dict]]:
    """Return the metrics.json and the rows of the classes.csv of an evaluation; empty values are None.

    Raises ValueError if a file is absent or damaged.
    """
    for name in ("metrics.json", CLASSES_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"There is no {folder / name}, expected a folder of evaluate.py --output: name another.")
    try:
        report = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        report["real"]["path"], report["fake"]["path"], report["choices"]["image_size"]  # what is needed of it
        with open(folder / CLASSES_FILE, encoding="utf-8", newline="") as file:
            rows = [
                {key: value if key in NAMES else float(value) if value else None for key, value in row.items()}
                for row in csv.DictReader(file)
            ]
        if rows and not {*NAMES, *COLUMNS} <= rows[0].keys():
            raise ValueError(f"{CLASSES_FILE} has the columns {', '.join(rows[0])}")
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"{folder} is damaged ({one_line(error)}), expected files of evaluate.py: run it again."
        ) from None
    return report, rows


def worst_rows(rows: Sequence[dict], by: str, count: int, folder: Path) -> list[dict]:
    """Return the `count` worst rows that have real and generated images, the worst first; ties are in the order of the file.

    top1   the lowest accuracy; of equal ones the one with the higher accuracy on real images, then the lower top-5
    lpips  the largest difference between the LPIPS of generated and of real images

    Raises ValueError if no row has these metrics.
    """
    rows = [row for row in rows if row["n_real"] and row["n_fake"]]
    rows = [row for row in rows if all(row.get(key) is not None for key in NEEDED[by])]
    if not rows:
        raise ValueError(
            f"{folder} has no {by} of classes, expected an evaluation with {FLAGS[by]}: run it with that flag, or choose another "
            "--by."
        )
    return sorted(rows, key=WORST[by], reverse=True)[:count]


def images_of_classes(images: Folder | Arrays, labels: Sequence[int], each: int, size: int) -> list[list[np.ndarray]]:
    """Return the first `each` images of every label, uint8 (size, size, 3)."""
    chosen = [np.flatnonzero(images.labels == label)[:each].tolist() for label in labels]
    return [[np.asarray(center_crop(images.open(i), size)) for i in rows] for rows in chosen]


def describe(row: dict) -> list[str]:
    """Return the lines of text about a class, below its name."""
    lines = []
    if row["top1"] is not None:
        real = "" if row["top1_real"] is None else f" (real {row['top1_real']:.0%})"
        lines.append(f"{row['top1']:.0%} right{real}")
    if row["mistaken_for"]:
        lines.append(f"{row['mistaken']:.0%} {caption(row['mistaken_for'])}")
    if row["lpips"] is not None and row["lpips_real"] is not None:
        lines.append(f"LPIPS {row['lpips']:.2f} (real {row['lpips_real']:.2f})")
    return lines


@plots.styled
def class_blocks(rows: Sequence[dict], real: list[list[np.ndarray]], fake: list[list[np.ndarray]], each: int) -> Figure:
    """Draw a block for each row, down the columns of the page: text, `each` real images, as many generated ones."""
    gap, down = 0.06, -(-len(rows) // ACROSS)
    width, high, top = TEXT + 2 * each * CELL + 3 * gap, max(CELL, 0.5) + 0.04, 0.2
    size = (ACROSS * width, top + down * high)
    figure = Figure(figsize=size)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(size[1], 0))
    axes.set_axis_off()
    bold, small = plots.Font(plots.SMALL, weight="bold"), plots.Font(plots.SMALL)
    for i, (row, *sets) in enumerate(zip(rows, real, fake)):
        x, y = i // down * width + gap, top + i % down * high
        name = plots.wrap_caption(caption(row["class"]), bold, TEXT)
        lines = [plots.wrap_caption(line, small, TEXT, most=1) for line in describe(row)]
        axes.text(x, y, name, size=plots.SMALL, weight="bold", va="top")
        shift = (name.count("\n") + 1) * plots.LINE + 0.01
        axes.text(x, y + shift, "\n".join(lines), size=plots.SMALL, va="top")
        for j, (images, title) in enumerate(zip(sets, ("real", "generated"))):
            left = x + TEXT + gap + j * (each * CELL + gap)
            if y == top:
                axes.text(left + each * CELL / 2, top - 0.05, title, ha="center", va="bottom", weight="bold")
            for k, image in enumerate(images):
                extent = (left + k * CELL, left + (k + 1) * CELL, y + CELL, y)
                axes.imshow(image, extent=extent, aspect="auto")
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0))  # imshow changed the limits
    return figure


def worst(args: argparse.Namespace) -> Figure:
    """Draw the classes that a classifier finds worst, real images beside generated ones."""
    folder = Path(args.evaluation)
    report, rows = read_evaluation(folder)
    sets = [open_set(path or report[name]["path"]) for name, path in (("real", args.real), ("fake", args.fake))]
    for each in sets:
        if not isinstance(each, Folder | Arrays):
            raise ValueError(f"{each.path} holds statistics, expected images to show: name them with --real or --fake.")
    hierarchy = choose_hierarchy(args.hierarchy, sets)
    if hierarchy is None:
        raise ValueError("The images have no classes, expected class folders: name others with --real and --fake.")
    chosen = worst_rows(rows, args.by, args.count, folder)
    labels = [hierarchy.find(row["class"]) for row in chosen]
    columns = []
    for each in sets:
        each.label(hierarchy)
        columns.append(images_of_classes(each, labels, args.per_class, report["choices"]["image_size"]))
    return class_blocks(chosen, *columns, args.per_class)
