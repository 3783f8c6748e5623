"""Decoding in parts; the encoder's digest: what it covers, and that runs and latents of another encoder are refused."""

import json
import shutil

import pytest
import torch
from helpers.tiny_models import PETS, ROOT, described, refusal
from safetensors.torch import load_file, save_file

import autoencoder
import train
from autoencoder import Autoencoder, load_autoencoder
from checkpoint.description import ADAPTER, ModelDescription
from checkpoint.format import read_description
from dataset import latents
from dataset.latents import LatentData
from tools import encode_latents

VAE = ROOT / "examples/glyphs/vae"
WEIGHTS = "diffusion_pytorch_model.safetensors"
OTHER = "R16", "latents and runs of another encoder: refused, also if only its weights differ"
MODEL = (
    "--model DiT-Ti/2 --image-size 64 --num-workers 0 --resume none --global-batch-size 4 --preview-images 0".split()
)


def write_vae(folder, change=None, dtype=torch.float16, **config):
    """Write a copy of the glyphs' autoencoder, in which the tensors whose names start with `change` differ."""
    shutil.copytree(VAE, folder)
    tensors = {name: t.to(dtype) for name, t in load_file(folder / WEIGHTS).items()}
    for name in [name for name in tensors if change and name.startswith(change)][:1]:
        tensors[name] = tensors[name] * 1.01 + 0.01
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(json.loads((VAE / "config.json").read_text()) | config))
    return str(folder)


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """Autoencoders with the same scale: a copy, one with another decoder and one with another encoder."""
    root = tmp_path_factory.mktemp("vaes")
    return {
        name: write_vae(root / name, name) for name in ("copy", "decoder", "encoder", "quant_conv", "post_quant_conv")
    }


def digest(folder, **options):
    return load_autoencoder(str(folder), **options).encoder_digest()


@pytest.mark.parametrize("device, size, images", [("cuda", 32, 8), ("cuda", 64, 2), ("cuda", 256, 1), ("cpu", 64, 32)])
def test_a_gpu_decodes_a_batch_in_parts(device, size, images, monkeypatch):
    """For 32 images of 512 pixels at once, the published autoencoders would take 25 GiB in float32."""
    assert autoencoder.decoded_together(32, (8 * size) ** 2, torch.device(device)) == images
    vae, latents, sizes = load_autoencoder(VAE), torch.randn(5, 4, 2, 2), []
    at_once = vae.decode(latents)
    vae.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(autoencoder, "decoded_together", lambda *arguments: 2)
    assert torch.allclose(vae.decode(latents), at_once, atol=1e-5) and sizes == [2, 2, 1]


def test_the_digest_covers_the_encoder_alone(vaes):
    expected = digest(VAE)
    assert len(expected) == 64 and int(expected, 16)
    same = {name for name, folder in vaes.items() if digest(folder) == expected}
    assert same == {"copy", "decoder", "post_quant_conv"}
    assert Autoencoder().encoder_digest() is None and load_autoencoder("none").encoder_digest() is None


def test_the_digest_does_not_depend_on_the_precision(tmp_path, capfd):
    """Neither the precision of the file nor that of the computation; bfloat16 would lose digits of the weights."""
    expected = digest(VAE)
    single = write_vae(tmp_path / "single", dtype=torch.float32, force_upcast=False)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        half = load_autoencoder(single, dtype=dtype)
        assert half.dtype == dtype and half.encoder_digest() == expected
    assert "float32" not in capfd.readouterr().err  # diffusers would warn of the conversion


def encode(command, vae, images, out):
    flags = "--vae", vae, "--image-size", 64, "--num-workers", 0, "--no-flip", "--data-path", images, "--out", out
    return command(encode_latents.main, *flags)


@pytest.mark.reliability(*OTHER)
def test_latents_of_another_encoder(vaes, images64, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert encode(command, vaes["copy"], images64, "latents").code == 0
    data = LatentData("latents")
    assert data.info["encoder"] == digest(VAE)
    data.check_settings(load_autoencoder(vaes["decoder"]), 64, flip=False)
    other = digest(vaes["encoder"])
    words = (
        f"The latents in latents are of encoder {digest(VAE)[:8]} ",
        f"expected {other[:8]} of this training's --vae",
    )
    with refusal(*words, "pass the --vae they were encoded with"):
        data.check_settings(load_autoencoder(vaes["encoder"]), 64, flip=False)
    result = command(
        train.main, *MODEL, "--no-flip", "--latents", "latents", "--vae", vaes["encoder"], "--max-steps", 1
    )
    assert result.code == 2 and "are of encoder" in result.err and not (tmp_path / "results").exists()
    result = encode(command, vaes["encoder"], images64, "latents")
    assert result.code == 2 and "belongs to other images or settings" in result.err
    assert encode(command, vaes["decoder"], images64, "latents").code == 2  # --vae is another name


def test_latents_of_earlier_versions_are_not_compared(vaes, images64, command, tmp_path, monkeypatch):
    """Neither complete ones nor those that an earlier version began, which stay without a digest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encode_latents, "describe", lambda *args, f=encode_latents.describe: without_digest(f(*args)))
    assert encode(command, vaes["copy"], images64, "latents").code == 0
    begun = latents.read_sealed(tmp_path / "latents/latents.json")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert encode(command, vaes["copy"], images64, "latents").code == 0
    LatentData("latents").check_settings(load_autoencoder(vaes["encoder"]), 64, flip=False)
    encode_latents.prepare(
        tmp_path / "begun", {k: v for k, v in begun.items() if k not in ("hashes", "skipped")}
    ).close()
    assert encode(command, vaes["copy"], images64, "begun").code == 0
    assert (tmp_path / "begun/latents.json").read_bytes() == (tmp_path / "latents/latents.json").read_bytes()


def without_digest(info):
    return {name: value for name, value in info.items() if name != "encoder"}


@pytest.mark.reliability(*OTHER)
def test_a_run_does_not_resume_with_another_encoder(vaes, images64, command, tmp_path):
    start = [*MODEL, "--data-path", images64, "--results-dir", tmp_path, "--experiment", "run"]

    def run(vae, steps, *more):
        return command(train.main, *start, "--vae", vaes[vae], "--max-steps", steps, *more)

    assert run("copy", 1).code == 0
    for folder in ("adapters", "states"):
        assert read_description(tmp_path / f"run/{folder}/0000001.safetensors").encoder == digest(VAE)
    result = run("encoder", 2)
    words = f"was started with latents of another encoder, {digest(VAE)[:8]} of --vae {vaes['copy']} (now "
    assert result.code == 2 and words in result.err and "--allow-changes" in result.err
    assert run("decoder", 2).code == 0
    assert run("encoder", 3, "--allow-changes").code == 0
    assert read_description(tmp_path / "run/adapters/0000003.safetensors").encoder == digest(vaes["encoder"])


def test_the_digest_in_a_description():
    """Absent from the files of earlier versions and for pixels; anything but text is damage."""
    pixels = described(PETS, format=ADAPTER)
    assert "encoder" not in pixels.to_record()
    assert ModelDescription.from_record(pixels.to_record(), PETS).encoder is None
    record = described(PETS, format=ADAPTER, encoder="ab12").to_record()
    assert ModelDescription.from_record(record, PETS).encoder == record["encoder"] == "ab12"
    with pytest.raises(ValueError, match="its description has encoder 5"):
        ModelDescription.from_record(record | {"encoder": 5}, PETS)
