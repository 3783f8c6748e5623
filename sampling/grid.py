"""Grids of images with captions."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from hierarchy.layouts import is_inat

GAP = 4  # pixels between cells
INK, BACKGROUND = (20, 20, 20), (255, 255, 255)


def caption(class_name: str) -> str:
    """Return the caption of a class: the species of an iNaturalist name, or else the name with spaces."""
    parts = class_name.split("_")
    return " ".join(parts[-2:] if is_inat([class_name]) else parts)


def ellipsize(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Shorten a text with an ellipsis to at most `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


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
    cell = cell or max(images.shape[3], 96)
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
