"""The style of the figures: the same bytes each time, markers, captions, mosaics."""

import numpy as np
import pytest
import torch

from tools.figures import plots
from tools.figures.__main__ import main

FAST = "--sampler", "ddim", "--num-sampling-steps", "2"


def test_the_same_input_gives_the_same_bytes_and_no_date(adapter, command, tmp_path):
    for out in ("a", "b"):
        assert command(main, "grid", "--ckpt", adapter, *FAST, "--out", tmp_path / out).code == 0
    a, b = (((tmp_path / f"{out}.{form}").read_bytes() for form in ("png", "pdf")) for out in "ab")
    for first, second in zip(a, b):
        assert first == second and b"Date" not in first
    assert b"DejaVuSans" in (tmp_path / "a.pdf").read_bytes()  # text stays text


def test_a_star_is_a_mean_and_a_plus_a_superclass_row_as_in_the_papers_figure_7():
    points = torch.zeros(4, 2)
    marks = {"mean of the class rows": points[:2] + 1, "superclass row": points[:2] + 2}
    lines = plots.embedding(points, torch.tensor([0, 0, 1, 1]), ["a", "b"], marks, "").axes[0].lines
    shown = [(line.get_marker(), line.get_xydata().tolist()) for line in lines]
    assert shown == [("*", [[1.0, 1.0]])] * 2 + [("P", [[2.0, 2.0]])] * 2
    assert not {marker for marker, _ in plots.MARKS} & set(plots.MARKERS)


def test_groups_differ_in_colour_and_marker():
    looks = [plots.group_style(i) for i in range(25)]
    assert len({(tuple(look["color"]), look["marker"]) for look in looks}) == 25
    assert len({tuple(look["color"]) for look in looks[:24]}) == 24
    assert all(0 <= c <= 1 for look in looks for c in look["color"])


def test_a_caption_breaks_between_words_and_is_cut_to_its_width():
    font = plots.Font(6)
    lines = plots.wrap_caption("Leptoglossus occidentalis", font, 0.8).split("\n")
    assert lines == ["Leptoglossus", "occidentalis"]
    assert plots.wrap_caption("Pica pica", font, 0.8) == "Pica pica"
    lines = plots.wrap_caption("a word and very many other words that are too long", font, 0.8).split("\n")
    assert len(lines) == 2 and "…" in lines[1] and lines[1].endswith("long")
    assert all(font.getlength(line) <= 0.8 for line in lines)


def test_a_mosaic_fits_a_page_and_its_images_have_a_maximum_width():
    image = np.zeros((4, 4, 3), np.uint8)
    assert plots.mosaic([[image] * 12] * 2).get_size_inches()[0] == pytest.approx(plots.PAGE)
    small = plots.mosaic([[image, None], [image]], captions=[["x", ""], ["y"]], row_titles=["a", "b"])
    assert small.get_size_inches()[0] < 2.7
    shown = [image.get_extent() for image in small.axes[0].images]
    assert len(shown) == 2 and all(right - left == pytest.approx(plots.WIDEST) for left, right, _, _ in shown)
