"""Grids of images with captions, for people."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from folders import is_inat

GAP = 4  # pixels between cells
INK, PAPER = (20, 20, 20), (255, 255, 255)


def caption(class_name):
    """What to write under an image: the species of an iNaturalist name, else the name with spaces."""
    parts = class_name.split("_")
    return " ".join(parts[-2:] if is_inat([class_name]) else parts)


def fitted(text, font, width):
    """`text`, shortened with an ellipsis to `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def labelled_grid(images, captions, columns, cell=None, row_titles=()):
    """A PIL picture of `images`, uint8 (N, 3, H, W), row by row, each over its caption ("" for none).

    `cell`: side in pixels to which images are enlarged (default: as they are, at least 96). `row_titles`: text over
    rows, "" for none.
    """
    assert len(images) == len(captions) and images.dtype == torch.uint8
    height, width = images.shape[2:]
    cell = cell or max(width, 96)
    font = ImageFont.load_default(size=max(10, cell // 10))
    line = font.getbbox("Ég")[3] + 4 if any(captions) else 0
    rows = -(-len(images) // columns)
    titles = [*row_titles, *[""] * rows][:rows]
    title_font = ImageFont.load_default(size=max(12, cell // 7))
    title_line = title_font.getbbox("Ég")[3] + 6
    heights = [cell * height // width + line + GAP + (title_line if title else 0) for title in titles]
    sheet = Image.new("RGB", (columns * (cell + GAP) + GAP, sum(heights) + GAP), PAPER)
    pen, top = ImageDraw.Draw(sheet), GAP
    for row, title in enumerate(titles):
        y = top
        if title:
            pen.text((GAP, y), title, INK, title_font)
            y += title_line
        for column, i in enumerate(range(row * columns, min((row + 1) * columns, len(images)))):
            x = GAP + column * (cell + GAP)
            image = Image.fromarray(np.ascontiguousarray(images[i].permute(1, 2, 0).numpy()))
            sheet.paste(image.resize((cell, cell * height // width), Image.Resampling.LANCZOS), (x, y))
            pen.text((x, y + cell * height // width), fitted(captions[i], font, cell), INK, font)
        top += heights[row]
    return sheet
