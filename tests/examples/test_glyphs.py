"""Glyphs of the quick start: drawing, the choice of classes, the image folder, and the classifier that reads them."""

import json
import random

import numpy as np
import pytest
import torch
from helpers.tiny_files import tree

from examples.glyphs import draw, read
from hierarchy import Hierarchy

CHOSEN = json.loads(draw.CLASSES_FILE.read_text())
SIX = {"Basic Latin": [0x41, 0x42, 0x53], "Armenian": [0x531, 0x537, 0x556]}


@pytest.fixture
def six(tmp_path, monkeypatch):
    """Reduce both sets to six classes in two superclasses; return a folder to write to."""
    monkeypatch.setattr(draw, "CLASSES_FILE", tmp_path / "glyphs.json")
    (tmp_path / "glyphs.json").write_text(json.dumps({"base": SIX, "new": SIX}))
    return tmp_path / "out"


def ink(image):
    left, top, right, bottom = image.getbbox()
    return (left + right) / 2, (top + bottom) / 2


@pytest.mark.parametrize("code, face", [(0x41, "DejaVuSans"), (0x2C, "STIXGeneralItalic"), (0x1F06, "DejaVuSerif")])
def test_ink_is_centred_and_then_shifted(code, face):
    middle = draw.SIZE / 2
    image = draw.draw_glyph(code, face)
    assert image.size == (64, 64) and image.mode == "L" and np.asarray(image).max() > 200
    assert ink(image) == pytest.approx((middle, middle), abs=1)
    assert ink(draw.draw_glyph(code, face, shift=(5, -3))) == pytest.approx((middle + 5, middle - 3), abs=1)
    assert ink(draw.draw_glyph(code, face, degrees=6)) == pytest.approx((middle, middle), abs=2)
    larger, sides = draw.draw_glyph(code, face, scale=1.3).getbbox(), image.getbbox()
    assert larger[3] - larger[1] == pytest.approx(1.3 * (sides[3] - sides[1]), rel=0.15)


def test_variation_depends_on_the_random_generator_only():
    images = [draw.draw_varied(0x41, "DejaVuSans", random.Random(seed)).tobytes() for seed in (0, 0, 1)]
    assert images[0] == images[1] != images[2]


def test_the_sets_share_no_code_point_and_the_first_two_no_block():
    assert tuple(CHOSEN) == draw.SETS == ("base", "new", "more", "letters")
    codes = {which: sum(CHOSEN[which].values(), []) for which in draw.SETS[:3]}
    assert not CHOSEN["base"].keys() & CHOSEN["new"].keys()
    assert sum(map(len, codes.values())) == len(set(sum(codes.values(), []))) > 400
    assert {block: len(found) for block, found in CHOSEN["more"].items()} == draw.MORE
    for which in draw.BLOCKS:
        blocks = CHOSEN[which]
        assert blocks.keys() == draw.BLOCKS[which].keys()
        for block, found in blocks.items():
            first, last, most = draw.BLOCKS[which][block]
            assert found == sorted(found) and first <= found[0] and found[-1] <= last and len(found) <= most
    for block, (first, last, letters) in draw.LETTERS.items():
        found = CHOSEN["letters"][block]
        assert "".join(map(draw.letter_of, found)) == "".join(letter * draw.VARIANTS for letter in letters)
        assert all(first <= code <= last for code in found) and len(set(found)) == len(found)
    # every class has enough training faces and at least one held-out face
    for code in sum((found for blocks in CHOSEN.values() for found in blocks.values()), []):
        held_out = set(draw.faces_by_code()[code]) & set(draw.HELD_OUT)
        assert held_out and len(draw.faces_by_code()[code]) - len(held_out) >= draw.MIN_FACES - len(draw.HELD_OUT)


def test_look_alikes_differ_less_than_other_glyphs():
    a, alpha, b = map(draw.portrait, (0x41, 0x391, 0x42))  # Latin A, Greek Alpha, Latin B
    assert draw.difference(a, a) == 0
    assert draw.difference(a, alpha) < draw.LOOK_ALIKE < draw.difference(a, b) <= 1


@pytest.mark.parametrize("faces", ["train", "held-out"])
def test_folder_of_images(faces, six, command):
    flags = "--out", six, "--faces", faces, "--per-class", 5
    result = command(draw.main, *flags)
    assert result.code == 0 and "6 classes x 5 images" in result.out
    files = sorted(six.rglob("*.png"))
    assert len(files) == 30
    names = {file.stem.split("_", 1)[1] for file in files}
    assert names <= set(draw.FACES) and {name in draw.HELD_OUT for name in names} == {faces == "held-out"}
    found = Hierarchy.load(six)
    assert found.superclasses == ("Armenian", "Basic_Latin") and found.parents.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.classes[3] == "0041_LATIN_CAPITAL_LETTER_A"
    before = tree(six)
    assert command(draw.main, *flags[:1], f"{six}2", *flags[2:]).code == 0
    again = tree(f"{six}2")
    assert list(before.values()) == list(again.values())  # the images depend on the arguments only
    result = command(draw.main, *flags)
    assert result.code == 2 and result.err.count("\n") == 1 and f"{six} is not empty" in result.err
    assert tree(six) == before


def test_the_reader_learns_from_labels_and_not_from_shuffled_ones(six, monkeypatch):
    monkeypatch.setattr(read, "STEPS", 60)
    monkeypatch.setattr(read, "BATCH", 32)
    for faces, per_class in (("train", 24), ("held-out", 12)):
        draw.write_images(six / faces, "new", faces == "held-out", per_class, seed=0)
    hierarchy = Hierarchy.load(six / "train")
    images, labels = read.load_images(six / "train", hierarchy)
    assert images.shape == (144, 3, 64, 64) and images.dtype == torch.uint8
    others, theirs = read.load_images(six / "held-out", hierarchy)
    features, reader = read.train_reader(images, labels, 6)
    shares = read.accuracies(read.run_network(reader, others), theirs, hierarchy.parents)
    assert len(others) == 72 and shares["superclass"] >= shares["class"] > 0.95
    # the TorchScript files for evaluate.py compute the same
    for net, name, size in ((reader, "reader", 6), (features, "features", 64)):
        read.save_script(net, six / f"{name}.pt")
        out = torch.jit.load(six / f"{name}.pt")(others)
        assert out.shape == (72, size) and torch.allclose(out, read.run_network(net, others), atol=1e-5)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    _, reader = read.train_reader(images, shuffled, 6)
    assert read.accuracies(read.run_network(reader, others), theirs, hierarchy.parents)["class"] < 0.4
