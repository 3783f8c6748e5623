"""What the tests in tests/gpu share: the device, its precisions, comparisons, models and training steps.

FD_GPU=1 shows the GPUs to the tests, as `make gpu` does. FD_GPU=cpu runs the tests on a CPU in place of the GPU, as far as
that is possible, to try the tests themselves. On the stand-in GPU (tests/standin_gpu), which sets STANDIN_GPU, everything
runs but no number is compared.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers.commands import call
from helpers.tiny_models import ROOT, awake
from torch import nn

from diffusion import create_diffusion
from finetune import EMA, METHODS, adamw, select, store_frozen
from models import DiT_models
from runtime.device import DTYPES
from runtime.private import reset_accelerate
from training.step import GuardedOptimizer, draw_step_noise, forward_backward

DEVICE = torch.device("cpu" if os.environ.get("FD_GPU") == "cpu" else "cuda")
NUMBERS = "STANDIN_GPU" not in os.environ  # whether the device computes
HALF = {"fp32": "no", "tf32": "no", "fp16": "fp16", "bf16": "bf16"}  # precision of a test: of --mixed-precision
PRECISIONS = pytest.mark.parametrize("precision", list(HALF), indirect=True)
PARENTS = [0, 0, 1, 1, 1]


def half_precision() -> str:
    """Return the half precision that the device computes in best."""
    return "bf16" if DEVICE.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def exact():
    """Compute float32 products without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


# ---- comparisons ---------------------------------------------------------------------------------


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of `expected`."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    assert found.shape == expected.shape
    return ((found - expected).norm() / expected.norm()).item()


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: object = ""):
    """Assert that two tensors of any device and type are equal up to a relative norm; non-finite values fail."""
    found_difference = difference(found, expected)
    if NUMBERS:
        assert found_difference <= tolerance, (
            f"{what} differs by {found_difference:.1e}, expected at most {tolerance:.0e}"
        )


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """Assert that two dicts of tensors are equal bit for bit."""
    assert found.keys() == expected.keys()
    different = [name for name in found if not found[name].cpu().equal(expected[name].cpu())]
    assert not (NUMBERS and different), different


# ---- models and training steps -------------------------------------------------------------------


def small_dit(name: str = "DiT-S/4", size: int = 32, channels: int = 4, seed: int = 0, **more) -> nn.Module:
    """Return a DiT on the CPU with 5 classes under 2 superclasses, in which nothing is zero."""
    torch.manual_seed(seed)
    sizes = dict(input_size=size, in_channels=channels, num_classes=5, num_super_classes=2, parents=PARENTS) | more
    return awake(DiT_models[name](**sizes), seed=seed, std=0.02)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return standard normal numbers (shape), the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def training_noise(n: int, size: int, seed: int = 0, channels: int = 4) -> dict[str, torch.Tensor]:
    """Return the draws of a step of n images on the CPU; the timesteps include 0, 1 and 999."""
    noise = draw_step_noise(seed, 0, n, (channels, size, size), False, 0.1, 0.0, "cpu")
    noise["t"][:3] = torch.tensor([0, 1, 999])[:n]
    return noise


def make_trainer(
    model: nn.Module, half: str = "no", device: torch.device = DEVICE, sticky: bool = True
) -> SimpleNamespace:
    """Return step(latents, labels, noise) -> terms (4, n), with the parts of a training run: a copy of train.py's set-up.

    half: a precision of --mixed-precision
    """
    reset_accelerate()
    accelerator = Accelerator(mixed_precision=half, cpu=device.type == "cpu")
    parameters = select(model, METHODS["finediffusion"])
    store_frozen(model, DTYPES[half])
    model.to(device).train()
    ema = EMA(parameters, 0.9)
    wrapped, optimizer = accelerator.prepare(model, adamw(parameters, 1e-4, 1e-4))
    update = GuardedOptimizer(accelerator, optimizer, parameters.values(), sticky=sticky)
    diffusion, numbers = create_diffusion(""), iter(range(10**9))

    def step(latents, labels, noise):
        noise = {name: values.to(device, non_blocking=True) for name, values in noise.items()}
        latents, labels = (x.to(device, non_blocking=True) for x in (latents, labels))
        terms = forward_backward(accelerator, wrapped, diffusion, latents.__getitem__, labels, noise)
        update.step()
        ema.update(next(numbers))
        return terms

    return SimpleNamespace(**locals())


# ---- commands ------------------------------------------------------------------------------------


def run(main, *flags) -> SimpleNamespace:
    """Run a command in this process and return its output; it must succeed."""
    result = call(main, *flags)
    assert result.code == 0, result.err
    return result


def run_apart(program: str, *flags, gpu: bool = True) -> str:
    """Run a command in a process of its own, with or without the GPU, and return its stdout; it must succeed."""
    hidden = {} if gpu and DEVICE.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    start = ["-m", program] if "." in program and not program.endswith(".py") else [program]
    words = [sys.executable, *start, *map(str, flags)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | hidden, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers_in(report: object, name: str = "") -> dict[str, float]:
    """Return {"a.b.0": value} for all numbers in a JSON object."""
    if isinstance(report, bool) or not isinstance(report, dict | list | int | float):
        return {}
    if isinstance(report, int | float):
        return {name: float(report)}
    items = report.items() if isinstance(report, dict) else enumerate(report)
    return {key: value for k, each in items for key, value in numbers_in(each, f"{name}.{k}").items()}


def read_json(path) -> object:
    return json.loads(path.read_text())
