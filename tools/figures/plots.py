"""Plots for a paper: their style and layouts, saved as PNG for screens and PDF for print.

Sizes are in inches, 3.4 for a column and 7 for a page; text is at least 6 points. The same input gives the same bytes.
"""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath
from matplotlib.ticker import EngFormatter, NullFormatter

from runtime.files import atomic_write
from sampling.grid import ellipsize

COLUMN, PAGE = 3.4, 7.0
DPI = 300
# Okabe and Ito, "Color universal design", 2008: distinct under the common forms of colour blindness; markers and lines
# differ as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", ">", "X")  # 7 markers and 8 colours make 56 pairs
MARKS = ("*", 8), ("P", 6)  # marker and size of a mean and of a superclass row, as in the paper's Figure 7
LINES = ("-", "--", "-.", ":")
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # keep text as text
}


def styled(draw: Callable) -> Callable:
    """Decorate a drawing function to use STYLE."""

    @functools.wraps(draw)
    def drawing(*args, **options):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return drawing


@styled
def save(figure: Figure, stem: str | os.PathLike) -> list[Path]:
    """Write `stem`.png and `stem`.pdf atomically, without a date in them; return their paths."""
    paths = [Path(f"{stem}.png"), Path(f"{stem}.pdf")]
    # a PDF stores the pixels of images unchanged; a PNG resamples them
    for path, smooth, metadata in zip(paths, ("lanczos", "none"), ({"Software": None}, {"CreationDate": None})):
        for image in figure.findobj(AxesImage):
            image.set_interpolation(smooth)
        form = path.suffix[1:]
        atomic_write(path, lambda part: figure.savefig(part, dpi=DPI, format=form, metadata=metadata))  # noqa: B023
    return paths


# ---- rows of images ------------------------------------------------------------------------------

GAP = 0.03  # between images
WIDEST = 1.1  # width of an image at most
SMALL, LINE = 6, 0.1  # font size of a caption in points, and the height of a line


class Font:
    """Measure text in inches, with the method of a Pillow font that `sampling.grid.ellipsize` calls.

    size: in points; properties: of a matplotlib FontProperties
    """

    def __init__(self, size: float, **properties):
        self.size, self.properties = size, FontProperties(**properties)

    def getlength(self, text: str) -> float:
        return TextPath((0, 0), text, size=self.size, prop=self.properties).get_extents().width / 72 if text else 0


def wrap_caption(text: str, font: Font, width: float, most: int = 2) -> str:
    """Break `text` between words into at most `most` lines of `width` inches; cut a longer line with an ellipsis."""
    lines, words = [], text.split()
    while words and len(lines) < most:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        count = len(words) if len(lines) == most - 1 else count
        lines.append(ellipsize(" ".join(words[:count]), font, width))
        words = words[count:]
    return "\n".join(lines)


@styled
def mosaic(
    rows: Sequence[Sequence[np.ndarray | None]],
    captions: Sequence[Sequence[str]] = (),
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
) -> Figure:
    """Draw rows of square images, up to the width of a page.

    rows: uint8 (H, W, 3) of any size, or None for an empty place
    captions: a text below each image
    row_titles: text to the left of each row, rotated by 90 degrees
    column_titles: text above each column
    """
    columns = max(map(len, rows))
    left = 0.32 if row_titles else 0.0
    cell = min((PAGE - left) / columns - GAP, WIDEST)
    width = left + columns * (cell + GAP)
    small, bold = Font(SMALL), Font(7, weight="bold")
    top = 0.3 if column_titles else GAP
    below = 2 * LINE + 0.03 if captions else 0.0
    height = top + len(rows) * (cell + below + GAP)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for j, title in enumerate(column_titles):
        text = wrap_caption(title, bold, cell)
        axes.text(left + j * (cell + GAP) + cell / 2, top - 0.05, text, ha="center", va="bottom", weight="bold")
    for i, row in enumerate(rows):
        y = top + i * (cell + below + GAP)
        if row_titles:
            text = wrap_caption(row_titles[i], bold, cell + below)
            axes.text(left / 2, y + (cell + below) / 2, text, ha="center", va="center", rotation=90, weight="bold")
        for j, image in enumerate(row):
            x = left + j * (cell + GAP)
            if image is not None:
                axes.imshow(image, extent=(x, x + cell, y + cell, y), aspect="auto")
                if captions:
                    text = wrap_caption(captions[i][j], small, cell)
                    axes.text(x + cell / 2, y + cell + 0.02, text, size=SMALL, ha="center", va="top")
    axes.set(xlim=(0, width), ylim=(height, 0))  # imshow changed the limits
    return figure


# ---- groups of points ----------------------------------------------------------------------------


