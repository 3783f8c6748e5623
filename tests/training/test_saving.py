"""What a run saves, when, and what a failure in between leaves."""

import pytest
import torch
from helpers.tiny_runs import TINY

import train
from autoencoder import Autoencoder


@pytest.fixture
def run(command, images, base, tmp_path):
    """run(name, *flags) -> what the shell would see; a run in tmp_path/name."""
    start = [*TINY, "--data-path", images, "--resume", base, "--results-dir", tmp_path, "--log-every", 2]
    return lambda name, *flags: command(train.main, *start, "--experiment", name, *flags)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.glob("*/*"))


@pytest.mark.reliability("R13", "a preview that fails loses nothing")
def test_a_preview_that_fails_loses_nothing(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(train, "sample_latents", full)
    result = run("full", "--max-steps", 4, "--ckpt-every", 2)
    assert result.code == 0, result.err
    names = [f"{kind}/{step:07d}.safetensors" for kind in ("adapters", "states") for step in (2, 4)]
    assert files(tmp_path / "full") == names
    lines = (tmp_path / "full/log.txt").read_text().splitlines()
    failures = [line for line in lines if "preview of step" in line]
    assert len(failures) == 2 and "CUDA out of memory" in failures[0] and "Traceback" not in result.err


def test_a_preview_is_decoded_one_image_at_a_time(run, tmp_path, monkeypatch):
    decoded, decode = [], Autoencoder.decode
    monkeypatch.setattr(Autoencoder, "decode", lambda self, z: decoded.append(len(z)) or decode(self, z))
    assert run("preview", "--max-steps", 1).code == 0
    assert decoded == [1] * 5 and (tmp_path / "preview/samples/0000001.png").is_file()


@pytest.mark.parametrize("seconds, expected", [(600, [4, 7]), (0, [2, 7])])
def test_the_first_state_is_saved_early(seconds, expected, run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MEASURED_STEPS", 2)
    monkeypatch.setattr(train, "EARLY_STEPS", 4)
    monkeypatch.setattr(train, "EARLY_SECONDS", seconds)
    assert run("early", "--max-steps", 7, "--preview-images", 0).code == 0
    assert files(tmp_path / "early/states") == [] and files(tmp_path / "early") == [
        "adapters/0000007.safetensors",
        *(f"states/{step:07d}.safetensors" for step in expected),
    ]
