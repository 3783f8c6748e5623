"""The comparison of methods, end to end on six glyphs and two steps; what it finds at full length is no business of tests."""

import json

import pytest

from examples.glyphs import draw as glyphs
from examples.glyphs import read as read_glyphs
from examples.glyphs import study
from hierarchy import Hierarchy

SIX = {"Basic Latin": [0x41, 0x42, 0x53], "Armenian": [0x531, 0x537, 0x556]}
TRAIN = (
    "--image-size 64 --vae examples/glyphs/vae --no-flip --num-workers 0 --model DiT-Ti/2 "
    "--resume examples/glyphs/base.safetensors "
    "--global-batch-size 4 --max-steps 2"
)


def test_shuffled_superclasses_keep_their_sizes():
    hierarchy = Hierarchy.load("inat2021")
    other = study.shuffled(hierarchy)
    assert other.parents.bincount().equal(hierarchy.parents.bincount()) and other.classes == hierarchy.classes
    assert (other.parents == hierarchy.parents).float().mean() < 0.4
    assert other == study.shuffled(hierarchy)


def test_a_study_from_end_to_end(command, tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "CLASSES_FILE", tmp_path / "glyphs.json")
    (tmp_path / "glyphs.json").write_text(json.dumps({"base": SIX, "new": SIX}))
    for faces, per_class in (("train", 4), ("held-out", 12)):
        glyphs.write(tmp_path / "data" / faces, "new", faces == "held-out", per_class, seed=0)
    for name, value in {
        "SCALES": (1.0, 2.0),
        "STEPS": 2,
        "METHODS": {study.SHUFFLED: [], "bitfit": ["--method", "bitfit"]},
    }.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(read_glyphs, "STEPS", 5)
    flags = ["--data", tmp_path / "data", "--out", tmp_path / "out", "--train", TRAIN, "--seeds", 0, "--per-class", 2]
    result = command(study.main, *flags)
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "out/study.json").read_text())
    assert rows.keys() == {"real, other faces", study.SHUFFLED, "bitfit"}
    assert rows["real, other faces"]["distance"] == pytest.approx(0, abs=1e-3)
    assert rows["bitfit"].keys() == {"1.0", "2.0"} and len(rows["bitfit"]["2.0"]["class"]) == 1
    assert all(
        value > 0
        for scales in (rows[study.SHUFFLED], rows["bitfit"])
        for row in scales.values()
        for value in row["distance"]
    )
    assert f"| {study.SHUFFLED} |" in (tmp_path / "out/study.md").read_text()
    # the control was trained under other superclasses
    folder = tmp_path / "out/runs/finediffusion-shuffled-0"
    description = study.load_adapted(max((folder / "adapters").glob("*")))[1]
    assert description.hierarchy.parents.equal(study.shuffled(Hierarchy.load(tmp_path / "data/train")).parents)
    # once more: nothing is trained or sampled again
    monkeypatch.setattr(study, "sample", None)
    before = (tmp_path / "out/study.md").read_text()
    assert command(study.main, *flags).code == 0 and (tmp_path / "out/study.md").read_text() == before
