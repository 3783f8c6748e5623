"""The bar figure of a report: a panel for each metric, with its value on real images beside it."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

WIDTH, ACROSS = 7.5, 3  # inches of a page, panels side by side
MOST_ROWS = 40  # superclasses that are drawn, those with most real images
COLOURS = {"generated": "#0072B2", "real": "#999999"}
LOWER, EQUAL, HIGHER = "lower is better", "best if equal", "higher is better"


@dataclass(frozen=True)
class Panel:
    """A metric of generated images and its value on real ones.

    title, hint      above and below the bars
    generated, real  get the value from a row of the report, None if it is absent
    """

    title: str
    hint: str
    generated: Callable[[dict], float | None]
    real: Callable[[dict], float | None] = lambda row: None


def panels(report: dict) -> list[Panel]:
    """Return the panels that have a value in some row."""
    found = distance_panels("FID", "KID", "fid", lambda row: row)
    for name in report["overall"].get("features", {}):
        found += distance_panels(f"FD {name}", f"KID {name}", "fd", lambda row, name=name: row["features"][name])
    for title, key, hint in (
        ("LPIPS within classes", "lpips", EQUAL),
        ("LPIPS pooled", "lpips_pooled", EQUAL),
        ("top-1 accuracy", "top1", HIGHER),
        ("superclass accuracy", "superclass_accuracy", HIGHER),
    ):
        found.append(Panel(title, hint, *(lambda row, k=k: row.get(k) for k in (key, f"{key}_real"))))
    rows = [*report["superclasses"].values(), report["overall"]]
    return [panel for panel in found if any(panel.generated(row) is not None for row in rows)]


def distance_panels(title: str, kid: str, key: str, values: Callable[[dict], dict]) -> list[Panel]:
    """Return the panels of one network's distances; the floor stands beside the distance at the same number of images.

    key: of the Frechet distance; values: from a row to the network's part of it
    """

    def get(name):
        return lambda row: values(row).get(name)

    def floor_at_all(row):  # of a second real set, which has as many images as FAKE
        return None if f"{key}_at_floor_n" in values(row) else values(row).get("floor")

    def kid_1000(row):
        return None if values(row).get("kid") is None else 1000 * values(row)["kid"]

    hint = f"{LOWER}, depends on n"
    return [
        Panel(title, hint, get(key), floor_at_all),
        Panel(f"{title} at floor n", hint, get(f"{key}_at_floor_n"), get("floor")),
        Panel(f"{kid} x 1000", LOWER, kid_1000),
    ]


def draw_panel(axes: Axes, panel: Panel, rows: dict[str, dict]):
    """Draw a pair of bars for each row; a dash stands for an absent value."""
    places = [*range(len(rows) - 1), len(rows) - 0.6]  # the last row, of all images, stands apart
    series = {"generated": panel.generated, "real": panel.real}
    series = {name: get for name, get in series.items() if any(get(row) is not None for row in rows.values())}
    height = 0.8 / len(series)
    for k, (name, get) in enumerate(series.items()):
        values = [get(row) for row in rows.values()]
        shifted = [place - 0.4 + (k + 0.5) * height for place in places]
        drawn = [(y, value) for y, value in zip(shifted, values) if value is not None]
        axes.barh(*zip(*drawn), height=height, color=COLOURS[name])
        for y, value in zip(shifted, values):
            if value is None:
                axes.annotate("–", (0, y), (2, 0), textcoords="offset points", va="center", fontsize=6)
    axes.set_yticks(places, [name.replace("_", " ") for name in rows])
    for label in axes.get_yticklabels()[-1:]:  # none beside another panel
        label.set_weight("bold")
    axes.set_title(textwrap.fill(panel.title, 34), fontsize=8)
    axes.set_xlabel(panel.hint, fontsize=6.5, color="#555555")
    axes.tick_params(labelsize=7, length=2)
    axes.tick_params(axis="y", length=0)
    axes.margins(y=0.02)
    axes.grid(axis="x", color="#dddddd", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)


def bar_figure(report: dict) -> Figure:
    """Draw bars by superclass, and of all images, for every metric that has a value for each row."""
    shown, superclasses = panels(report), report["superclasses"]
    largest = sorted(superclasses, key=lambda name: -(superclasses[name]["n_real"] or 0))[:MOST_ROWS]
    rows = {name: row for name, row in superclasses.items() if name in largest} | {"all images": report["overall"]}
    across, down = min(ACROSS, max(1, len(shown))), max(1, -(-len(shown) // ACROSS))
    size = (1 + (WIDTH - 1) * across / ACROSS, 0.5 + down * (0.65 + 0.2 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False).flatten()
    for axes, panel in zip(grid, shown):
        draw_panel(axes, panel, rows)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    if shown:
        grid[0].invert_yaxis()
        has_real = any(panel.real(row) is not None for panel in shown for row in rows.values())
        names = list(COLOURS) if has_real else ["generated"]
        patches = [Patch(color=COLOURS[name], label=name) for name in names]
        figure.legend(handles=patches, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    titles = [] if report["comparable"] else ["not comparable with published metrics"]
    if len(superclasses) > MOST_ROWS:
        titles.append(f"the {MOST_ROWS} of {len(superclasses)} superclasses with most real images")
    if titles:
        figure.suptitle("; ".join(titles), fontsize=8, color="#aa3333")
    return figure
