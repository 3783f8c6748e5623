"""Files that a GPU makes against those of the CPU: latents, metrics, exports; and the autoencoder in half precision."""

import sys
from contextlib import nullcontext, suppress

import numpy as np
import pytest
import torch
from helpers.gpu import DEVICE, NUMBERS, assert_close, draw, exact, numbers_in, read_json, run, run_apart
from helpers.image_sets import write_set
from helpers.tiny_files import write_images
from helpers.tiny_models import ROOT

import evaluate
from autoencoder import SD_SCALE, Autoencoder, load_autoencoder
from benchmarks.harness import Bench
from benchmarks.sampling_cases import random_vae
from runtime.device import DTYPES
from tools import encode_latents, export

GLYPHS = ROOT / "examples/glyphs/vae"


def psnr(found, expected):
    """Return the peak signal-to-noise ratio of images in [-1, 1], in dB."""
    error = (found.clamp(-1, 1) - expected.clamp(-1, 1)).double().pow(2).mean().item()
    return 10 * np.log10(4 / max(error, 1e-12))


@pytest.mark.parametrize("weights", ["random", "glyphs"])
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_autoencoder(cuda_only, half, weights):
    """Moments and decoded images in half precision against float32, in the size of Stable Diffusion's autoencoder."""
    if half == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs a GPU from Ampere on for bf16")
    exact()
    vaes = [
        random_vae(Bench(DEVICE)) if weights == "random" else load_autoencoder(GLYPHS, DEVICE).vae for _ in range(2)
    ]
    full, low = Autoencoder(vaes[0], SD_SCALE), Autoencoder(vaes[1].to(DTYPES[half]), SD_SCALE)
    images = torch.tanh(torch.nn.functional.interpolate(draw(4, 3, 16, 16), size=256, mode="bicubic")).to(DEVICE)
    moments = [each.encode_moments(images) for each in (low, full)]
    for found, expected in zip(*moments):
        assert_close(found, expected, {"bf16": 2e-2, "fp16": 5e-3}[half])
    for pixels in (256, 512):
        side = pixels // full.downscale
        latents = draw(2, full.channels, side, side).to(DEVICE)
        found, expected = (each.decode(latents) for each in (low, full))
        assert found.shape == (2, 3, pixels, pixels)
        assert not NUMBERS or found.isfinite().all() and psnr(found, expected) >= (40 if half == "fp16" else 30)


def test_encode_latents(tmp_path):
    """The moments that a GPU writes are the CPU's within 2e-3."""
    images = write_images(tmp_path / "images", 64, each=8)
    flags = ["--data-path", images, "--vae", GLYPHS, "--image-size", 64, "--num-workers", 0, "--mixed-precision", "no"]
    exact()
    encode_latents.main([*map(str, flags), "--out", str(tmp_path / "gpu")])
    run_apart("tools.encode_latents", *flags, "--out", tmp_path / "cpu", gpu=False)
    found, expected = (np.load(tmp_path / name / "moments.npy").astype(np.float32) for name in ("gpu", "cpu"))
    assert found.shape == expected.shape == (40, 2, *expected.shape[2:])
    assert not NUMBERS or np.abs(found - expected).max() <= 2e-3
    records = [read_json(tmp_path / name / "latents.json") for name in ("gpu", "cpu")]
    assert records[0].keys() == records[1].keys()


def test_evaluate(tmp_path):
    """All metrics of 2 x 250 images of 64 pixels, from networks with random weights, are the CPU's within a thousandth."""
    for name, seed in (("real", 1), ("fake", 2)):
        write_set(tmp_path / name, 64, 50 if DEVICE.type == "cuda" else 6, seed)
    flags = [tmp_path / "real", tmp_path / "fake", "--random-weights", "--num-workers", 0, "--lpips-trunk", "none"]
    flags += ["--features", "timm:vit_tiny_patch16_224", "--floor"]
    exact()
    with nullcontext() if NUMBERS else suppress(IndexError, ValueError, AssertionError):  # metrics of no numbers
        run(evaluate.main, *flags, "--output", tmp_path / "gpu")
    if not NUMBERS:
        return
    run_apart("evaluate.py", *flags, "--output", tmp_path / "cpu", gpu=False)
    reports = [read_json(tmp_path / name / "metrics.json") for name in ("gpu", "cpu")]
    found, expected = (numbers_in([report["overall"], report["superclasses"]]) for report in reports)
    assert found.keys() == expected.keys() and len(expected) >= 10
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


def test_exports(adapter, tmp_path, monkeypatch):
    """The exported pipeline samples on the GPU in each precision what it samples on the CPU, and checkpoints load."""
    from diffusers import DiffusionPipeline  # slow to import

    exact()
    run(export.main, "--ckpt", adapter, "--format", "diffusers", "--out", tmp_path / "pipe")
    run(export.main, "--ckpt", adapter, "--format", "finediffusion", "--out", tmp_path / "finediffusion.pt")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def sample_on(device, dtype):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True, torch_dtype=dtype).to(
            device
        )
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(
            np.asarray(pipe([0, 3], num_inference_steps=4, generator=generator, output_type="np").images)
        )

    expected = sample_on(torch.device("cpu"), torch.float32)
    for half, tolerance in (("no", 1e-3), ("fp16", 5e-2), ("bf16", 5e-2)):
        if DEVICE.type == "cpu" and half == "fp16":
            continue
        assert_close(sample_on(DEVICE, DTYPES[half]).float(), expected, tolerance, half)
    weights = torch.load(tmp_path / "finediffusion.pt", map_location=DEVICE)
    assert all(t.device.type == DEVICE.type for t in weights.values() if torch.is_tensor(t))
