"""Training steps on a GPU: movement of the parameters, non-finite losses, waits, draws, resuming, two GPUs."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from helpers.gpu import (
    DEVICE,
    HALF,
    NUMBERS,
    PRECISIONS,
    assert_close,
    assert_same,
    draw,
    half_precision,
    make_trainer,
    run,
    run_apart,
    small_dit,
    training_noise,
)
from helpers.tiny_files import write_images
from helpers.tiny_models import ROOT

import train
from checkpoint.format import read_weights
from finetune import kind_of
from training.step import draw_step_noise

LABELS = torch.arange(8) % 5


def steps(trainer, count, seed=0):
    for k in range(count):
        trainer.step(draw(8, 4, 32, 32, seed=seed + k), LABELS, training_noise(8, 32, seed + k))


@PRECISIONS
def test_steps(precision):
    """Five steps move the parameters and their averages as on a CPU; AdamW's first steps are the signs of gradients."""
    tolerance = {"fp32": 2e-2, "tf32": 1e-1, "fp16": 1e-1, "bf16": 2.5e-1}[precision]
    start = {name: p.detach().clone() for name, p in small_dit().named_parameters()}
    sides = []
    for half, device in (("no", torch.device("cpu")), (HALF[precision], DEVICE)):
        trainer = make_trainer(small_dit(), half, device)
        steps(trainer, 5)
        sides.append(trainer)
    expected, found = sides
    names = [name for name in found.parameters if kind_of(name) != "table"]  # most of its rows do not move
    for pick in (lambda side: side.parameters, lambda side: side.ema.average):
        moved = [
            torch.cat([(pick(s)[n].cpu() - start[n]).flatten().detach() for n in names]) for s in (found, expected)
        ]
        assert_close(*moved, tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"], indirect=True)
def test_nan_step(precision):
    """A NaN loss moves nothing. In fp16 the scale is halved and the next step moves; else all later steps are skipped."""
    trainer = make_trainer(small_dit(), HALF[precision])
    steps(trainer, 1)
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    scale = trainer.accelerator.scaler and trainer.accelerator.scaler.get_scale()
    trainer.step(draw(8, 4, 32, 32) * float("nan"), LABELS, training_noise(8, 32))
    assert_same(dict(trainer.parameters), before)
    counts = {int(state["step"].item()) for state in trainer.optimizer.state.values()}
    assert counts == {1} or not NUMBERS
    steps(trainer, 1, seed=5)
    still = [name for name, p in trainer.parameters.items() if p.equal(before[name])]
    if not NUMBERS:
        return
    if precision == "fp16":
        assert trainer.accelerator.scaler.get_scale() == scale / 2 and not still
    else:
        assert len(still) == len(before)


def test_no_waits_in_training(cuda_only):
    trainer = make_trainer(small_dit(), half_precision())
    batch = [draw(8, 4, 32, 32).pin_memory(), LABELS.pin_memory()]
    noise = {name: values.to(DEVICE) for name, values in training_noise(8, 32).items()}
    for mode in ("default", "default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        trainer.step(*batch, noise)
        draw_step_noise(0, 1, 8, (4, 32, 32), True, 0.1, 0.0, DEVICE)


def test_draws(record_property):
    """A step's draws are the same each time, and in range; whether they are those of other GPUs is in the report."""
    options = dict(flip=True, dropout_prob=0.1, null_prob=0.1, device=DEVICE)
    first, second, other = (draw_step_noise(0, step, 256, (4, 32, 32), **options) for step in (7, 7, 8))
    assert_same(first, second)
    if NUMBERS:
        assert not first["noise"].equal(other["noise"])
        assert 0 <= first["t"].min() and first["t"].max() <= 999 and set(first["drop"].tolist()) <= {0, 1, 2}
        assert abs(first["noise"].mean()) < 0.01 and abs(first["noise"].std() - 1) < 0.01
    record_property("draws of step 7", f"{first['noise'].double().abs().sum().item():.6f}")


# ---- runs of train.py ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "pets", 64)


def flags(images, folder, size, *more):
    words = f"--model DiT-S/2 --vae none --image-size {size} --resume none --global-batch-size 8 --num-workers 0"
    words += " --lr 1e-3 --preview-images 0 --log-every 3"
    return [*words.split(), "--data-path", images, "--results-dir", folder, *more]


def last_state(folder):
    tensors, description = read_weights(max(folder.glob("states/*.safetensors")))
    return tensors, description.step


@pytest.mark.parametrize("size", [32, 64], ids=["256 tokens", "1024 tokens"])
def test_resume(cuda_only, images, tmp_path, size, record_property):
    """Six steps equal three and three in another process; with 1024 tokens only under --deterministic."""
    half = ["--mixed-precision", half_precision()]
    sure = ["--deterministic"] if size == 64 else []
    run(train.main, *flags(images, tmp_path, size, *half, *sure, "--max-steps", 6, "--experiment", "once"))
    twice = flags(images, tmp_path, size, *half, *sure, "--experiment", "twice", "--max-steps")
    run(train.main, *twice, 3)
    run_apart("train.py", *twice, 6)
    (expected, step), (found, again) = (last_state(tmp_path / name) for name in ("once", "twice"))
    assert step == again == 6
    assert_same(found, expected)
    if size == 64:
        more = flags(images, tmp_path, size, *half, "--max-steps", 6)
        runs = [last_state(tmp_path / name)[0] for name in ("a", "b") if run(train.main, *more, "--experiment", name)]
        same = all(runs[0][name].equal(runs[1][name]) for name in runs[0])
        record_property("1024 tokens without --deterministic", "the same bits" if same else "other bits")


CRAMPED = """
import os, torch, train
from runtime.cli import run_command
if os.environ["RANK"] == "1":
    torch.cuda.set_per_process_memory_fraction(0.003, 1)
run_command(train.main)
"""


def on_two_gpus(program, flags):
    """Run a program under torchrun on two GPUs; return the finished process and its seconds."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program, *flags]
    begun = time.monotonic()
    done = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done, time.monotonic() - begun


@pytest.fixture
def two_gpus(cuda_only):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")


def test_two_ranks(two_gpus, images, tmp_path, monkeypatch):
    """Four steps on two GPUs move all trained parameters as on one, see `test_steps`, and have the same losses."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")  # train.py allows TF32
    more = ["--max-steps", 4, "--mixed-precision", "no", "--experiment"]
    run_apart("train.py", *flags(images, tmp_path, 32, *more, "one"))
    done, _ = on_two_gpus("train.py", flags(images, tmp_path, 32, *more, "two"))
    assert done.returncode == 0, done.stderr
    is_bias = lambda key: key.startswith("now/") and key.endswith("mlp.fc1.bias")  # noqa: E731  all 0 at the start
    moved, losses = [], []
    for name in ("two", "one"):
        state, _ = last_state(tmp_path / name)
        moved.append(torch.cat([t.flatten() for key, t in sorted(state.items()) if is_bias(key)]))
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append(torch.tensor([json.loads(row)["loss"] for row in rows]))
    assert_close(*moved, 2e-2)
    assert_close(*losses, 1e-4)


def test_a_rank_without_memory_ends_both(two_gpus, images, tmp_path):
    (tmp_path / "cramped.py").write_text(CRAMPED)
    more = ["--max-steps", 4, "--micro-batch", 4, "--experiment", "cramped"]
    done, seconds = on_two_gpus(tmp_path / "cramped.py", flags(images, tmp_path, 64, *more))
    assert done.returncode and "memory is full" in done.stderr and seconds < 60, done.stderr