def group_style(i: int) -> dict:
    """Return colour and marker of group i: COLOURS in turn, then darker, then lighter ones."""
    r, g, b = to_rgb(COLOURS[i % len(COLOURS)])
    end = 1.0 if (r, g, b) == (0, 0, 0) else (i // len(COLOURS) % 3 == 2) * 1.0  # black can only be lighter
    share = (0.0, 0.45, 0.6)[i // len(COLOURS) % 3]
    colour = tuple((1 - share) * c + share * end for c in (r, g, b))
    return {"color": colour, "marker": MARKERS[i % len(MARKERS)]}


@styled
def embedding(
    points: torch.Tensor, groups: torch.Tensor, names: Sequence[str], marks: dict[str, torch.Tensor], text: str
) -> Figure:
    """Draw a map of points (N, 2) by group.

    groups: int64 (N,), indices into `names`
    marks: {legend: (S, 2)}, a point per group: the means, then the superclass rows if there are any; numbers stand at
        the last
    text: two lines below the legend
    """
    columns = 2 if len(names) <= 12 else 3
    height = COLUMN + 0.117 * -(-(len(names) + len(marks)) // columns) + 0.38
    figure = Figure(figsize=(COLUMN, height))
    axes = figure.add_axes((0.012, 1 - (COLUMN - 0.04) / height, 0.976, (COLUMN - 0.08) / height))
    axes.set(xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(True)
    area = min(14.0, max(1.6, 9000 / len(points)))
    for s in sorted(range(len(names)), key=lambda s: -int((groups == s).sum())):  # small groups on top
        x, y = points[groups == s].T
        axes.scatter(x, y, s=area, linewidths=0, alpha=0.8, rasterized=len(points) > 2000, **group_style(s))
    handles = [
        Line2D([], [], linestyle="", markersize=4, label=f"{s + 1} {name}", **group_style(s))
        for s, name in enumerate(names)
    ]
    edge = dict(markeredgecolor="black", markeredgewidth=0.7, linestyle="")
    for (label, places), (marker, size) in zip(marks.items(), MARKS):
        handles.append(Line2D([], [], marker=marker, markersize=size, label=label, color="white", **edge))
        for s, (x, y) in enumerate(places.tolist()):
            axes.plot(x, y, marker=marker, markersize=size, color=group_style(s)["color"], zorder=3, **edge)
    for s, place in enumerate(places.tolist()):
        number = axes.annotate(str(s + 1), place, (3, 2), textcoords="offset points", size=6, weight="bold", zorder=4)
        number.set_path_effects([withStroke(linewidth=1.5, foreground="white")])
    figure.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - (COLUMN - 0.03) / height),
        ncols=columns,
        columnspacing=1.0,
        handletextpad=0.2,
        labelspacing=0.25,
    )
    figure.text(0.5, 0.03 / height, text, ha="center", va="bottom", size=6.5, linespacing=1.3)
    return figure


# ---- runs ----------------------------------------------------------------------------------------


def add_legend_below(figure: Figure, handles: Sequence[Line2D]):
    """Add a legend of labelled lines below all panels of a figure."""
    labels = [handle.get_label() for handle in handles]
    most = next((n for n, letters in ((3, 18), (2, 30)) if max(map(len, labels)) <= letters), 1)  # columns that fit
    columns = -(-len(labels) // -(-len(labels) // most))  # of even length
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=3)


def add_warning(figure: Figure, warning: str):
    """Print a warning in red above a figure, unless it is empty."""
    if warning:
        figure.suptitle(warning, size=7, color="#aa3333")


@styled
def curves(runs: dict[str, list[tuple[float, float]]], x_label: str, y_label: str, warning: str = "") -> Figure:
    """Draw {name: [(x, y), ...]} as lines, one style per name."""
    figure = Figure(figsize=(COLUMN, 2.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(runs.items()):
        axes.plot(*zip(*points), linestyle=LINES[i % len(LINES)], label=name, **group_style(i))
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    add_legend_below(figure, axes.lines)
    add_warning(figure, warning)
    return figure


@styled
def tradeoff(
    parameters: dict[str, tuple[float, float]],
    times: dict[str, list[tuple[float, float]]],
    y_label: str,
    warning: str = "",
) -> Figure:
    """Draw y against trained parameters, {name: (count, y)}, and against hours, {name: [(hours, y), ...]}.

    Without `times` the second panel is left out.
    """
    figure = Figure(figsize=(COLUMN, 2.3), layout="constrained")
    panels = figure.subplots(1, 2 if times else 1, sharey=True, squeeze=False)[0]
    handles = []  # with the lines of the second panel
    for i, (name, (count, y)) in enumerate(parameters.items()):
        handles += panels[0].plot([count], [y], linestyle="", label=name, **group_style(i))
        if name in times:
            handles[-1:] = panels[1].plot(
                *zip(*times[name]), linestyle=LINES[i % len(LINES)], label=name, **group_style(i)
            )
    panels[0].set(xlabel="trained parameters", ylabel=y_label, xscale="log")
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].xaxis.set_minor_formatter(NullFormatter())
    panels[0].margins(x=0.25)
    if times:
        panels[1].set(xlabel="training time, hours")
    add_legend_below(figure, handles)
    add_warning(figure, warning)
    return figure
