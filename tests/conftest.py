"""What the tests of the programs share: calls in this process, tiny images, tiny starting points."""

import argparse
import os

import huggingface_hub.constants
import pytest
import torch
from helpers import torture as reliability
from helpers.commands import call
from helpers.tiny_files import random_dit, write_adapter, write_images

from hierarchy import Hierarchy

pytest_addoption, pytest_configure = reliability.pytest_addoption, reliability.pytest_configure
pytest_runtest_setup, pytest_terminal_summary = reliability.pytest_runtest_setup, reliability.pytest_terminal_summary
cases, figure = reliability.cases, reliability.figure

torch.set_num_threads(1)  # the models are tiny: more threads wait for each other, see also one_thread
if os.environ.get("FD_GPU") != "1":  # only tests/gpu uses GPUs, see helpers/gpu.py
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first used: the suite runs on the CPU, on GPU nodes too
os.environ["FINEDIFFUSION_CACHE"] = os.devnull  # no names of species but those of a test
os.environ["HF_HUB_OFFLINE"] = "1"  # for other processes
huggingface_hub.constants.HF_HUB_OFFLINE = True
torch.ones(1, requires_grad=True).sum().backward()  # start autograd without threads, so that tests may fork


@pytest.fixture(autouse=True)
def one_thread():
    """No test leaves this process on several threads: a fork of it would wait for those that it does not have."""
    yield
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 1


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """20 images of 8 pixels in 5 classes under 2 superclasses."""
    return write_images(tmp_path_factory.mktemp("images") / "pets", 8)


@pytest.fixture(scope="session")
def images64(tmp_path_factory):
    """The same in 64 pixels, for the autoencoder."""
    return write_images(tmp_path_factory.mktemp("images64") / "pets", 64)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A plain DiT of 8 pixels and 9 classes, as DiT is published: tensors by name."""
    path = tmp_path_factory.mktemp("base") / "dit.pt"
    torch.save(random_dit(input_size=8, in_channels=3, num_classes=9), path)
    return path


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    """A FineDiffusion of the classes of `images`, as the official code saves it."""
    path = tmp_path_factory.mktemp("official") / "finediffusion.pt"
    sizes = dict(input_size=8, in_channels=3, num_classes=5, num_super_classes=2, parents=[0, 0, 1, 1, 1])
    ema, now = random_dit(1, affine=True, **sizes), random_dit(2, affine=True, **sizes)
    record = {"model": {f"module.{name}": tensor for name, tensor in now.items()}, "ema": ema, "opt": {"state": {}}}
    torch.save(record | {"args": argparse.Namespace(model="DiT-Ti/2", image_size=8)}, path)
    return path


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, images, base):
    """An adapter of the classes of `images` on `base`."""
    return write_adapter(
        tmp_path_factory.mktemp("adapter") / "adapter.safetensors", base, Hierarchy.from_folder(images)
    )


@pytest.fixture(scope="session")
def command():
    """command(program.main, *flags) -> code, out, err: what a shell would see of `python program.py *flags`."""
    return call
