"""A run that is stopped, killed, damaged or starved goes on as if nothing had happened, or says why it cannot."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import tree
from tensorboard.backend.event_processing import event_accumulator
from tiny import ROOT, same

import checkpoint
import runs
import runtime
import steps
import train
import watching
from folders import few

FLAGS = (
    "--model DiT-Ti/2 --vae none --image-size 8 --global-batch-size 4 --num-workers 0 --lr 1e-3 --ema-decay 0.5 "
    "--preview-images 0 --log-every 2 --ckpt-every 3 --max-steps 8"
).split()
SPEEDS = ("steps_per_s", "images_per_s", "memory_gb")


@pytest.fixture(scope="module")
def flags(images, base, tmp_path_factory):
    """flags(name, *more) -> those of a run of eight steps."""
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


def outcome(folder):
    """Weights, averages and moments, and the rows of metrics but for the times."""
    tensors, _ = checkpoint.read(runs.states_of(folder)[0])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return tensors, [{key: value for key, value in row.items() if key not in SPEEDS} for row in rows]


def assert_same_outcome(folder, unbroken):
    (tensors, rows), (expected, expected_rows) = outcome(folder), outcome(unbroken)
    assert same(tensors, expected) and rows == expected_rows and [row["step"] for row in rows] == [2, 4, 6, 8]
    ours, theirs = (folder / "adapters/0000008.safetensors" for folder in (folder, unbroken))
    assert same(checkpoint.read(ours)[0], checkpoint.read(theirs)[0])


def at_step(monkeypatch, step, action):
    """Have `action()` called once, when the losses of `step` (from 1) have been added."""
    add, calls = watching.Watch.add, []

    def added(watch, *arguments):
        add(watch, *arguments)
        calls.append(None)
        if len(calls) == step:
            action()

    monkeypatch.setattr(watching.Watch, "add", added)


# ---- asked to leave ------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGUSR2", 75), ("SIGINT", 130)])
def test_a_signal_saves_and_leaves(number, code, command, flags, unbroken, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), getattr(signal, number)))
        result = command(train.main, *flags(number))
    for name in runtime.Signals.CODES:
        signal.signal(name, signal.SIG_DFL if name != signal.SIGINT else signal.default_int_handler)
    signal.signal(signal.SIGTERM, before)
    assert result.code == code and "the state of step 5 is saved, the same command goes on" in result.out
    folder = flags.root / number
    assert [path.stem for path in runs.states_of(folder)] == ["0000005", "0000003"]
    assert command(train.main, *flags(number)).code == 0
    assert_same_outcome(folder, unbroken)


def launched(flags, processes=1):
    program = [sys.executable, "train.py"]
    if processes > 1:
        handled = ",".join(f"SIG{name}" for name in "TERM INT HUP QUIT USR1 USR2".split())
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        program += ["--signals-to-handle", handled, "train.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    options = dict(cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*program, *flags], **options)


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def test_kill_9_three_times(flags, command):
    longer = ["--max-steps", "60", "--ckpt-every", "10", "--keep-states", "2"]
    folder = flags.root / "killed"
    metrics, states = folder / "metrics.jsonl", folder / "states"
    moments = [
        lambda: metrics.is_file(),  # after the first row, before any state
        lambda: any(states.glob(".*.part")) or (states / "0000010.safetensors").is_file(),  # while the first is written
        lambda: (states / "0000030.safetensors").is_file(),
    ]
    for moment in moments:
        process = launched(flags("killed", *longer))
        wait_for(moment, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (states / "0000060.safetensors").exists()
    for name in ("killed", "never-killed"):
        assert command(train.main, *flags(name, *longer)).code == 0
    (tensors, rows), (expected, expected_rows) = outcome(folder), outcome(flags.root / "never-killed")
    assert same(tensors, expected) and rows == expected_rows and len(rows) == 30


def test_two_processes_leave_together_and_go_on(flags):
    long = ["--max-steps", "400", "--ckpt-every", "1000", "--num-workers", "1"]
    folder = flags.root / "together"
    process = launched(flags("together", *long), processes=2)
    wait_for((folder / "metrics.jsonl").is_file, process)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "is saved, the same command goes on from it" in out
    (path,) = runs.states_of(folder)
    step, rows = int(path.stem), (folder / "metrics.jsonl").read_text().splitlines()
    assert step - json.loads(rows[-1])["step"] in (0, 1)  # no step between the last row and the state is lost
    alive = subprocess.run(["pgrep", "-f", f"{folder.parent}.*--experiment together"], capture_output=True, text=True)
    assert alive.stdout == ""


# ---- files that went wrong -----------------------------------------------------------------------


def flip(path, position, bit=3):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "header"])
def test_a_damaged_state_is_passed_over(damage, command, flags, unbroken):
    folder = flags.root / damage
    shutil.copytree(unbroken, folder)
    newest = runs.states_of(folder)[0]
    size = newest.stat().st_size
    {
        "flip": lambda: flip(newest, size // 2),
        "cut": lambda: os.truncate(newest, size - 1),
        "empty": lambda: os.truncate(newest, 0),
        "header": lambda: flip(newest, 200),
    }[damage]()
    (folder / "adapters/0000008.safetensors").unlink()
    result = command(train.main, *flags(damage))
    assert result.code == 0 and re.search("0000008.safetensors is damaged.*The state before it is used", result.out)
    assert_same_outcome(folder, unbroken)


def test_when_all_states_are_damaged(command, flags, unbroken):
    folder = flags.root / "hopeless"
    shutil.copytree(unbroken, folder)
    for path in runs.states_of(folder):
        os.truncate(path, 100)
    before = tree(folder)
    result = command(train.main, *flags("hopeless"))
    assert result.code == 2 and result.err.startswith("train.py: All 3 training states of") and tree(folder) == before


def test_every_bit_of_a_file_counts(unbroken, tmp_path):
    adapter = tmp_path / "adapter.safetensors"
    whole = (unbroken / "adapters/0000008.safetensors").read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for trial in range(60):
        end = header if trial % 2 else len(whole)
        position, bit = (int(torch.randint(most, (), generator=generator)) for most in (end, 8))
        adapter.write_bytes(whole)
        flip(adapter, position, bit)
        with pytest.raises(ValueError, match="adapter.safetensors is damaged"):
            checkpoint.read(adapter)


def test_the_newest_states_are_kept(unbroken, command, flags):
    assert [path.stem for path in runs.states_of(unbroken)] == ["0000008", "0000006", "0000003"]
    assert command(train.main, *flags("kept", "--ckpt-every", 1, "--keep-states", 2)).code == 0
    assert [path.stem for path in runs.states_of(flags.root / "kept")] == ["0000008", "0000007"]
    assert len(list((flags.root / "kept/adapters").iterdir())) == 8


def test_a_full_disk_leaves_the_last_state(command, flags, unbroken, monkeypatch):
    folder, save_file = flags.root / "full", checkpoint.save_file

    def full(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        if "0000006" in str(path):
            os.truncate(path, 1000)
            raise checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        result = command(train.main, *flags("full"))
    sentence = result.err.strip().split("\n")[-1]
    assert result.code == 2 and "could not be written (I/O error: No space left" in sentence
    assert "make room" in sentence
    assert [path.stem for path in runs.states_of(folder)] == ["0000003"] and not list(folder.rglob(".*"))
    assert command(train.main, *flags("full")).code == 0
    assert_same_outcome(folder, unbroken)


def test_one_launch_at_a_time(command, flags, unbroken):
    shutil.copytree(unbroken, flags.root / "twice")
    half_written = flags.root / "twice/states/.0000009.safetensors.1.part"
    half_written.touch()
    lock = runs.lock(flags.root / "twice")
    assert not half_written.exists()
    result = command(train.main, *flags("twice"))
    assert result.code == 2 and "Another process is training in" in result.err
    lock.close()
    assert command(train.main, *flags("twice")).code == 0


def test_other_settings_and_other_data(command, flags, unbroken, images, tmp_path):
    shutil.copytree(unbroken, flags.root / "changed")
    result = command(train.main, *flags("changed", "--max-steps", 9, "--lr", 0.5))
    assert result.code == 2 and "--lr 0.001 (now 0.5)" in result.err and "--allow-changes" in result.err
    shutil.copytree(images, tmp_path / "pets")
    shutil.copy(images / "cats/manx/0.png", tmp_path / "pets/cats/manx/9.png")
    more = flags("changed", "--max-steps", 9, "--data-path", tmp_path / "pets")
    result = command(train.main, *more)
    assert result.code == 2 and "was begun with other images or labels" in result.err
    assert command(train.main, *more, "--allow-changes").code == 0
    # what does not decide the numbers may change
    same_numbers = ("--grad-accum", 2, "--grad-checkpointing", "--log-every", 1)
    assert command(train.main, *flags("unbroken", *same_numbers)).code == 0


# ---- numbers that are none -----------------------------------------------------------------------


def spoil(monkeypatch, step, what, value):
    """Make the loss of image 2, or the gradient, of `step` (from 0) not finite."""
    real, drawn, calls = torch.nn.utils.get_total_norm, steps.drawn, []

    def spoiled(*arguments):
        r = drawn(*arguments)
        if arguments[1] == step and what == "loss":
            r["noise"][2, 0, 0, 0] = value
        return r

    def norm(grads):
        calls.append(None)
        if what == "gradient" and len(calls) == step + 1:
            grads[0][0] = value
        return real(grads)

    monkeypatch.setattr(train, "drawn", spoiled)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", norm)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stop_the_run(what, value, command, flags, unbroken, monkeypatch):
    name = f"{what}-{value}"
    with monkeypatch.context() as patch:
        spoil(patch, 4, what, value)
        result = command(train.main, *flags(name))
    folder, sentence = flags.root / name, result.err.strip().split("\n")[-1]
    assert result.code == 2 and f"At step 5 the {what} is not finite (images " in sentence
    rows = train.StepBatches(20, 4, 0).rows(4)
    data = train.ImageData(flags("")[flags("").index("--data-path") + 1], checkpoint.read(
        runs.states_of(folder)[0])[1]["hierarchy"], 8)  # fmt: skip
    expected = [rows[2]] if what == "loss" else rows
    timesteps = steps.drawn(0, 4, 4, (3, 8, 8), True, 0.1, 0.0, "cpu")["t"]
    shown = few(f"{data.name(i)} at timestep {timesteps[rows.tolist().index(i)]}" for i in expected)
    assert f"(images {shown})" in sentence and [path.stem for path in runs.states_of(folder)] == ["0000003"]
    assert not (folder / "adapters/0000006.safetensors").exists()
    assert command(train.main, *flags(name)).code == 0  # it was a passing fault: the run goes on from the last state
    assert_same_outcome(folder, unbroken)


def test_numbers_that_are_not_finite_can_be_passed_over(command, flags, unbroken, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, 4, "loss", float("nan"))
        result = command(train.main, *flags("skip", "--on-nonfinite", "skip", "--ckpt-every", 1, "--keep-states", 9))
    assert result.code == 0 and "At step 5 the loss is not finite" in result.out and "passed over" in result.out
    states = [checkpoint.read(path) for path in reversed(runs.states_of(flags.root / "skip"))]
    before, after = states[3][0], states[4][0]
    kept = [n for n in before if n.startswith(("now/", "exp_avg/", "exp_avg_sq/"))]
    assert all(before[n].equal(after[n]) for n in kept) and states[4][1]["updates"] == 4
    assert all(tensor.isfinite().all() for n, tensor in states[-1][0].items())
    rows = [json.loads(line) for line in (flags.root / "skip/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 0] and rows[2]["loss"] > 0


def test_after_a_bad_step_nothing_moves_until_the_run_stops():
    """The optimizer is not asked: the device alone holds it back, and for good."""
    p = torch.nn.Parameter(torch.ones(3))
    accelerator = train.Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.AdamW([p], lr=0.1, fused=True))
    update = steps.Update(accelerator, optimizer, [p], sticky=True)
    values = []
    for gradient in (1.0, float("nan"), 1.0):
        p.grad = torch.full((3,), gradient)
        update.step()
        values.append(p.detach().clone())
    assert not values[0].equal(torch.ones(3)) and values[1].equal(values[0]) and values[2].equal(values[0])
    assert optimizer.state[p]["step"] == 1


# ---- the same numbers another way ----------------------------------------------------------------


@pytest.mark.parametrize("more", [("--micro-batch", 1), ("--grad-checkpointing",), ("--grad-accum", 2)])
def test_less_memory_gives_the_same_numbers(more, command, flags, unbroken):
    name = more[0].strip("-")
    assert command(train.main, *flags(name, *more)).code == 0
    ours, theirs = outcome(flags.root / name), outcome(unbroken)
    for row, expected in zip(ours[1], theirs[1], strict=True):
        known = {
            key: value for key, value in expected.items() if value is not None
        }  # no timestep of a quartile was drawn
        assert {key: row[key] for key in known} == pytest.approx(known, rel=1e-4) and row.keys() == expected.keys()


def test_half_precision_follows_single(command, flags, unbroken):
    assert command(train.main, *flags("bf16", "--mixed-precision", "bf16")).code == 0
    ours, theirs = outcome(flags.root / "bf16"), outcome(unbroken)
    assert all(t.dtype == torch.float32 for name, t in ours[0].items())
    assert [row["loss"] for row in ours[1]] == pytest.approx([row["loss"] for row in theirs[1]], rel=0.02)
    assert ours[1][0]["loss"] != theirs[1][0]["loss"]  # it was computed in half precision


def test_a_gpu_that_only_emulates_bf16_gets_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert runtime.compute_type("bf16", "cuda") == "fp16" and runtime.compute_type("bf16", "cpu") == "bf16"
    assert runtime.compute_type("no", "cuda") == "no"


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
