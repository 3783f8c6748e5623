import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder import Autoencoder
from data import ImageData, LatentData
from hierarchy import Hierarchy
from tools import encode_latents as tool

MOMENTS = tool.moments_of


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
    paths = ["--data-path", str(folder / "images"), "--out", str(folder / "out")]
    tool.main([*paths, "--vae", "none", "--image-size", str(size), "--num-workers", "0", "--batch-size", "3", *more])
    return LatentData(folder / "out")


def expected(folder, flips=2):
    images = torch.stack([x for x, _ in ImageData(folder / "images", hierarchy(folder), 8)])
    images = torch.stack([images, images.flip(-1)], dim=1)[:, :flips]
    return torch.cat([images, torch.zeros_like(images)], dim=2).half()  # no VAE: std = 0


def hierarchy(folder):
    return Hierarchy.from_folder(folder / "images")


@pytest.mark.parametrize("flips, flag", [(2, "--flip"), (1, "--no-flip")])
def test_moments_of_image_and_mirror_image(flips, flag, folder):
    data = run(folder, flag)
    assert torch.equal(torch.stack([x for x, _ in data]), expected(folder, flips))
    assert [y for _, y in data] == [0, 0, 0, 1, 1] and data.hierarchy == hierarchy(folder)
    names = {"latents.json", "labels.npy", "moments.npy"}
    assert {path.name for path in (folder / "out").iterdir()} == names
    data.check(Autoencoder(), 8, flip=flips == 2)
    with pytest.raises(ValueError, match="have image size 8, the training asks for 16"):
        data.check(Autoencoder(), 16, flip=False)
    if flips == 1:
        with pytest.raises(ValueError, match="have flips 1, the training asks for 2"):
            data.check(Autoencoder(), 8, flip=True)


def test_mean_then_standard_deviation():
    class Two:
        def encode_moments(self, x):
            return x[:, :1] + 1, x[:, 1:2] * 0 + 5

    x = torch.arange(24.0).view(1, 3, 2, 4)
    moments = MOMENTS(x, Two(), 2)
    assert moments.shape == (1, 2, 2, 2, 4) and moments.dtype == np.float16
    assert np.array_equal(moments[0, 0, 0], x[0, 0] + 1)
    assert np.array_equal(moments[0, 1, 0], x[0, 0].flip(-1) + 1) and (moments[:, :, 1] == 5).all()


def test_the_same_command_continues(folder, monkeypatch):
    calls = []

    def stops(images, *rest):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return MOMENTS(images, *rest)

    monkeypatch.setattr(tool, "moments_of", stops)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    with pytest.raises(ValueError, match="holds no latents.json"):
        LatentData(folder / "out")
    with pytest.raises(ValueError, match="begun.json tells of latents of other images or settings"):
        run(folder, "--no-flip")
    data = run(folder)
    assert calls == [2, 2, 2, 1]  # the second chunk was begun twice
    assert torch.equal(torch.stack([x for x, _ in data]), expected(folder))
    run(folder)
    assert len(calls) == 4  # nothing left to do
    with pytest.raises(ValueError, match="latents.json tells of latents of other images"):
        run(folder, size=16)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_several_processes_write_the_same_file(order, folder):
    whole = (run(folder).moments).copy()
    info = json.loads((folder / "out/latents.json").read_text())
    out, data = folder / "three", ImageData(folder / "images", hierarchy(folder), 8)
    assert not tool.prepare(out, info, data.labels)
    for rank in order:
        tool.encode(data, Autoencoder(), out, info, rank, 3, torch.device("cpu"), num_workers=0)
    tool.finish(out, info)
    assert np.array_equal(LatentData(out).moments, whole)


def test_a_full_disk_is_told_before_the_work(folder, monkeypatch):
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(ValueError, match="GB free"):
        run(folder)
