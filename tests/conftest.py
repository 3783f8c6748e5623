"""What the tests of the programs share: calls in this process, tiny images, tiny starting points."""

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
import reliability
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from tiny import described

import checkpoint
import runtime
from finetune import METHODS, kind_of, select
from hierarchy import Hierarchy
from models import DiT_models

pytest_addoption, pytest_configure = reliability.pytest_addoption, reliability.pytest_configure
pytest_runtest_setup, pytest_terminal_summary = reliability.pytest_runtest_setup, reliability.pytest_terminal_summary
cases, figure = reliability.cases, reliability.figure

torch.set_num_threads(1)  # the models are tiny: more threads wait for each other, see also one_thread
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first used: the suite runs on the CPU, on GPU nodes too
os.environ["HF_HUB_OFFLINE"] = "1"  # for other processes
huggingface_hub.constants.HF_HUB_OFFLINE = True
CLASSES = {"cats": ("lynx", "manx"), "dogs": ("beagle", "pug", "pug_dog")}  # 4 images each


@pytest.fixture(autouse=True)
def one_thread():
    """No test leaves this process on several threads: a fork of it would wait for those that it does not have."""
    yield
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 1


def write_images(root, size, classes=CLASSES, each=4):
    noise = np.random.default_rng(0)
    for superclass, names in classes.items():
        for name in names:
            folder = Path(root, superclass, name)
            folder.mkdir(parents=True)
            for i in range(each):
                coarse = Image.fromarray(noise.integers(0, 256, (3, 3, 3), np.uint8))
                coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return Path(root)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """20 images of 8 pixels in 5 classes under 2 superclasses."""
    return write_images(tmp_path_factory.mktemp("images") / "pets", 8)


@pytest.fixture(scope="session")
def images64(tmp_path_factory):
    """The same in 64 pixels, for the autoencoder."""
    return write_images(tmp_path_factory.mktemp("images64") / "pets", 64)


def random_dit(seed=0, affine=False, **sizes):
    """Weights of a DiT-Ti/2 in the official form, no layer zero; a plain DiT has no LayerNorm affine."""
    model = DiT_models["DiT-Ti/2"](**sizes)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, p in model.state_dict().items():
        if name == "pos_embed":
            weights[name] = p
        elif kind_of(name) != "norm" or affine:
            weights[name] = torch.randn(p.shape, generator=generator) * 0.05 + (kind_of(name) == "norm")
    return weights


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


def write_adapter(path, base, hierarchy, method="finediffusion", seed=3, **more):
    """An adapter as train.py writes it, with random numbers in it -> its path."""
    description = described(hierarchy, method, base={"path": str(base), "sha256": runtime.sha256(base)}, **more)
    model = checkpoint.build(description)
    counts = dict(num_classes=hierarchy.num_classes, num_super_classes=model.y_embedder.num_super_classes)
    random = random_dit(seed, affine=True, input_size=8, in_channels=3, **counts)
    checkpoint.save_adapter(path, {name: random[name] for name in select(model, METHODS[method])}, model, description)
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


def call(main, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [f"{main.__module__.rsplit('.', 1)[-1]}.py", *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runtime.run_command(main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def tree(folder):
    """{path: its bytes} of all below a folder, to tell that nothing was written."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob("*"))}
