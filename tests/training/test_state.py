"""A run that was stopped, damaged or changed resumes with equal results, or is refused with the reason."""

import json
import os
import re
import shutil
import signal
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import LoggerType
from helpers.tiny_files import tree
from helpers.tiny_models import PETS, described, same
from helpers.tiny_runs import SAVING, SPEEDS, differences, outcome
from tensorboard.backend.event_processing import event_accumulator

import train
from checkpoint.format import read_weights
from runtime.signals import Signals
from training import logger
from training.folder import list_states
from training.state import saved_precision, saved_warmup

FLAGS = [*SAVING, *"--preview-images 0 --max-steps 8".split()]


@pytest.fixture(scope="module")
def flags(images, base, tmp_path_factory):
    """flags(name, *more) -> the flags of a run of eight steps."""
    root = tmp_path_factory.mktemp("runs")

    def flags(name, *more):
        start = ("--data-path", images, "--resume", base, "--results-dir", root, "--experiment", name)
        return [str(flag) for flag in (*FLAGS, *start, *more)]

    flags.root = root
    return flags


@pytest.fixture(scope="module")
def unbroken(command, flags):
    assert command(train.main, *flags("unbroken")).code == 0
    return flags.root / "unbroken"


def results(folder):
    """Return (tensors of the last state, rows of metrics without speeds)."""
    tensors, _ = read_weights(list_states(folder)[0])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return tensors, [{key: value for key, value in row.items() if key not in SPEEDS} for row in rows]


def at_step(monkeypatch, step, action):
    """Call `action()` once, after the losses of `step` (from 1) are added."""
    add, calls = logger.MetricLogger.add_step, []

    def added(log, *arguments):
        add(log, *arguments)
        calls.append(None)
        if len(calls) == step:
            action()

    monkeypatch.setattr(logger.MetricLogger, "add_step", added)


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGUSR2", 75), ("SIGINT", 130)])
def test_a_signal_saves_the_state_and_stops_the_run(number, code, command, flags, unbroken, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), getattr(signal, number)))
        result = command(train.main, *flags(number))
    for name in Signals.CODES:
        signal.signal(name, signal.SIG_DFL if name != signal.SIGINT else signal.default_int_handler)
    signal.signal(signal.SIGTERM, before)
    assert result.code == code and "state of step 5 saved; run the same command to resume" in result.out
    folder = flags.root / number
    assert [path.stem for path in list_states(folder)] == ["0000005", "0000003"]
    assert command(train.main, *flags(number)).code == 0
    assert not differences(folder, outcome(unbroken))


# ---- states --------------------------------------------------------------------------------------


