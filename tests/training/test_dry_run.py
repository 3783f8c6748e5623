"""train.py --dry-run with data: what the run would be, as the run itself then says."""

import json
import re

import pytest
from helpers.tiny_files import tree
from helpers.tiny_models import GOLDEN
from helpers.tiny_runs import DEFAULT_AVERAGE

import train

LATENTS = GOLDEN / "before/latents"  # 20 images of 8 pixels in 5 classes
TINY = [*DEFAULT_AVERAGE, "--gpu-memory", "0.7"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_dry_run_with_images_says_what_the_run_says(precision, command, images, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = *TINY, "--data-path", images, "--epochs", 1, "--mixed-precision", precision
    result = command(train.main, "--dry-run", *flags)
    assert result.code == 0 and tree(tmp_path) == {}, result.err
    found = json.loads(result.out)
    assert [found[name] for name in ("num_classes", "num_super_classes", "images")] == [5, 2, 20]
    assert [found[name] for name in ("steps", "epochs", "ema_warmup")] == [5, 1, 25]  # 4 images per step
    assert found["warnings"] == [] and found["trainable_params"] == 23_064 and found["mixed_precision"] == precision
    assert found["memory_gib"]["gpu"] == 0.7
    result = command(train.main, *flags, "--resume", base, "--max-steps", 1, "--preview-images", 0)
    assert result.code == 0, result.err
    (memory,) = re.findall("memory: (.*)\n", result.out)
    assert memory == found["memory"] and memory.endswith("4 per forward pass) of 0.7 GiB")
    assert (found["micro_batch"], found["forward_passes"]) == (4, 1)


def test_a_dry_run_with_latents_reads_their_shape(command):
    flags = "--dry-run", *DEFAULT_AVERAGE, "--latents", LATENTS
    result = command(train.main, *flags, "--max-steps", 3)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert [found[name] for name in ("images", "steps", "epochs", "num_classes")] == [20, 3, 0.6, 5]
    for wrong, words in (
        (("--image-size", 16), "image size 8, expected 16"),
        (("--vae", "mse"), "channels 3, expected 4"),
    ):
        result = command(train.main, *flags, *wrong)
        assert result.code == 2 and words in result.err


def test_a_dry_run_without_such_data_is_refused(command, tmp_path):
    for flags in (("--data-path", "nowhere"), ("--latents", tmp_path), ("--data-path", "a", "--latents", "b")):
        assert command(train.main, "--dry-run", *flags).code == 2


def test_a_dry_run_plans_for_half_precision_on_a_gpu_and_for_none_without_one(command):
    flags = "--dry-run", *DEFAULT_AVERAGE, "--latents", LATENTS
    found = [json.loads(command(train.main, *flags, *more).out) for more in ((), ("--gpu-memory", 24))]
    assert [each["mixed_precision"] for each in found] == ["no", "bf16"]
    assert [each["memory_gib"]["gpu"] for each in found] == [None, 24]
