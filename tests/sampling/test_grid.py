"""Grids of samples: their shape, and captions that keep what tells classes apart."""

import pytest
from PIL import ImageFont

from sampling.grid import MOST_PIXELS, ellipsize, grid_layout


@pytest.mark.parametrize(
    "classes, per_class, cell, layout",
    [
        (5, 2, 96, (2, 5, 2)),
        (8, 1, 256, (4, 8, 1)),
        (3, 1, 256, (3, 3, 1)),
        (48, 1, 96, (7, 48, 1)),
        (48, 4, 96, (12, 48, 4)),  # 12 x 16 images, not 4 x 48
        (10_000, 1, 256, (32, 1024, 1)),
        (10_000, 4, 512, (16, 64, 4)),
        (2, 10_000, 96, (32, 2, 32)),
    ],
)
def test_the_grid_is_about_square_and_of_bounded_size(classes, per_class, cell, layout):
    columns, found, shown = grid_layout(classes, per_class, cell)
    assert (columns, found, shown) == layout
    assert found * shown * cell**2 <= MOST_PIXELS


def test_an_ellipsis_keeps_the_end():
    font = ImageFont.load_default(size=10)
    names = [f"0531 ARMENIAN CAPITAL LETTER {name}" for name in ("AYB", "BEN", "GIM", "DA")]
    short = [ellipsize(name, font, 90) for name in names]
    assert len(set(short)) == 4 and all(font.getlength(text) <= 90 for text in short)
    assert all(text.startswith("0531") and text.endswith(name.split()[-1]) for text, name in zip(short, names))
    assert ellipsize("manx", font, 90) == "manx" and ellipsize("manx", font, 1) == "…"