def flip(path, position, bit=3):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "header"])
def test_a_damaged_state_is_skipped(damage, command, flags, unbroken):
    folder = flags.root / damage
    shutil.copytree(unbroken, folder)
    newest = list_states(folder)[0]
    size = newest.stat().st_size
    {
        "flip": lambda: flip(newest, size // 2),
        "cut": lambda: os.truncate(newest, size - 1),
        "empty": lambda: os.truncate(newest, 0),
        "header": lambda: flip(newest, 200),
    }[damage]()
    (folder / "adapters/0000008.safetensors").unlink()
    result = command(train.main, *flags(damage))
    assert result.code == 0 and re.search("0000008.safetensors is damaged.*Using the state before it", result.out)
    assert not differences(folder, outcome(unbroken))


def test_a_run_is_refused_if_all_its_states_are_damaged(command, flags, unbroken):
    folder = flags.root / "hopeless"
    shutil.copytree(unbroken, folder)
    for path in list_states(folder):
        os.truncate(path, 100)
    before = tree(folder)
    result = command(train.main, *flags("hopeless"))
    assert result.code == 2 and result.err.startswith("train.py: All 3 training states of") and tree(folder) == before


def test_the_most_recent_states_are_kept(unbroken, command, flags):
    assert [path.stem for path in list_states(unbroken)] == ["0000008", "0000006", "0000003"]
    assert command(train.main, *flags("kept", "--ckpt-every", 1, "--keep-states", 2)).code == 0
    assert [path.stem for path in list_states(flags.root / "kept")] == ["0000008", "0000007"]
    assert len(list((flags.root / "kept/adapters").iterdir())) == 8


def test_an_older_state_begins_a_new_branch(unbroken, command, flags):
    folder = flags.root / "branch"
    shutil.copytree(unbroken, folder)
    more = ["--resume", folder / "states/0000003.safetensors", "--max-steps", 4, "--keep-states", 2]
    assert command(train.main, *flags("branch", *more)).code == 0
    assert [path.stem for path in list_states(folder)] == ["0000004", "0000003"]
    (folder / "adapters/0000004.safetensors").unlink()
    assert command(train.main, *flags("branch")).code == 0
    assert not differences(folder, outcome(unbroken))


def test_other_settings_and_other_data_are_refused(command, flags, unbroken, images, tmp_path):
    shutil.copytree(unbroken, flags.root / "changed")
    result = command(train.main, *flags("changed", "--max-steps", 9, "--lr", 0.5))
    assert result.code == 2 and "--lr 0.001 (now 0.5)" in result.err and "--allow-changes" in result.err
    shutil.copytree(images, tmp_path / "pets")
    shutil.copy(images / "cats/manx/0.png", tmp_path / "pets/cats/manx/9.png")
    more = flags("changed", "--max-steps", 9, "--data-path", tmp_path / "pets")
    result = command(train.main, *more)
    assert result.code == 2 and "was started with other images or labels" in result.err
    assert command(train.main, *more, "--allow-changes").code == 0
    # flags that do not decide the results may change
    harmless = ("--grad-accum", 2, "--grad-checkpointing", "--log-every", 1)
    assert command(train.main, *flags("unbroken", *harmless)).code == 0


def test_other_starting_weights_are_refused(command, flags, unbroken, base, tmp_path):
    """They would not be used: trained parameters come from the state, the others from its base."""
    shutil.copytree(unbroken, flags.root / "weights")
    tensors = torch.load(base, weights_only=True)
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "other.pt")
    shutil.copy(base, tmp_path / "moved.pt")
    before = tree(flags.root / "weights")
    for weights, words in (
        (tmp_path / "other.pt", f"{tmp_path}/other.pt is not the base of "),
        (tmp_path / "lost.pt", f"there is no {tmp_path}/lost.pt: put it there"),
        ("none", f"was started with --resume {base}, found none"),
    ):
        result = command(train.main, *flags("weights", "--max-steps", 9, "--resume", weights))
        assert result.code == 2 and words in result.err and tree(flags.root / "weights") == before
    adapter = unbroken / "adapters/0000003.safetensors"
    for steps, weights in ((9, tmp_path / "moved.pt"), (10, adapter), (11, flags.root / "weights")):
        assert command(train.main, *flags("weights", "--max-steps", steps, "--resume", weights)).code == 0


def test_a_run_from_random_weights_resumes_without_other_weights(command, flags, base):
    assert command(train.main, *flags("random", "--max-steps", 1, "--resume", "none")).code == 0
    assert command(train.main, *flags("random", "--max-steps", 2, "--resume", "none")).code == 0
    result = command(train.main, *flags("random", "--max-steps", 3, "--resume", base))
    assert result.code == 2 and f"was started with --resume none, found {base}" in result.err


# ---- equal results another way -------------------------------------------------------------------


AUTO = "--micro-batch", "auto", "--gpu-memory", 0.5  # too little for two images: one per pass


