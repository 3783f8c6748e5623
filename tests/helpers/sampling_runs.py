"""Run sample_ddp.py on the tiny adapter, in other processes or in this one."""

import pytest
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler  # noqa: F401  slow to import: forks have them
from helpers.launch import die_at, launch, worst
from helpers.tiny_files import CLASSES

import sample_ddp

NAMES = [name for names in CLASSES.values() for name in names]


@pytest.fixture
def run(adapter, tmp_path):
    """run(name, *flags, world=1, kill=None) -> exit code; 11 images in 3 steps to tmp_path/name unless flags say otherwise.

    kill = (rank, count): kill that rank when it begins a file operation after `count` earlier ones.
    """

    def run(name, *flags, world=1, kill=None):
        start = ["--ckpt", adapter, "--sample-dir", tmp_path, "--name", name, "--num-sampling-steps", 3]
        flags = [*start, "--num-fid-samples", 11, "--format", "both", *flags]
        kills = {kill[0]: kill[1]} if kill else {}
        codes = launch(sample_ddp.main, flags, tmp_path, world, lambda rank: rank in kills and die_at(kills[rank]))
        return codes[kill[0]] if kill else worst(codes)

    return run


@pytest.fixture
def here(adapter, tmp_path, command):
    """here(name, *flags) does the same in this process -> code, out, err."""

    def here(name, *flags):
        start = ["--ckpt", adapter, "--sample-dir", tmp_path, "--name", name, "--num-sampling-steps", 3]
        return command(sample_ddp.main, *start, "--num-fid-samples", 11, "--format", "both", *flags)

    return here


def files(root, name):
    """Return {path: bytes} of a run: its folder and npz."""
    found = {f"{name}.npz": (root / f"{name}.npz").read_bytes()} if (root / f"{name}.npz").exists() else {}
    found |= {str(path.relative_to(root)): path.read_bytes() for path in (root / name).rglob("*") if path.is_file()}
    return {path.removeprefix(name): content for path, content in found.items()}
