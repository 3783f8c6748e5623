"""The closest pairs of generated and training images, beside those of held-out images: a page to look at, and a table."""

import csv
import io
from dataclasses import asdict, dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from evaluation.features import Network
from evaluation.image_sets import Pixels
from evaluation.memorisation import Memorisation, nearest
from hierarchy import Hierarchy

SHOWN = {"fake": 24, "real": 8}  # closest images of each set
CANDIDATES = 5  # nearest training images by the features, among which the nearest by LPIPS is sought
ACROSS, CELL, LETTERS = 4, 0.85, 16  # pairs side by side on the page, inches of an image, letters below it
SETS = {"fake": "generated", "real": "held out"}  # as the table calls them
TITLES = {"generated": "Generated images", "held out": "Held-out real images, for comparison"}


@dataclass(frozen=True)
class Pair:
    """An image and its nearest training image; a row of the table.

    set             "generated" or "held out"
    image, nearest  names of the images; image_class, nearest_class: of their classes, "" without classes
    distance        of their features
    changed_pixels  share of the pixels that differ, [0, 1]; rms_difference: of all pixels, [0, 255]
    lpips           of the two images, None without LPIPS
    lpips_nearest   name of the nearest image by LPIPS among the CANDIDATES nearest by the features; lpips_smallest: its LPIPS
    """

    set: str
    image: str
    image_class: str
    nearest: str
    nearest_class: str
    distance: float
    changed_pixels: float
    rms_difference: float
    lpips: float | None
    lpips_nearest: str | None
    lpips_smallest: float | None


def closest_pairs(
    found: Memorisation,
    pixels: dict[str, Pixels],
    hierarchy: Hierarchy | None,
    lpips: Network | None,
    device: torch.device,
) -> list[tuple[Pair, list[np.ndarray]]]:
    """Return the closest pairs, closest first, generated ones first; each with its images, uint8 (H, W, 3).

    The images are the image, its nearest training image, and the nearest by LPIPS if that is another.

    pixels: of the sets "real" and "fake"
    device: of the LPIPS network
    """
    pairs = []
    for name, rows in (("fake", np.arange(len(found.distances["fake"]))), ("real", np.flatnonzero(found.held_out()))):
        rows = rows[np.argsort(found.distances[name][rows], kind="stable")][: SHOWN[name]]
        distances, indices = nearest(found.queries(name, rows), found.training.blocks(), CANDIDATES)
        for row, distance, candidates in zip(rows, distances[:, 0], indices):
            image = int(found.sets[name].result.rows[row])  # its index in the set, unreadable images included
            chosen = name, image, found.sets[name].plan.labels[row], candidates[candidates >= 0], distance
            pairs.append(make_pair(found.training.images, pixels[name], *chosen, hierarchy, lpips, device))
    return pairs


def make_pair(
    training: Pixels,
    pixels: Pixels,
    name: str,
    image: int,
    label: int,
    candidates: np.ndarray,
    distance: float,
    hierarchy: Hierarchy | None,
    lpips: Network | None,
    device: torch.device,
) -> tuple[Pair, list[np.ndarray]]:
    """Return a pair and its images; candidates: the nearest training images, nearest first."""
    images = torch.stack([pixels[image][0], *(training[i][0] for i in candidates)])  # (1 + candidates, 3, H, W)
    best, values = None, None
    if lpips:
        features = lpips(images.to(device))["features"]
        values = (features[1:] - features[0]).square().sum(1).tolist()
        best = int(np.argmin(values))
    difference = images[0].float() - images[1].float()

    def class_name(label):
        return hierarchy.classes[label] if hierarchy else ""

    pair = Pair(
        SETS[name],
        pixels.name(image),
        class_name(label),
        training.name(candidates[0]),
        class_name(training.images.labels[candidates[0]]),
        float(distance),
        (difference != 0).any(0).float().mean().item(),
        difference.square().mean().sqrt().item(),
        values and values[0],
        training.name(candidates[best]) if lpips else None,
        values and values[best],
    )
    shown = [0, 1, *([1 + best] if best else [])]
    return pair, [images[i].permute(1, 2, 0).numpy() for i in shown]


def pairs_csv(pairs: list[Pair]) -> str:
    """Return the pairs as CSV; None is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(Pair.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, pairs))
    return file.getvalue()


def pairs_figure(pairs: list[tuple[Pair, list[np.ndarray]]]) -> Figure:
    """Draw the pairs, ACROSS side by side: image, nearest training image and, if it is another, the nearest by LPIPS."""
    groups = {title: [each for each in pairs if each[0].set == name] for name, title in TITLES.items()}
    groups = {title: group for title, group in groups.items() if group}
    columns, gap, text = 3 if any(len(images) > 2 for _, images in pairs) else 2, 0.12, 0.36
    width = ACROSS * (columns * CELL + gap) + gap
    height = sum(0.35 + -(-len(group) // ACROSS) * (CELL + text) for group in groups.values()) + 0.3
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    legend = "left: image; right: nearest training image" + (", then the nearest by LPIPS" if columns == 3 else "")
    axes.text(gap, 0.2, legend, fontsize=7, color="#555555")
    y = 0.3
    for title, group in groups.items():
        axes.text(gap, y + 0.2, title, fontsize=8, weight="bold")
        y += 0.35
        for i, (pair, images) in enumerate(group):
            x = gap + i % ACROSS * (columns * CELL + gap)
            for j, image in enumerate(images):
                left = x + j * CELL
                axes.imshow(image, extent=(left, left + CELL, y + CELL, y), aspect="auto", interpolation="lanczos")
            axes.text(x, y + CELL + 0.03, pair_caption(pair, columns), fontsize=5.5, va="top")
            if i % ACROSS == ACROSS - 1 or i == len(group) - 1:
                y += CELL + text
    return figure


def pair_caption(pair: Pair, columns: int) -> str:
    """Return the text below a pair: classes, distances, and the share of the pixels that differ."""
    names = dict.fromkeys(name.replace("_", " ") for name in (pair.image_class, pair.nearest_class))
    values = f"distance {pair.distance:.3g}" + ("" if pair.lpips is None else f", LPIPS {pair.lpips:.3f}")
    differ = f"{pair.changed_pixels:.2%} of the pixels differ"
    return "\n".join(filter(None, [cut_middle(" / ".join(names), LETTERS * columns), values, differ]))


def cut_middle(text: str, most: int) -> str:
    """Return a text of at most `most` letters, with an ellipsis in its middle if it is longer."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"
