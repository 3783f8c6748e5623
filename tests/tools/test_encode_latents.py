"""tools.encode_latents: its files, resuming, several processes, bad images; and benchmarks.loading."""

import contextlib
import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.launch import launch
from helpers.tiny_models import ROOT
from PIL import Image

from autoencoder import Autoencoder, load_autoencoder
from benchmarks import loading
from dataset import latents
from dataset.images import ImageData
from dataset.latents import LatentData
from hierarchy import Hierarchy
from tools import encode_latents as tool

ENCODE_BATCH = tool.encode_batch


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five images in two classes, chunks of two."""
    monkeypatch.setattr(tool, "CHUNK", 2)
    noise = np.random.default_rng(0)
    for name in ("cats/manx/1", "cats/manx/2", "cats/manx/3", "dogs/pug/1", "dogs/pug/2"):
        path = tmp_path / f"images/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return tmp_path


def run(folder, *more, size=8):
    tool.main([*flags(folder, size), "--out", str(folder / "out"), *more])
    return LatentData(folder / "out")


def flags(folder, size=8):
    words = f"--vae none --image-size {size} --num-workers 0 --batch-size 3"
    return ["--data-path", str(folder / "images"), *words.split()]


def expected(folder, flips=2):
    images = torch.stack([x for x, _, _ in images_of(folder)])
    images = torch.stack([images, images.flip(-1)], dim=1)[:, :flips]
    return torch.cat([images, torch.zeros_like(images)], dim=2).half()  # no VAE: std = 0


def hierarchy(folder):
    return Hierarchy.from_folder(folder / "images")


def images_of(folder):
    return ImageData(folder / "images", hierarchy(folder), 8)


@pytest.mark.parametrize("flips, flag", [(2, "--flip"), (1, "--no-flip")])
def test_moments_of_image_and_mirror_image(flips, flag, folder):
    data = run(folder, flag)
    assert torch.equal(torch.stack([x for x, _, _ in data]), expected(folder, flips))
    assert data.labels.tolist() == [0, 0, 0, 1, 1] and data.hierarchy == hierarchy(folder)
    assert data.paths == images_of(folder).paths and data.fingerprint == images_of(folder).fingerprint
    names = {"latents.json", "labels.npy", "moments.npy", "images.txt"}
    assert {path.name for path in (folder / "out").iterdir()} == names
    data.verify()
    data.check_settings(Autoencoder(), 8, flip=flips == 2)
    with pytest.raises(ValueError, match="have image size 8, expected 16 for this training"):
        data.check_settings(Autoencoder(), 16, flip=False)
    if flips == 1:
        with pytest.raises(ValueError, match="have flips 1, expected 2 for this training"):
            data.check_settings(Autoencoder(), 8, flip=True)


def test_mean_then_standard_deviation():
    class Two:
        def encode_moments(self, x):
            return x[:, :1] + 1, x[:, 1:2] * 0 + 5

    x = torch.arange(24.0).view(1, 3, 2, 4)
    moments = ENCODE_BATCH(x, Two(), 2)
    assert moments.shape == (1, 2, 2, 2, 4) and moments.dtype == np.float16
    assert np.array_equal(moments[0, 0, 0], x[0, 0] + 1)
    assert np.array_equal(moments[0, 1, 0], x[0, 0].flip(-1) + 1) and (moments[:, :, 1] == 5).all()


def test_the_same_command_resumes(folder, monkeypatch):
    calls = []

    def stops(images, *rest):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ENCODE_BATCH(images, *rest)

    monkeypatch.setattr(tool, "encode_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    with pytest.raises(ValueError, match="has no latents.json"):
        LatentData(folder / "out")
    with pytest.raises(ValueError, match="begun.json belongs to other images or settings"):
        run(folder, "--no-flip")
    data = run(folder)
    assert calls == [2, 2, 2, 1]  # the second chunk was begun twice
    assert torch.equal(torch.stack([x for x, _, _ in data]), expected(folder))
    data.verify()
    run(folder)
    assert len(calls) == 4  # nothing left to do
    with pytest.raises(ValueError, match="latents.json belongs to other images"):
        run(folder, size=16)


@pytest.mark.parametrize("place", ["batch", "fsync"])
def test_kill_9_loses_a_chunk_at_most(place, folder, monkeypatch):
    """SIGKILL ends the process in each batch, or at each fsync; the same command then finishes."""
    module, name = {"batch": (tool, "encode_batch"), "fsync": (os, "fsync")}[place]
    noted, signalled = [], True
    while signalled:
        shutil.rmtree(folder / "out", ignore_errors=True)
        signalled = in_a_child(lambda: run(folder), module, name, deadly(getattr(module, name), len(noted)))
        noted.append(len(list(folder.glob("out/done/[0-9]"))))
        with monkeypatch.context() as patch:
            patch.setattr(tool, "encode_batch", counted := Counted())
            data = run(folder)
        assert counted.images == (5 - min(2 * noted[-1], 5) if signalled else 0)
        data.verify()
        assert torch.equal(torch.stack([x for x, _, _ in data]), expected(folder))
    assert noted == [0, 1, 2, 0] if place == "batch" else set(noted) == {0, 1, 2, 3} and len(noted) > 10


def in_a_child(action, module, name, replacement):
    """Call the action in a fork with a function replaced; return True if SIGKILL ended it."""
    child = os.fork()
    if not child:
        setattr(module, name, replacement)
        with contextlib.suppress(BaseException):
            action()
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def deadly(function, calls):
    """Return the function, but call number `calls`, counted from 0, kills the process instead."""
    left = [calls]

    def replacement(*arguments):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return function(*arguments)

    return replacement


class Counted:
    images = 0

    def __call__(self, images, *rest):
        self.images += len(images)
        return ENCODE_BATCH(images, *rest)


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:-9], lambda c: c.replace(b"0", b"1")])
def test_a_chunk_with_a_damaged_record_is_encoded_again(damage, folder, monkeypatch):
    monkeypatch.setattr(tool, "finish", lambda *_: None)
    with contextlib.suppress(ValueError, FileNotFoundError):
        run(folder)
    monkeypatch.undo()
    monkeypatch.setattr(tool, "CHUNK", 2)
    monkeypatch.setattr(tool, "encode_batch", counted := Counted())
    note = folder / "out/done/1"
    assert note.read_bytes() != damage(note.read_bytes())
    note.write_bytes(damage(note.read_bytes()))
    run(folder).verify()
    assert counted.images == 2


def test_a_bad_image_is_encoded_as_its_substitute(folder, capsys):
    for i in (1, 3):
        (folder / f"images/cats/manx/{i}.png").write_bytes(b"no image")
    data, images = run(folder), images_of(folder)
    assert [data[i][1:] for i in range(5)] == [images[i][1:] for i in range(5)]
    assert data.shown.tolist() == [1, 1, 1, 3, 4] and data.info["skipped"] == [[0, 1], [2, 1]]
    assert torch.equal(torch.stack([x for x, _, _ in data]), expected(folder))
    words = (
        "Images that cannot be read: 2 ('cats/manx/1.png', 'cats/manx/3.png'), each replaced by the next readable one"
    )
    assert words in capsys.readouterr().out
    data.verify()
    (folder / "images/cats/manx/2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="None of the 3 images of class folder .*images/cats/manx can be read"):
        tool.main([*flags(folder), "--out", str(folder / "another")])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_latent_is_refused(value, folder, monkeypatch):
    def spoiled(images, *rest):
        moments = ENCODE_BATCH(images, *rest)
        if len(images) == 1:  # the last chunk
            moments[-1, 0, 0, 3, 3] = value
        return moments

    monkeypatch.setattr(tool, "encode_batch", spoiled)
    with pytest.raises(
        ValueError, match=r"latents of 'dogs/pug/2.png' contain NaN or infinity in fp16, expected finite"
    ):
        run(folder)
    assert {path.name for path in (folder / "out/done").iterdir()} == {"0", "1"}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_several_processes_write_the_same_file(order, folder):
    alone = run(folder)
    info = latents.read_sealed(folder / "out/latents.json")
    begun = {key: value for key, value in info.items() if key not in ("hashes", "skipped")}
    out, data = folder / "three", images_of(folder)
    tool.prepare(out, begun)
    for rank in order:
        tool.encode(data, Autoencoder(), out, begun, rank, 3, torch.device("cpu"), num_workers=0)
    tool.finish(out, data)
    for name in ("moments.npy", "labels.npy", "images.txt", "latents.json"):
        assert (out / name).read_bytes() == (alone.root / name).read_bytes(), name


def test_a_full_disk_is_refused_before_the_work(folder, monkeypatch):
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(ValueError, match="GB free"):
        run(folder)


# ---- benchmarks.loading -------------------------------------------------------------------------


def test_the_benchmark_reads_the_same_number_of_samples_from_both_layouts(tmp_path, command):
    result = command(loading.main, *"--samples 70 --batch-size 32 --pairs 2 --out".split(), tmp_path / "out.md")
    assert result.code == 0 and result.out.strip() == (tmp_path / "out.md").read_text().strip()
    assert [line.split(" |")[0] for line in result.out.splitlines() if line.startswith("|")][2:] == ["| warm", "| cold"]
    loading.write_both(tmp_path, 20)
    data, files = LatentData(tmp_path / "latents"), loading.TwoFiles(tmp_path / "files")
    data.verify()
    assert len(data) == len(files) == 20 and data[13][0].shape == (2, 8, 32, 32) and data[13][1] == files[13][1] == 3
    assert files[13][0].shape == (1, 4, 32, 32) and files[13][0].dtype == torch.float32
    assert command(loading.main, "--samples", 9).code == 2


def test_the_ratio_is_the_median_of_the_pairs():
    pairs = [(1e-6, 50e-6), (2e-6, 80e-6), (1e-6, 90e-6)]
    assert "| warm | 1.0 µs | 80 µs | 1/50.0 (1/40.0 to 1/90.0) | met |" in loading.table({"warm": pairs})
    assert loading.table({"warm": pairs[:2]}).endswith("| missed |")


def test_encoding_in_half_precision(images64, tmp_path, command):
    """The precision is recorded, since the latents depend on it; the weights have the layout of tensor cores."""
    vae = shutil.copytree(ROOT / "examples/glyphs/vae", tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    flags = "--vae", vae, "--image-size", 64, "--num-workers", 0, "--data-path", images64, "--out"
    for out, *more in (["single"], ["half", "--mixed-precision", "bf16"]):
        assert command(tool.main, *flags, tmp_path / out, *more).code == 0
    single, half = (torch.stack([x for x, _, _ in LatentData(tmp_path / out)]).float() for out in ("single", "half"))
    assert 0 < (half - single).abs().max() < 0.1 * single.abs().max()
    assert latents.read_sealed(tmp_path / "half/latents.json")["precision"] == "bfloat16"
    result = command(tool.main, *flags, tmp_path / "half")
    assert result.code == 2 and "belongs to other images or settings" in result.err
    result = command(tool.main, *flags, tmp_path / "fp16", "--mixed-precision", "fp16")
    assert result.code == 2 and "expected a GPU" in result.err and not (tmp_path / "fp16").exists()
    half = load_autoencoder(str(vae), dtype=torch.bfloat16).vae
    assert half.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_every_process_is_refused(folder):
    run(folder)
    options = [*flags(folder), "--no-flip", "--out", folder / "out"]
    assert launch(tool.main, options, folder, world=2, patience=60) == {0: 2, 1: 2}
    for rank in range(2):
        assert "latents.json belongs to other images or settings" in (folder / f"err{rank}").read_text()
