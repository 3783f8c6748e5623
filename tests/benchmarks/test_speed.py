"""The benchmark against the official code: counts, goals, equal results of both sides, and every case on a CPU."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import ROOT

import models
from benchmarks import official, speed
from benchmarks.harness import WARM_UP, Bench, Row, check_gate, count_flops, make_row

FLAGS = ("--device", "cpu", "--threads", 1, "--tiny")
KEYS = ["name", "ours", "official", "ratio", "goal", "within"]
# our DiT under the official interface: it has iNaturalist's superclasses built in, and its module imports turtle
MODELS = """
from turtle import shape
from hierarchy import Hierarchy
Ours, PARENTS = DiT, Hierarchy.load("inat2021").parents
def DiT(num_classes, **sizes):
    return Ours(num_classes=num_classes, parents=PARENTS[:num_classes], **sizes)
"""
TRAIN = """
import torch
from models import DiT
torch.backends.cuda.matmul.allow_tf32 = True
@torch.no_grad()
def update_ema(ema, model, decay=0.9999):
    for average, now in zip(ema.parameters(), model.parameters()):
        average.mul_(decay).add_(now, alpha=1 - decay)
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Write a folder in place of a checkout of the official code."""
    folder = tmp_path_factory.mktemp("official")
    shutil.copytree(ROOT / "diffusion", folder / "diffusion", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "models.py").write_text((ROOT / "models.py").read_text() + MODELS)
    (folder / "train.py").write_text(TRAIN)
    (folder / "download.py").touch()
    return folder


def other_reference(reference, folder, name, text):
    """Copy a reference, with `text` added to the file `name`."""
    shutil.copytree(reference, folder)
    with open(folder / name, "a") as file:
        file.write(text)
    return folder


# ---- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, forward, share", [(32, 237.2, 0.6785), (64, 1049.1, 0.7097)])
def test_flops_of_the_largest_model(size, forward, share):
    """A PEFT step computes no weight gradients: it leaves out one of three equal parts, except in attention."""
    count, peft, full = (count_flops("DiT-XL/2", size, method) for method in (None, "finediffusion", "full"))
    assert count / 1e9 == pytest.approx(forward, abs=0.05)
    assert peft / full == pytest.approx(share, rel=0.005)
    assert full == pytest.approx(3 * count, rel=0.001)


def test_a_goal_is_met_or_missed():
    within = lambda **values: Row("", "", "", **{"ours": 5.0} | values).within  # noqa: E731
    assert within() is None and within(ratio=0.5) is None
    assert (
        within(ratio=0.5, goal=0.5) and not within(ratio=0.51, goal=0.5) and within(ratio=0.502, goal=0.5, slack=0.005)
    )
    assert within(goal=5.0, at_least=True) and not within(goal=5.1, at_least=True)
    assert within(goal=5.0) and not within(goal=4.9)
    assert within(ratio=0.5, goal=0.5, faults=["they differ"]) is False


def test_sides_that_differ_have_no_ratio():
    row = check_gate(Row("", "", "ms", 1.0, 2.0, ratio=0.5, goal=0.6), [(1e-6, 1e-4), (0.5, 1e-4)])
    assert (
        row.record()["ratio"] is None
        and row.within is False
        and row.gate == 0.5
        and "the sides differ" in row.faults[0]
    )
    assert check_gate(Row("", "", "ms", 1.0), [(float("nan"), 1e-4)]).faults


def test_sides_take_turns():
    """The ratio is the median over turns, not the ratio of medians; the sides advance a fake clock."""
    now, calls = [0.0], []
    measured = Bench("cpu", tiny=True, seconds=0)
    measured.clock = lambda: now[0]
    measured.ceiling = lambda kind: (lambda: side("bound", 2.0), 100.0)  # 50 per second

    def side(name, seconds):
        calls.append(name)
        now[0] += seconds

    # load of the machine, which slows both sides of a turn alike; the first two turns warm up
    loads = iter([9, 9, 1, 2, 4, 8, 16])
    load = []

    def ours():
        load.append(next(loads))
        side("ours", 1.0 * load[-1])

    times = measured.time(ours, lambda: side("other", 4.0 * load[-1]), work=10.0)
    assert calls == ["ours", "other", "bound"] * 7
    assert times.ratio == 0.25 and times.ours == 4.0 and times.other == 16.0
    assert times.spread == "0.250 to 0.250, 5 rounds"
    assert times.share == "5% matmul"  # 10 in 4 seconds, at a ceiling of 50 per second
    row = make_row("a", "b", times, goal=0.25, images=8)
    assert (row.ours, row.official, row.unit, row.within) == (2.0, 0.5, "images/s", True)


def test_a_case_repeats_for_its_seconds():
    measured, count = Bench("cpu", tiny=True, seconds=3), []
    measured.clock = lambda: len(count)
    times = measured.time(lambda: count.append(0))
    assert len(count) == WARM_UP + measured.least and times.ratio is None
    measured.seconds = 20
    measured.time(lambda: count.append(0))
    assert len(count) == 2 * WARM_UP + measured.least + 20


# ---- the reference -------------------------------------------------------------------------------


def test_loading_the_reference_leaves_no_trace(reference):
    before, tf32 = dict(sys.modules), torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    loaded = official.load(reference)
    assert loaded.DiT is not models.DiT and sys.modules["models"] is models
    assert {name for name in sys.modules if sys.modules[name] is not before.get(name)} <= {"turtle", "tkinter"} | {
        name for name in sys.modules if name.startswith("tkinter.")
    } | {"_tkinter"}
    assert str(reference) not in sys.path and not list(reference.rglob("__pycache__"))
    assert not torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32


def test_a_reference_without_turtle(reference, monkeypatch):
    monkeypatch.setitem(sys.modules, "turtle", None)  # the import fails
    assert official.load(reference).DiT


@pytest.mark.parametrize("missing", ["models.py", "diffusion/__init__.py"])
def test_an_incomplete_reference_is_refused(command, reference, tmp_path, missing):
    folder = shutil.copytree(reference, tmp_path / "copy")
    (folder / missing).unlink()
    result = command(speed.main, *FLAGS, "--reference", folder)
    assert result.code == 2 and f"has no {missing}: expected a checkout of the official FineDiffusion" in result.err


# ---- the command ---------------------------------------------------------------------------------


def run(command, tmp_path, names, *flags):
    """Run cases; return the result of the command, the rows by name, and the page."""
    paths = tmp_path / "rows.json", tmp_path / "page.md"
    result = command(speed.main, *FLAGS, *flags, "--json", paths[0], "--out", paths[1], "--only", *names)
    assert result.code == 0, result.err
    rows = json.loads(paths[0].read_text())
    assert all(list(row) == KEYS for row in rows)
    return result, {row["name"]: row for row in rows}, paths[1].read_text()


CPU = ["loop", "update-xl", "step-s4", "methods-s4", "half-s4", "interval-s4", "sampling-s4"]


def test_cases_of_a_cpu(command, reference, tmp_path):
    result, rows, page = run(command, tmp_path, CPU, "--reference", reference)
    assert list(rows) == CPU and page.strip() == result.out.strip()
    assert "the sides differ" not in page and "the values mean nothing" in page and "TFLOP/s" in page
    for name, row in rows.items():
        assert row["ours"] > 0 and row["ratio"] > 0 and (row["within"] is None) == (row["goal"] is None)
        with_official = name in ("loop", "update-xl", "step-s4", "sampling-s4")
        assert (row["official"] is not None) == with_official and f"| {name} |" in page
        if with_official and name != "loop":  # ratio of the medians against median ratio, of a few turns
            assert 0.2 < row["ratio"] / (row["ours"] / row["official"]) < 5


GPU = {
    "train-256": ["train-256", "train-256-rate"],
    "sampling-256": ["sampling-256", "sampling-256-rate"],
    "one": ["one", "one-seconds"],
    "train-images": ["train-images"],
    "encode": ["encode"],
    "train-512": ["train-512"],
    "sampling-512": ["sampling-512"],
    "outside-25": ["outside-25"],
    "waits-training": ["waits-training"],
    "waits-sampling": ["waits-sampling"],
    "memory-64": ["memory-64"],
}


def test_cases_of_a_gpu_run_on_a_cpu(command, reference, tmp_path):
    _, rows, page = run(command, tmp_path, GPU, "--reference", reference)
    assert rows.keys() == set(sum(GPU.values(), []))
    for name in ("waits-training", "waits-sampling", "memory-64"):
        assert rows[name]["within"] is False and "needs a GPU" in page
    assert "the sides differ" not in page
    assert rows["train-256"]["ours"] == rows["train-256-rate"]["ours"] and rows["train-256-rate"]["goal"] == 750
    assert rows["one-seconds"]["ours"] == pytest.approx(1 / rows["one"]["ours"] * 2)  # --tiny makes two images


DIFFERENT = {
    "another model": (
        "models.py",
        "Ours.forward = lambda self, *a, f=Ours.forward, **k: 1.01 * f(self, *a, **k)\n",
        "sampling-s4",
    ),
    "another loss": (
        "models.py",
        "Ours.forward = lambda self, *a, f=Ours.forward, **k: 1.01 * f(self, *a, **k)\n",
        "step-s4",
    ),
    "no average": ("train.py", "update_ema = lambda *a, **options: None\n", "update-xl"),
}


@pytest.mark.parametrize("name, text, case", DIFFERENT.values(), ids=DIFFERENT)
def test_a_reference_that_computes_something_else_has_no_ratio(command, reference, tmp_path, name, text, case):
    folder = other_reference(reference, tmp_path / "other", name, text)
    _, rows, page = run(command, tmp_path, [case], "--reference", folder)
    assert rows[case]["ratio"] is None and rows[case]["within"] is False and "the sides differ" in page


def test_without_a_reference(command, tmp_path):
    cases, skipped = speed.choose_cases(None, "cpu", reference=False, tiny=True)
    assert [case.name for case in cases] == ["flops-256", "flops-512", "saved", "methods-s4", "half-s4", "interval-s4"]
    assert "step-s4 (needs --reference)" in skipped
    _, rows, _ = run(command, tmp_path, ["methods-s4"])
    assert rows["methods-s4"]["official"] is None and rows["methods-s4"]["ratio"] > 0


def test_a_case_that_does_not_fit_is_a_row(command, tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    cases = [replace(case, run=full) if case.name == "flops-256" else case for case in speed.CASES]
    monkeypatch.setattr(speed, "CASES", cases)
    _, rows, page = run(command, tmp_path, ["flops-256", "flops-512"])
    assert rows["flops-256"]["ours"] is None and rows["flops-512"]["within"] is True
    assert "does not fit in memory" in page


def test_no_case_starts_after_the_minutes(command, tmp_path):
    _, rows, page = run(command, tmp_path, ["methods-s4", "half-s4"], "--minutes", -1)
    assert rows == {} and "Not run: methods-s4 (no time left), half-s4 (no time left)." in page


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--only", "step-s4", "speed"], "--only has speed, expected names of flops-256, "),
        (["--only", "step-s4"], "--only has step-s4, which needs the official code: pass --reference"),
        (["--threads", 0], "Found --threads 0"),
    ],
)
def test_invalid_flags_are_refused(command, flags, words):
    result = command(speed.main, *FLAGS, *flags)
    assert result.code == 2 and words in result.err


def test_cases_of_another_device_are_refused(command):
    result = command(speed.main, "--device", "cpu", "--threads", 1, "--only", "train-256")
    assert result.code == 2 and "--only has train-256, expected cases for --device cpu" in result.err
