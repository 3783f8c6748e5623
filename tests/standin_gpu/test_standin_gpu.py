"""Promises of the code on GPUs that need no numbers, on a stand-in GPU: launches, waits, memory, graphs, two processes."""

import json
import subprocess
import sys

import pytest
from helpers.tiny_models import ROOT
from standin_gpu import standin

reason = standin.obstacle()
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")

CARDS = pytest.mark.parametrize("card", standin.CARDS)
SIZES = pytest.mark.parametrize("pixels", ["256", "512"])
# of an eager DiT-XL/2, in bf16 (fp16 on a V100): kernels without matrix products
TRAINING_LAUNCHES = {"h200": 2707, "a100": 2707, "v100": 2683}
SAMPLING_LAUNCHES = {"ddpm": 435, "ddim": 433, "dpm++": 434, "unipc": 446, "interval": 435}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what checks.py has measured, by card or command."""
    folder = tmp_path_factory.mktemp("standin")
    standin.build(folder)
    environment = standin.environment(folder, "h200")
    environment["PYTHONPATH"] += f":{ROOT}:{ROOT / 'tests'}"
    program = [sys.executable, "-m", "standin_gpu.checks"]
    done = subprocess.run(program, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def part(found, *names):
    for name in names:
        assert name in found, found["stderr"] if "stderr" in found else found
        found = found[name]
    return found


# ---- each card -----------------------------------------------------------------------------------


@CARDS
@SIZES
def test_a_training_step_does_not_wait(found, card, pixels):
    step = part(found, card, "training", pixels)
    assert step["waits"] == 0 and step["copies"] == 2  # the batch: moments and labels


@CARDS
@SIZES
def test_launches_of_a_training_step(found, card, pixels):
    step = part(found, card, "training", pixels)
    assert step["launches"] == pytest.approx(TRAINING_LAUNCHES[card], rel=0.02)
    assert step["products"] == pytest.approx(287, rel=0.02)


@CARDS
@SIZES
def test_the_residual_stream_is_contiguous(found, card, pixels):
    assert part(found, card, "training", pixels)["strided"] == 0


@CARDS
@SIZES
def test_the_memory_forecast(found, card, pixels):
    step = part(found, card, "training", pixels)
    assert step["peak"] == pytest.approx(step["forecast"], rel=0.05)


@CARDS
def test_attention_backend(found, card):
    """Flash attention in half precision from Ampere on; memory-efficient attention before and in float32."""
    kernels = part(found, card, "attention")
    half = "EFFICIENT_ATTENTION" if card == "v100" else "FLASH_ATTENTION"
    precision = part(found, card, "training")["precision"]
    assert precision == ("fp16" if card == "v100" else "bf16")
    for tokens in (256, 1024):
        assert kernels[f"no {tokens}"] == "EFFICIENT_ATTENTION" and kernels[f"{precision} {tokens}"] == half


@pytest.mark.parametrize("name", SAMPLING_LAUNCHES)
def test_a_step_of_the_sampler(found, name):
    step = part(found, "h200", "sampling", name)
    assert step["waits"] == step["replays"] == 0
    assert step["launches"] == pytest.approx(SAMPLING_LAUNCHES[name], rel=0.02)
    assert step["products"] == pytest.approx(116, rel=0.02)


def test_a_small_batch_is_one_launch(found):
    """The forward pass of one guided image is recorded in a graph; the rest is the sampler."""
    step = part(found, "h200", "sampling", "one image")
    assert step["waits"] == step["products"] == 0 and step["replays"] == 1 and step["launches"] <= 25


def test_compiled_graphs(found):
    """All blocks share a graph and the last layer has one; a preview and a smaller part add as many each."""
    graphs = part(found, "h200", "graphs")
    assert graphs == {"training": 2, "with a preview": 4, "with a smaller part": 6, "breaks": 0}


# ---- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, flag",
    [("backward pass", "--micro-batch 8"), ("sample_ddp", "--per-proc-batch-size 32"), ("sample", "--batch-size 32")],
)
def test_out_of_memory_is_one_sentence(found, name, flag):
    code, sentence = part(found, "out of memory", name)
    assert code == 2 and "memory is full" in sentence and flag in sentence and sentence.endswith(".")


def test_a_preview_that_runs_out_of_memory(found):
    code, _, log, states = part(found, "out of memory", "preview")
    assert code == 0 and states == 1 and "The preview of step 2 failed (CUDA out of memory" in log


def test_two_ranks(found):
    run = part(found, "two ranks")
    assert run["code"] == 0, run["log"]
    assert "2 processes" in run["log"] and "gradients exchanged in a step: 0.1 MB" in run["log"]
    assert run["adapters"] == ["0000004.safetensors"]
