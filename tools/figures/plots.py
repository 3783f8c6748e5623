"""Figures for a paper: how they look, and the forms they take; one file for the eye (PNG) and one for print (PDF).

Sizes are inches, 3.4 for a column and 7 for a page; text is at least 6 points. The same input gives the same bytes.
"""

import functools
from pathlib import Path
from types import SimpleNamespace

import matplotlib
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
# Okabe and Ito, "Color universal design", 2008: told apart with any of the common colour blindnesses; here the marker and
# the line tell as well
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # 7 of them with 8 colours: 56 pairs
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
    "pdf.fonttype": 42,  # text stays text
}


def styled(draw):
    """Call a function that draws with the look of all figures."""

    @functools.wraps(draw)
    def drawing(*args, **options):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return drawing


@styled
def save(figure, stem):
    """`stem`.png and `stem`.pdf, each whole or not at all; no date in them."""
    paths = [Path(f"{stem}.png"), Path(f"{stem}.pdf")]
    # PDF keeps the pixels of images as they are; PNG has its own
    for path, smooth, metadata in zip(paths, ("lanczos", "none"), ({"Software": None}, {"CreationDate": None})):
        for image in figure.findobj(AxesImage):
            image.set_interpolation(smooth)
        form = path.suffix[1:]
        atomic_write(path, lambda part: figure.savefig(part, dpi=DPI, format=form, metadata=metadata))  # noqa: B023
    return paths


# ---- rows of images --------------------------------------------------------------------------------------------------

GAP = 0.03  # between images
WIDEST = 1.1  # an image
SMALL, LINE = 6, 0.1  # a caption's points, and what a line of it takes


def font_of(size, **font):
    """What `pictures.fitted` measures with, in inches."""

    def getlength(text):
        return TextPath((0, 0), text, size=size, prop=FontProperties(**font)).get_extents().width / 72 if text else 0

    return SimpleNamespace(getlength=getlength)


def wrapped(text, font, width, most=2):
    """`text` in at most so many lines of `width` inches, broken between words; what is too long ends in an ellipsis."""
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
def mosaic(rows, captions=(), row_titles=(), column_titles=()):
    """Rows of square images, uint8 (H, W, 3) of any size or None for an empty place, as wide as a page if there are enough.

    `captions`: the same rows of texts, below the images; `row_titles`: upright at the left; `column_titles`: above.
    """
    columns = max(map(len, rows))
    left = 0.32 if row_titles else 0.0
    cell = min((PAGE - left) / columns - GAP, WIDEST)
    width = left + columns * (cell + GAP)
    small, bold = font_of(SMALL), font_of(7, weight="bold")
    top = 0.3 if column_titles else GAP
    below = 2 * LINE + 0.03 if captions else 0.0
    height = top + len(rows) * (cell + below + GAP)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for j, title in enumerate(column_titles):
        text = wrapped(title, bold, cell)
        axes.text(left + j * (cell + GAP) + cell / 2, top - 0.05, text, ha="center", va="bottom", weight="bold")
    for i, row in enumerate(rows):
        y = top + i * (cell + below + GAP)
        if row_titles:
            text = wrapped(row_titles[i], bold, cell + below)
            axes.text(left / 2, y + (cell + below) / 2, text, ha="center", va="center", rotation=90, weight="bold")
        for j, image in enumerate(row):
            x = left + j * (cell + GAP)
            if image is not None:
                axes.imshow(image, extent=(x, x + cell, y + cell, y), aspect="auto")
                if captions:
                    text = wrapped(captions[i][j], small, cell)
                    axes.text(x + cell / 2, y + cell + 0.02, text, size=SMALL, ha="center", va="top")
    axes.set(xlim=(0, width), ylim=(height, 0))  # imshow has moved them
    return figure


# ---- groups of points ------------------------------------------------------------------------------------------------


