"""Grids of images with captions."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from hierarchy.layouts import is_inat

GAP = 4  # pixels between cells
MOST_PIXELS, MOST_COLUMNS = 2**26, 32  # of a grid; images of a class in it
INK, BACKGROUND = (20, 20, 20), (255, 255, 255)


def caption(class_name: str) -> str:
    """Return the caption of a class: the species of an iNaturalist name, or else the name with spaces."""
    parts = class_name.split("_")
    return " ".join(parts[-2:] if is_inat([class_name]) else parts)


def ellipsize(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Shorten a text to at most `width` pixels with an ellipsis in its middle; often only the end differs between names."""
    if font.getlength(text) <= width:
        return text
    for left in range(len(text) - 1, 0, -1):  # letters that are left
        start, end = text[: left - left // 2], text[len(text) - left // 2 :]
        if font.getlength(shorter := f"{start.rstrip()}…{end.lstrip()}") <= width:
            return shorter
    return "…"


def grid_layout(classes: int, per_class: int, cell: int) -> tuple[int, int, int]:
    """Return the columns of a grid of samples, and how many classes and images per class it shows.

    The images of a class stand side by side. The grid has at most about MOST_PIXELS and as many rows as columns.

    classes, per_class: of the samples; cell: width of an image in pixels
    """
    shown = min(per_class, MOST_COLUMNS)
    classes = max(1, min(classes, MOST_PIXELS // (cell**2 * shown)))
    if shown == 1:
        return max(min(4, classes), math.ceil(classes**0.5)), classes, shown
    return shown * max(1, math.isqrt(classes // shown)), classes, shown


def cell_size(image_size: int) -> int:
    """Return the default width of an image in a grid: captions need 96 pixels."""
    return max(image_size, 96)


def labelled_grid(
    images: torch.Tensor,
    captions: Sequence[str],
    columns: int,
    cell: int | None = None,
    row_titles: Sequence[str] = (),
) -> Image.Image:
    """Draw a grid of images, row by row.

    images      uint8 (N, 3, H, W)
    captions    (N,), the text under each image; "" for none
    cell        width in pixels to which images are resized; their own, but at least 96, if not given
    row_titles  text to the left of each row
    """
    assert len(images) == len(captions) and images.dtype == torch.uint8
    cell = cell or cell_size(images.shape[3])
    tall = cell * images.shape[2] // images.shape[3]
    small, large = (ImageFont.load_default(size=max(10, cell // part)) for part in (10, 5))
    line = small.getbbox("Ég")[3] + 4

    # Lay out: a row is higher if it has captions
    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    heights = [tall + GAP + (line if any(captions[i] for i in row) else 0) for row in rows]
    margin = max([0, *(int(large.getlength(title)) + 3 * GAP for title in row_titles)])
    sheet = Image.new("RGB", (margin + columns * (cell + GAP) + GAP, sum(heights) + GAP), BACKGROUND)

    # Draw:
    pen, top = ImageDraw.Draw(sheet), GAP
    for row, height, title in zip(rows, heights, [*row_titles, *[""] * len(rows)]):
        pen.text((GAP, top + tall // 2), title, INK, large, anchor="lm")
        for column, i in enumerate(row):
            left = margin + GAP + column * (cell + GAP)
            image = Image.fromarray(np.ascontiguousarray(images[i].permute(1, 2, 0).numpy()))
            sheet.paste(image.resize((cell, tall), Image.Resampling.LANCZOS), (left, top))
            pen.text((left, top + tall), ellipsize(captions[i], small, cell), INK, small)
        top += height
    return sheet