@pytest.mark.parametrize("more", [AUTO, ("--grad-checkpointing",), ("--grad-accum", 2)])
def test_saving_memory_gives_the_same_results(more, command, flags, unbroken):
    name = more[0].strip("-")
    result = command(train.main, *flags(name, *more))
    assert result.code == 0 and ("1 per forward pass) of 0.5 GiB: too much" in result.out) == (more == AUTO)
    ours, theirs = results(flags.root / name), results(unbroken)
    for row, expected in zip(ours[1], theirs[1], strict=True):
        known = {
            key: value for key, value in expected.items() if value is not None
        }  # no timestep of a quartile was drawn
        assert {key: row[key] for key in known} == pytest.approx(known, rel=1e-4) and row.keys() == expected.keys()


def test_half_precision_is_close_to_single_precision(command, flags, unbroken):
    """A run that began in half precision resumes in it, if no precision is asked for."""
    assert command(train.main, *flags("bf16", "--mixed-precision", "bf16", "--max-steps", 4)).code == 0
    (state,) = [path for path in list_states(flags.root / "bf16") if path.stem == "0000004"]
    assert saved_precision([flags.root / "lost", state]) == "bf16" and saved_precision([]) == "auto"
    result = command(train.main, *flags("bf16"))
    assert result.code == 0 and "1 process on CPU, bf16" in result.out, result.err
    assert command(train.main, *flags("bf16", "--mixed-precision", "no", "--max-steps", 9)).code == 2
    ours, theirs = results(flags.root / "bf16"), results(unbroken)
    assert all(t.dtype == torch.float32 for name, t in ours[0].items())
    assert [row["loss"] for row in ours[1]] == pytest.approx([row["loss"] for row in theirs[1]], rel=0.02)
    assert ours[1][0]["loss"] != theirs[1][0]["loss"]  # computed in half precision


def test_a_deterministic_run_has_the_same_numbers_on_a_cpu(command, flags, unbroken, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        assert command(train.main, *flags("deterministic", "--deterministic")).code == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(results(flags.root / "deterministic")[0], results(unbroken)[0])


def test_tensorboard_gets_the_rows_and_the_grid(command, flags):
    more = ("--report-to", "tensorboard", "--preview-images", 2, "--max-steps", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PREVIEW, "steps", 2)
        result = command(train.main, *flags("tracked", *more))
    assert result.code == 0, result.err
    events = event_accumulator.EventAccumulator(str(flags.root / "tracked/finediffusion"))
    events.Reload()
    rows = [json.loads(line) for line in (flags.root / "tracked/metrics.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])
    assert [event.step for event in events.Images("samples")] == [3, 4]


def test_trackio_gets_the_rows_and_the_grid(command, flags, monkeypatch):
    """The package has many dependencies, so a recorder takes its place; it was tried with trackio 0.43."""
    begun, logged = [], []
    run = SimpleNamespace(log=lambda values, step, **more: logged.append((step, values)), finish=lambda: None)
    trackio = ModuleType("trackio")
    trackio.__spec__ = ModuleSpec("trackio", None)
    trackio.init = lambda **options: begun.append(options) or run
    trackio.Image = lambda pixels: pixels
    trackio.config = SimpleNamespace(update=lambda values, **more: None)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TRACKIO])
    monkeypatch.setitem(train.PREVIEW, "steps", 2)
    result = command(train.main, *flags("recorded", "--report-to", "trackio", "--preview-images", 2, "--max-steps", 2))
    assert result.code == 0, result.err
    assert begun == [{"project": "finediffusion", "name": "recorded", "resume": "allow", "embed": False}]
    (first, row), (second, grid) = logged
    assert (first, second) == (2, 2) and row["loss"] > 0 and "step" not in row  # trackio reserves that name
    assert grid["samples"].dtype == np.uint8 and grid["samples"].shape[2] == 3


@pytest.mark.parametrize("saved, warmup", [(False, 0), (True, 10), (25, 25), (None, 0)])
def test_the_warmup_of_earlier_states_is_read(saved, warmup):
    assert saved_warmup(described(PETS, settings={"ema_warmup": saved})) == warmup