def look(i):
    """Colour and marker of the i-th group: the colours as they are, then darker, then lighter."""
    r, g, b = to_rgb(COLOURS[i % len(COLOURS)])
    end = 1.0 if (r, g, b) == (0, 0, 0) else (i // len(COLOURS) % 3 == 2) * 1.0  # black can only be lighter
    share = (0.0, 0.45, 0.6)[i // len(COLOURS) % 3]
    colour = tuple((1 - share) * c + share * end for c in (r, g, b))
    return {"color": colour, "marker": MARKERS[i % len(MARKERS)]}


@styled
def embedding(points, groups, names, marks, text):
    """A map of rows: `points` (N, 2) of `groups` (N,), values of which are places in `names`.

    `marks`: {what it is: (S, 2), a place for each group}, one or two, the last numbered; `text`: two lines below the legend.
    """
    columns = 2 if len(names) <= 12 else 3
    height = COLUMN + 0.117 * -(-(len(names) + len(marks)) // columns) + 0.38
    figure = Figure(figsize=(COLUMN, height))
    axes = figure.add_axes((0.012, 1 - (COLUMN - 0.04) / height, 0.976, (COLUMN - 0.08) / height))
    axes.set(xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(True)
    area = min(14.0, max(1.6, 9000 / len(points)))
    for s in sorted(range(len(names)), key=lambda s: -int((groups == s).sum())):  # the small ones on top
        x, y = points[groups == s].T
        axes.scatter(x, y, s=area, linewidths=0, alpha=0.8, rasterized=len(points) > 2000, **look(s))
    handles = [
        Line2D([], [], linestyle="", markersize=4, label=f"{s + 1} {name}", **look(s)) for s, name in enumerate(names)
    ]
    edge = dict(markeredgecolor="black", markeredgewidth=0.7, linestyle="")
    for (label, places), marker, size in zip(marks.items(), ("d", "*"), (5, 8)):
        handles.append(Line2D([], [], marker=marker, markersize=size, label=label, color="white", **edge))
        for s, (x, y) in enumerate(places.tolist()):
            axes.plot(x, y, marker=marker, markersize=size, color=look(s)["color"], zorder=3, **edge)
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


# ---- runs ------------------------------------------------------------------------------------------------------------


def legend_below(figure, axes):
    handles, labels = axes.get_legend_handles_labels()
    columns = -(-len(labels) // -(-len(labels) // 3))  # at most 3, filled evenly
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2, handlelength=3)


def stamped(figure, stamp):
    if stamp:
        figure.suptitle(stamp, size=7, color="#aa3333")
    return figure


@styled
def curves(runs, x_label, y_label, stamp=""):
    """{name: [(x, y), ...]} as lines, one style for each name."""
    figure = Figure(figsize=(COLUMN, 2.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(runs.items()):
        axes.plot(*zip(*points), linestyle=LINES[i % len(LINES)], label=name, **look(i))
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend_below(figure, axes)
    return stamped(figure, stamp)


@styled
def tradeoff(parameters, times, y_label, stamp=""):
    """{name: (trained parameters, y)}, on a logarithmic axis, and {name: [(hours, y), ...]}; the latter may be empty."""
    figure = Figure(figsize=(COLUMN, 2.3), layout="constrained")
    panels = figure.subplots(1, 2 if times else 1, sharey=True, squeeze=False)[0]
    for i, (name, (count, y)) in enumerate(parameters.items()):
        panels[0].plot([count], [y], linestyle="", label=name, **look(i))
        if name in times:
            panels[1].plot(*zip(*times[name]), linestyle=LINES[i % len(LINES)], **look(i))
    panels[0].set(xlabel="trained parameters", ylabel=y_label, xscale="log")
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].xaxis.set_minor_formatter(NullFormatter())
    panels[0].margins(x=0.15)
    if times:
        panels[1].set(xlabel="training time, hours")
    legend_below(figure, panels[0])
    return stamped(figure, stamp)
