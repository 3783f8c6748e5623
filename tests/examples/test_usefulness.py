"""The benchmark of usefulness: its long tail, its arms and its report; its results at full length are not tested."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_files import tree

from examples.glyphs import draw, study, usefulness
from hierarchy import Hierarchy
from tools import filter_images, train_classifier

THREE = {"Basic Latin": [0x41, 0x42, 0x53]}


def test_a_tail_falls_from_39_to_1():
    counts = usefulness.tail_counts(48, 39, seed=0)
    assert sorted(counts)[::-1][:3] == [39, 36, 33] and counts.min() == 1 and counts.sum() == 506
    falling = np.sort(counts)[::-1]
    assert abs(falling - 39 ** (1 - np.arange(48) / 47)).max() <= 0.5
    assert np.array_equal(counts, usefulness.tail_counts(48, 39, 0))
    assert not np.array_equal(counts, usefulness.tail_counts(48, 39, 1))


def test_intervals_are_those_of_students_t():
    mean, half = usefulness.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.7764451 * (2.5 / 5) ** 0.5)  # t of 4 degrees of freedom
    assert usefulness.interval([7.0]) == (7, 0)


def test_accuracies_by_number_of_images():
    counts = {"a": 1, "b": 3, "c": 4, "d": 30, "e": 5}
    classes = {name: {"top1": share} for name, share in zip("abcde", (0.1, 0.2, 0.4, 1.0, 0.5))}
    found = usefulness.group_accuracies({"classes": classes}, counts)
    expected = {"all classes": 44, "1": 10, "2 to 4": 30, "5 to 12": 50, "13 to 39": 100}
    assert found == pytest.approx(expected)


def test_the_benchmark_on_three_glyphs(command, tmp_path, monkeypatch):
    """Its commands and sets; the trainings are left out."""
    monkeypatch.setattr(draw, "read_classes", lambda which: THREE)
    draw.write_images(tmp_path / "data/train", "new", held_out=False, per_class=39, seed=0)
    ran, trained, share = [], [], {arm: 0.1 * i for i, arm in enumerate(usefulness.ARMS)}
    monkeypatch.setattr(study, "run", lambda *words: ran.append([str(word) for word in words]))
    monkeypatch.setattr(study, "newest_adapter", lambda folder: folder / "adapter")

    def list_kept(argv):
        path = argv[argv.index("--out") + 1]
        Path(path).write_text(json.dumps({"images": ["x"] * 35}))

    def train(argv):
        args = train_classifier.parse_args(argv)
        trained.append(args)
        arm = usefulness.ARMS[(len(trained) - 1) % len(usefulness.ARMS)]
        classes = {name: {"top1": share[arm]} for name in Hierarchy.load(tmp_path / "out/0/train").classes}
        path = Path(args.out).with_suffix(".scores.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"classes": classes}))

    monkeypatch.setattr(filter_images, "main", list_kept)
    monkeypatch.setattr(train_classifier, "main", train)
    flags = "--data", tmp_path / "data", "--out", tmp_path / "out", "--train", "--max-steps 3", "--seeds", 0, 1
    result = command(usefulness.main, *flags)
    assert result.code == 0, result.err
    for seed in (0, 1):
        files = list((tmp_path / f"out/{seed}/train").rglob("*.png"))
        assert sorted(len(list(folder.iterdir())) for folder in {file.parent for file in files}) == [1, 6, 39]
        assert not any(face in draw.HELD_OUT for face in {file.stem.split("_", 1)[1] for file in files})
    faces = {file.stem.split("_", 1)[1] for file in (tmp_path / "out/held-out").rglob("*.png")}
    assert faces == set(draw.HELD_OUT)  # of the images that the classifiers are tried on
    assert {args.test for args in trained} == {str(tmp_path / "out/held-out")}
    assert all("held-out" not in path for args in trained for path in [*args.real, *args.generated])
    assert len(trained) == 12 and len([words for words in ran if words[0] == "sample_ddp.py"]) == 6
    assert json.loads((tmp_path / "out/0/rest.json").read_text()).keys() == set(
        Hierarchy.load(tmp_path / "out/0/train").classes
    )
    assert "| real + generated | 20.0 ± 0.0 |" in result.out and "| real + generated | +20.0 ± 0.0 |" in result.out
    assert "The filter kept 49% of the generated images" in result.out  # 35 of 3 x 39 - 46
    before = tree(tmp_path / "out/0/train")
    assert command(usefulness.main, *flags).out == result.out and tree(tmp_path / "out/0/train") == before
