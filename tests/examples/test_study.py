"""The study of methods, end to end on six glyphs and two steps; its results at full length are not tested."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from helpers.tiny_models import make, refusal

import train
from examples.glyphs import draw, read, study, tune
from hierarchy import Hierarchy
from tools import encode_latents

SIX = {"Basic Latin": [0x41, 0x42, 0x53], "Armenian": [0x531, 0x537, 0x556]}
TRAIN = (
    "--image-size 64 --vae examples/glyphs/vae --no-flip --num-workers 0 --model DiT-Ti/2 "
    "--resume examples/glyphs/base.safetensors "
    "--global-batch-size 4 --max-steps 2"
)


def test_shuffled_superclasses_keep_their_sizes():
    hierarchy = Hierarchy.load("inat2021")
    other = study.shuffle_superclasses(hierarchy, 0)
    assert other.parents.bincount().equal(hierarchy.parents.bincount()) and other.classes == hierarchy.classes
    assert (other.parents == hierarchy.parents).float().mean() < 0.4
    assert other == study.shuffle_superclasses(hierarchy, 0) != study.shuffle_superclasses(hierarchy, 1)


def test_each_seed_has_its_own_shuffled_superclasses(tmp_path, monkeypatch):
    """They are encoded and trained on; the other methods share the true ones."""
    classes = Hierarchy([*"abcdef"], ["x", "y"], [0, 0, 0, 1, 1, 1])
    encoded, trained = {}, {}

    def run(*command):
        flags = dict(zip(command, command[1:]))
        if command[0] == "train.py":
            trained[flags["--experiment"]] = flags["--latents"]
            make(tmp_path / "runs", f"{flags['--experiment']}/adapters/0000002.safetensors")
        else:
            encoded[flags["--out"]] = Hierarchy.load(flags["--hierarchy"]) if "--hierarchy" in flags else classes

    monkeypatch.setattr(study, "run", run)
    args = SimpleNamespace(seeds=[3, 4, 5], data=tmp_path, out=tmp_path, train="", jobs=1)
    assert len(study.train_all(args, classes, {study.SHUFFLED: [], "bitfit": []})) == 6
    assert {encoded[trained[f"bitfit-{seed}"]] for seed in args.seeds} == {classes}
    for seed in args.seeds:
        assert encoded[trained[f"finediffusion-shuffled-{seed}"]] == study.shuffle_superclasses(classes, seed)
    assert len({tuple(each.parents.tolist()) for each in encoded.values()}) == 4  # three assignments and the true one


def test_a_failed_command_is_named():
    with refusal(r"-c 'import sys; sys.exit\(\"no room\"\)' failed", "no room"):
        study.run("-c", 'import sys; sys.exit("no room")')


def test_tuning_gives_each_method_the_same_number_of_trials_and_takes_the_best(command, tmp_path, monkeypatch):
    assert len({len(tune.trials(method)) for method in tune.METHODS}) == 1
    trained, methods = {}, ["finediffusion", "full"]

    def train_all(args, hierarchy, todo):
        trained.update(todo)
        return {(name, 0): name for name in todo}

    def sample_all(args, adapters, autoencoder, measure, scales):
        names = [name for name, _ in adapters]
        assert scales == [2.0]
        return {name: {"2.0": {"distance": [abs(names.index(name) % 3 - 1)], "class": [0.5]}} for name in names}

    monkeypatch.setattr(study, "train_all", train_all)
    monkeypatch.setattr(study, "sample_all", sample_all)
    monkeypatch.setattr(draw, "CLASSES_FILE", tmp_path / "glyphs.json")
    monkeypatch.setattr(read, "STEPS", 1)
    (tmp_path / "glyphs.json").write_text(json.dumps({"new": SIX}))
    draw.write_images(tmp_path / "data/train", "new", False, 2, seed=0)
    flags = "--data", tmp_path / "data", "--out", tmp_path, "--train", "", "--methods", *methods
    result = command(tune.main, *flags)
    assert result.code == 0, result.err
    chosen = json.loads((tmp_path / "tuned.json").read_text())
    assert list(chosen) == methods and len(trained) == 6
    for method in methods:
        assert chosen[method] == list(tune.trials(method).values())[1]


def test_a_study_from_end_to_end(command, tmp_path, monkeypatch):
    def run(first, *flags):
        """Run a command of the study in this process."""
        main, flags = (train.main, flags) if first == "train.py" else (encode_latents.main, flags[1:])
        assert first in ("train.py", "-m")
        result = command(main, *flags)
        assert result.code == 0, result.err

    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "ThreadPoolExecutor", lambda jobs: nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setattr(draw, "CLASSES_FILE", tmp_path / "glyphs.json")
    (tmp_path / "glyphs.json").write_text(json.dumps({"base": SIX, "new": SIX}))
    for faces, per_class in (("train", 4), ("held-out", 12)):
        draw.write_images(tmp_path / "data" / faces, "new", faces == "held-out", per_class, seed=0)
    for name, value in {
        "SCALES": (1.0, 2.0),
        "STEPS": 2,
        "METHODS": {study.SHUFFLED: [], "bitfit": ["--method", "bitfit"]},
    }.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(read, "STEPS", 5)
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
    # the control was trained with the shuffled superclasses
    folder = tmp_path / "out/runs/finediffusion-shuffled-0"
    description = study.load_adapted(max((folder / "adapters").glob("*")))[1]
    assert description.hierarchy.parents.equal(
        study.shuffle_superclasses(Hierarchy.load(tmp_path / "data/train"), 0).parents
    )
    # run again: nothing is trained or sampled twice
    monkeypatch.setattr(study, "sample", None)
    before = (tmp_path / "out/study.md").read_text()
    assert command(study.main, *flags).code == 0 and (tmp_path / "out/study.md").read_text() == before
