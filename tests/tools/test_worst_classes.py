"""The figure of the worst classes: which classes and images it shows, and evaluations that it refuses."""

import json

import numpy as np
import pytest
from helpers.image_sets import NAMES, write_set
from helpers.tiny_files import CLASSES
from helpers.tiny_models import refusal
from PIL import Image

from dataset.images import center_crop
from evaluation.per_class import classes_csv
from tools.figures import plots, worst_classes
from tools.figures.__main__ import main

PARENT = {name: superclass for superclass, names in CLASSES.items() for name in names}


def row(name, top1=1.0, top1_real=1.0, top5=1.0, lpips=None, lpips_real=0.3, mistaken_for=None, n_fake=4):
    return {
        "class": name,
        "superclass": PARENT[name],
        "n_real": 6,
        "n_fake": n_fake,
        "top1": top1,
        "top1_real": top1_real,
        "top5": top5,
        "top5_real": 1.0,
        "mistaken_for": mistaken_for,
        "mistaken": 1 - top1 if top1 is not None else None,
        "lpips": lpips,
        "lpips_real": lpips_real,
    }


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Two sets, and the files that evaluate.py would write about them."""
    root = tmp_path_factory.mktemp("evaluated")
    write_set(root / "real", 50, 4, seed=1)
    write_set(root / "fake", 40, 4, seed=2)
    out = root / "evaluation"
    out.mkdir()
    report = {"real": {"path": str(root / "real")}, "fake": {"path": str(root / "fake")}, "choices": {"image_size": 40}}
    (out / "metrics.json").write_text(json.dumps(report))
    rows = [
        row("lynx", 0.5, 0.9, lpips=0.3),
        row("manx", 0.5, 1.0, lpips=0.1, mistaken_for="lynx"),
        row("beagle", 0.0, 1.0, lpips=0.4, mistaken_for="pug"),
        row("pug", 0.75, 1.0, lpips=0.3),
        row("pug_dog", n_fake=0),
    ]
    (out / "classes.csv").write_text(classes_csv(rows))
    return out


def test_the_worst_classes_are_shown_with_their_images(evaluation, command, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "DPI", 40)
    calls, draw = [], worst_classes.class_blocks
    monkeypatch.setattr(worst_classes, "class_blocks", lambda *args: calls.append(args) or draw(*args))
    flags = ("worst", "--evaluation", evaluation, "--count", 3, "--per-class", 2, "--out", tmp_path / "worst")
    result = command(main, *flags)
    assert result.code == 0 and result.out == f"{tmp_path / 'worst.png'} {tmp_path / 'worst.pdf'}\n", result.err
    ((rows, real, fake, each),) = calls
    assert [row["class"] for row in rows] == ["beagle", "manx", "lynx"] and each == 2  # real manx are known better
    for images, name in ((real, "real"), (fake, "fake")):
        for shown, of_class in zip(images, ("dogs/beagle", "cats/manx", "cats/lynx")):
            paths = [evaluation.parent / name / of_class / f"{i}.png" for i in (0, 1)]
            expected = [np.asarray(center_crop(Image.open(path), 40)) for path in paths]
            assert len(shown) == 2 and all(np.array_equal(a, b) for a, b in zip(shown, expected))
    pixels = np.asarray(Image.open(tmp_path / "worst.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_lines_of_text():
    assert worst_classes.describe(row("manx", 0.25, None, mistaken_for="pug_dog")) == ["25% right", "75% pug dog"]
    assert worst_classes.describe(row("manx", None, lpips=0.5)) == ["LPIPS 0.50 (real 0.30)"]


def test_the_order_by_lpips(evaluation):
    _, rows = worst_classes.read_evaluation(evaluation)
    worst = worst_classes.worst_rows(rows, "lpips", 9, evaluation)
    assert [each["class"] for each in worst] == ["manx", "beagle", "lynx", "pug"]
    assert {each["class"] for each in rows} == set(NAMES)
    for each in rows:
        each["top1"] = None
    with refusal("evaluation has no top1 of classes, expected an evaluation with --classifier"):
        worst_classes.worst_rows(rows, "top1", 9, evaluation)


def test_bad_evaluations_are_refused(evaluation, command, tmp_path):
    def assert_refused(words, *flags):
        result = command(main, "worst", "--evaluation", *flags, "--out", tmp_path / "never")
        assert result.code == 2 and words in result.err and result.err.count("\n") == 1

    assert_refused("metrics.json, expected a folder of evaluate.py --output", tmp_path)
    assert_refused("--count is 0", evaluation, "--count", 0)
    assert_refused("There is no", evaluation, "--fake", tmp_path / "nowhere")
    report = json.loads((evaluation / "metrics.json").read_text())
    (tmp_path / "classes.csv").write_text((evaluation / "classes.csv").read_text())
    for content in ("{", "{}", json.dumps(report | {"choices": None})):
        (tmp_path / "metrics.json").write_text(content)
        assert_refused("is damaged", tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps(report))
    (tmp_path / "classes.csv").write_text("class,top1\nlynx,many\n")
    assert_refused("is damaged", tmp_path)
    (tmp_path / "classes.csv").write_text("class,top1\nlynx,1\n")
    assert_refused("is damaged", tmp_path)
