"""The study of methods, end to end on six glyphs and two steps; its results at full length are not tested."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from helpers.tiny_models import make, refusal
from PIL import Image

import train
from examples.glyphs import breadth_study, curve, draw, extension_study, read, study, taxonomy_study, tune
from hierarchy import Hierarchy
from tools import encode_latents

SIX = {"Basic Latin": [0x41, 0x42, 0x53], "Armenian": [0x531, 0x537, 0x556]}
MORE = {"Armenian": [0x532, 0x54E]}
RUN = "--experiment", "run", "--preview-images", 0
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


@pytest.fixture
def here(command, tmp_path, monkeypatch):
    """Run the commands of the studies in this process, one after the other, on tiny sets, with few steps."""

    def run(first, *flags):
        main, flags = (train.main, flags) if first == "train.py" else (encode_latents.main, flags[1:])
        assert first in ("train.py", "-m")
        result = command(main, *flags)
        assert result.code == 0, result.err

    monkeypatch.setattr(study, "run", run)
    for module in (study, taxonomy_study, extension_study, breadth_study):
        monkeypatch.setattr(module, "ThreadPoolExecutor", lambda jobs: nullcontext(SimpleNamespace(map=map)))
    monkeypatch.setattr(study, "STEPS", 2)
    monkeypatch.setattr(read, "STEPS", 5)
    monkeypatch.setattr(draw, "CLASSES_FILE", tmp_path / "glyphs.json")
    letters = {"Latin Extended Additional": [0x1E01, 0x1EA5, 0x1E15], "Greek Extended": [0x1F00, 0x1F80]}
    (tmp_path / "glyphs.json").write_text(json.dumps({"new": SIX, "more": MORE, "letters": letters}))


def test_a_study_from_end_to_end(command, here, tmp_path, monkeypatch):
    for faces, per_class in (("train", 4), ("held-out", 12)):
        draw.write_images(tmp_path / "data" / faces, "new", faces == "held-out", per_class, seed=0)
    for name, value in {
        "SCALES": (1.0, 2.0),
        "METHODS": {study.SHUFFLED: [], "bitfit": ["--method", "bitfit"]},
    }.items():
        monkeypatch.setattr(study, name, value)
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
    # the curve shows the methods beside full fine-tuning, here the one of bitfit
    report = json.dumps(rows | {"full": rows["bitfit"]})
    (tmp_path / "out/runs/full-0").symlink_to(tmp_path / "out/runs/bitfit-0")
    before = (tmp_path / "out/study.json").read_text()
    (tmp_path / "out/study.json").write_text(report)
    draw_curve = "--study", tmp_path / "out", "--out", tmp_path / "curve.png", "--scales", 1, 2
    result = command(curve.main, *draw_curve)
    assert result.code == 0 and Image.open(tmp_path / "curve.png").size == (1350, 510), result.err
    assert curve.count_parameters(tmp_path / "out", "bitfit", 0) > 10_000
    (tmp_path / "out/study.json").write_text(before)
    result = command(curve.main, "--study", tmp_path, "--out", tmp_path / "none.png")
    assert result.code == 2 and "expected the results of a study" in result.err
    # run again: nothing is trained or sampled twice
    monkeypatch.setattr(study, "sample", None)
    before = (tmp_path / "out/study.md").read_text()
    assert command(study.main, *flags).code == 0 and (tmp_path / "out/study.md").read_text() == before


def test_the_study_of_three_tiers(command, here, tmp_path, monkeypatch):
    methods = ("null row", "blocks and letters, path, random")
    monkeypatch.setattr(taxonomy_study, "METHODS", {name: taxonomy_study.METHODS[name] for name in methods})
    monkeypatch.setattr(taxonomy_study, "BATCH", 5)
    flags = "--out", tmp_path / "out", "--train", TRAIN, "--images", 1, "--seeds", 3, "--max-steps", 2
    flags += "--per-class", 1, "--scales", 1, 2
    result = command(taxonomy_study.main, *flags)
    assert result.code == 0, result.err
    for guide in ("null row, guided by null", *(f"{methods[1]}, guided by {tier}" for tier in ("block", "letter"))):
        assert result.out.count(f"| {guide} |") == 2  # two metrics
    description = study.load_adapted(max((tmp_path / "out/runs").glob("*random-1-3/adapters/*")))[1]
    true = Hierarchy.load(tmp_path / "out/data/1-3")
    assert description.embedder == "path" and description.hierarchy == taxonomy_study.shuffle(true, 3)
    assert [len(tier.nodes) for tier in true.tiers] == [2, 3]
    monkeypatch.setattr(study, "sample", None)
    assert command(taxonomy_study.main, *flags).out == result.out  # nothing is trained or sampled twice


def test_the_study_of_classes_added_later(command, here, tmp_path, monkeypatch):
    for faces, per_class in (("train", 2), ("held-out", 12)):
        draw.write_images(tmp_path / "data" / faces, "new", faces == "held-out", per_class, seed=0)
    study.run(
        "train.py", *TRAIN.split(), "--data-path", tmp_path / "data/train", "--results-dir", tmp_path / "data", *RUN
    )
    monkeypatch.setattr(extension_study, "EXTEND", [*extension_study.EXTEND, "--global-batch-size", 2])
    flags = "--data", tmp_path / "data", "--out", tmp_path / "out", "--train", TRAIN, "--images", 1, "--seeds", 0
    result = command(extension_study.main, *flags, "--steps", 2, "--per-class", 2)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out/extension.json").read_text())
    assert found["before"].keys() == {"old", "old distance"} and len(found) == 4
    # the old classes after training the new rows alone are those before
    assert found["rows|1|0"]["old distance"] == pytest.approx(
        found["before"]["old distance"], rel=1e-5
    )  # up to rounding
    assert found["all|1|0"]["old distance"] != pytest.approx(found["before"]["old distance"], rel=1e-3)
    assert all("new distance" in found[f"{way}|1|0"] for way in extension_study.WAYS)
    assert result.out.count("| from the start |") == 1


def test_the_study_of_bases(command, here, tmp_path, monkeypatch):
    data = {"base": {"Arrows": [0x2190, 0x2191], "Cyrillic": [0x416], "Georgian": [0x10D0]}, "new": SIX}
    (tmp_path / "glyphs.json").write_text(json.dumps(data))
    for faces, per_class in (("train", 2), ("held-out", 12)):
        draw.write_images(tmp_path / "data" / faces, "new", faces == "held-out", per_class, seed=0)
    monkeypatch.setattr(breadth_study, "METHODS", {"full": breadth_study.METHODS["full"]})
    monkeypatch.setattr(breadth_study, "BASE", [*breadth_study.BASE, "--global-batch-size", 2])
    few = "--base-steps", 2, "--base-images", 2, "--seeds", 0, "--per-class", 1, "--scales", 2, "--blocks", 2
    flags = "--data", tmp_path / "data", "--out", tmp_path / "out", "--train", TRAIN, *few
    result = command(breadth_study.main, *flags)
    assert result.code == 0, result.err
    assert result.out.count("\n| 2 |") == 3  # metrics
    out = tmp_path / "out/blocks-2"
    base = study.newest_adapter(out / "base")
    assert study.load_adapted(base)[1].hierarchy.superclasses == ("Arrows", "Cyrillic")
    assert study.load_adapted(study.newest_adapter(out / "runs/full-0"))[1].base.path == str(base)
    monkeypatch.setattr(study, "sample", None)
    assert command(breadth_study.main, *flags).out == result.out  # nothing is trained or sampled twice
