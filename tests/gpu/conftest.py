"""Skip the tests without a GPU; give each its precision, and leave the settings of torch as they were.

With FD_GPU_SECONDS, tests that would begin after so many seconds are skipped.
"""

import os
import time
from contextlib import suppress

import pytest
import torch
from helpers import gpu


def pytest_collection_modifyitems(items):
    mode, here = os.environ.get("FD_GPU"), os.path.dirname(__file__)
    reason = None
    if mode not in ("1", "cpu"):
        reason = "needs a GPU: run make gpu"
    elif mode == "1" and not torch.cuda.is_available():
        reason = "needs a GPU, found none"
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


BEGUN = time.monotonic()


def pytest_runtest_setup(item):
    seconds = float(os.environ.get("FD_GPU_SECONDS", "inf"))
    if time.monotonic() - BEGUN > seconds:
        pytest.skip(f"no time left after {seconds:.0f} s")


@pytest.fixture(scope="session", autouse=True)
def the_stand_in_is_no_gpu():
    """Numbers are compared on every device but the stand-in."""
    if gpu.DEVICE.type == "cuda":
        assert torch.cuda.get_device_name().endswith("(stand-in)") != gpu.NUMBERS


@pytest.fixture(autouse=True)
def same_settings():
    """No test leaves settings or memory behind."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    yield
    for flag, value in zip(flags, before):
        flag.allow_tf32 = value
    torch.compiler.reset()
    if gpu.DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


@pytest.fixture
def precision(request):
    """A precision of the device, set; other devices skip the test."""
    name = request.param
    gpu.exact()
    if gpu.DEVICE.type == "cpu":
        if name in ("tf32", "fp16"):
            pytest.skip(f"a CPU does not compute in {name}")
    elif name in ("tf32", "bf16") and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"needs a GPU from Ampere on for {name}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    return name


@pytest.fixture
def cuda_only():
    if gpu.DEVICE.type != "cuda":
        pytest.skip("needs CUDA")
