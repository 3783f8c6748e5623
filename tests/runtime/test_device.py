"""How a device computes: precision, compilation; how long processes wait for each other."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from runtime import device, processes
from runtime.device import (
    COMPILED_STEPS,
    best_device,
    describe_computation,
    half_dtype,
    resolve_compile,
    resolve_precision,
)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(bf16) pretends that there is a GPU that computes in bf16, or only emulates it."""

    def gpu(bf16):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")

    return gpu


@pytest.mark.parametrize(
    "wanted, ampere, volta, cpu",
    [("auto", "bf16", "fp16", "no"), ("bf16", "bf16", "fp16", "bf16"), ("no", "no", "no", "no")],
)
def test_precisions(wanted, ampere, volta, cpu, gpu):
    gpu(bf16=True)
    assert resolve_precision(wanted, "cuda") == ampere
    gpu(bf16=False)
    assert resolve_precision(wanted, "cuda") == volta and resolve_precision(wanted, "cpu") == cpu


def test_fp16_is_for_gpus():
    assert resolve_precision("fp16", "cuda") == "fp16"
    with pytest.raises(ValueError, match="--mixed-precision is fp16, expected a GPU for it"):
        resolve_precision("fp16", "cpu")


def test_a_long_run_on_a_gpu_is_compiled_unasked(monkeypatch):
    lenient = []
    monkeypatch.setattr(device, "can_compile", lambda: True)
    monkeypatch.setattr(device, "run_eagerly_if_compilation_fails", lambda: lenient.append(True))
    assert resolve_compile(None, "cuda", COMPILED_STEPS) and lenient == [True]
    assert not resolve_compile(None, "cuda", COMPILED_STEPS - 1) and not resolve_compile(None, "cpu", 10**9)
    for asked in (True, False):
        assert resolve_compile(asked, "cuda", 1) is resolve_compile(asked, "cpu", 10**9) is asked
    monkeypatch.setattr(device, "can_compile", lambda: False)
    assert not resolve_compile(None, "cuda", 10**9) and resolve_compile(True, "cuda", 1) and lenient == [True]


@pytest.mark.parametrize("found, headers, expected", [("gcc", True, True), ("gcc", False, False), (None, True, False)])
def test_a_compiler_and_headers_are_needed(found, headers, expected, monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(device.shutil, "which", lambda name: found if name == found else None)
    monkeypatch.setattr(device.sysconfig, "get_path", lambda name: str(tmp_path))
    if headers:
        (tmp_path / "Python.h").touch()
    assert device.can_compile() == expected


def test_a_computation_in_words(gpu):
    gpu(bf16=True)
    assert describe_computation("cuda", "bf16", True) == "NVIDIA H200, bf16, compiled"
    assert describe_computation("cpu", "no", False) == "CPU, float32"
    assert half_dtype("no") is None and half_dtype("bf16") == torch.bfloat16


def test_processes_wait_for_days(monkeypatch):
    """NCCL's ten minutes would end a job in which one process downloads, previews or encodes for longer."""
    seen = []
    monkeypatch.setattr(
        processes, "PartialState", lambda **options: seen.append(options) or SimpleNamespace(device="cpu")
    )
    processes.start_processes()
    assert seen[0]["timeout"] >= timedelta(days=1)


@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_gpu_of_an_apple_computer_is_used(cuda, mps, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert best_device() == expected
    assert resolve_precision("auto", "mps") == "no"
