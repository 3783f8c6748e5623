"""Grids of images with captions, for people."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from hierarchy.layouts import is_inat

GAP = 4  # pixels between cells
INK, BACKGROUND = (20, 20, 20), (255, 255, 255)


def caption(class_name):
    """What to write under an image: the species of an iNaturalist name, else the name with spaces."""
    parts = class_name.split("_")
    return " ".join(parts[-2:] if is_inat([class_name]) else parts)


def ellipsize(text, font, width):
    """`text`, shortened with an ellipsis to `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def labelled_grid(images, captions, columns, cell=None, row_titles=()):
    """A PIL picture of `images`, uint8 (N, 3, H, W), row by row, each over its caption ("" for none).

    `cell`: width in pixels to which images are brought (default: their own, at least 96). `row_titles`: text to the left
    of the rows.
    """
    assert len(images) == len(captions) and images.dtype == torch.uint8
    cell = cell or max(images.shape[3], 96)
    tall = cell * images.shape[2] // images.shape[3]
    small, large = (ImageFont.load_default(size=max(10, cell // part)) for part in (10, 5))
    line = small.getbbox("Ég")[3] + 4
    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    heights = [tall + GAP + (line if any(captions[i] for i in row) else 0) for row in rows]
    margin = max([0, *(int(large.getlength(title)) + 3 * GAP for title in row_titles)])
    sheet = Image.new("RGB", (margin + columns * (cell + GAP) + GAP, sum(heights) + GAP), BACKGROUND)
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
