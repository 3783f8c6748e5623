import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES
from PIL import Image

import checkpoint
import models
import sample
from diffusion import create_diffusion
from hierarchy import Hierarchy
from sampling import sample_latents, to_uint8

VAE = Path(sample.__file__).parent / "assets/vae"
NAMES = [name for names in CLASSES.values() for name in names]
PIXELS = "--model DiT-Ti/2 --vae none --image-size 8".split()
STEPS = "--num-sampling-steps", "3"


@pytest.fixture
def run(command, tmp_path):
    """run(*flags) -> the pictures in the order of their paths, {path: uint8 (H, W, 3)}; the folder is new each time."""

    def run(*flags):
        folder = tmp_path / "out"
        shutil.rmtree(folder, ignore_errors=True)
        result = command(sample.main, "--sample-dir", folder, *STEPS, *flags)
        assert result.code == 0, result.err
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        assert folder / "grid.png" in files and result.out == f"{len(files) - 1} images and grid.png in {folder}\n"
        return {
            str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in files if path.name != "grid.png"
        }

    return run


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def assert_near(a, b):
    """The same pictures, but for float sums in another order: at most 1 of 255, in at most 1 % of the numbers."""
    assert a.keys() == b.keys()
    difference = np.abs(np.stack([a[name].astype(int) - b[name] for name in a]))
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.01


def test_writes_the_pictures_of_base_and_adapter(run, adapter, tmp_path):
    pictures = run("--ckpt", adapter, "--per-class", 2, "--batch-size", 3)
    assert list(pictures) == sorted(f"{name}/00000{i}.png" for name in NAMES for i in (0, 1))
    model, _ = checkpoint.load_adapted(adapter)
    latents = sample_latents(model, [3, 3], [0, 1], seed=0, cfg_scale=4.0, steps=3)
    for i, image in enumerate(to_uint8(latents)):
        difference = pictures[f"pug/00000{i}.png"].astype(int) - image.permute(1, 2, 0).numpy()
        assert abs(difference).max() <= 1  # of rounding, in another batch
        assert image.float().std() > 10
    with Image.open(tmp_path / "out/grid.png") as grid:
        assert grid.width == 2 * 100 + 4 and grid.height > 5 * 100  # a row of two per class


def test_a_picture_depends_on_seed_class_and_position_alone(run, adapter):
    flags = "--ckpt", adapter, "--per-class", 2
    together = run(*flags, "--batch-size", 5)
    assert equal(run(*flags, "--batch-size", 5), together)
    assert_near(run(*flags, "--batch-size", 1), together)
    alone = run(*flags, "--classes", "pug")
    assert_near(alone, {name: together[name] for name in together if name.startswith("pug/")})
    assert not np.array_equal(together["pug/000000.png"], together["pug/000001.png"])
    for flag in (("--seed", 1), ("--cfg-scale", 1), ("--sampler", "ddim")):
        with pytest.raises(AssertionError):
            assert_near(run(*flags, "--classes", "pug", *flag), alone)


@pytest.mark.parametrize(
    "classes, found",
    [
        (["0", "pug"], ["lynx", "pug"]),
        (["04"], ["pug_dog"]),
        (["BEAG", "pug dog"], ["beagle", "pug_dog"]),
        (["all"], NAMES),
    ],
)
def test_classes_by_index_by_part_of_a_name_or_all(classes, found, run, adapter):
    assert {name.split("/")[0] for name in run("--ckpt", adapter, "--classes", *classes)} == set(found)


@pytest.mark.parametrize(
    "query, near", [("bagle", "the nearest are 'beagle'"), ("nx", "fits 2 classes of pets ('lynx', 'manx')")]
)
def test_a_name_that_is_no_class_is_answered_with_the_nearest(query, near, command, adapter, tmp_path):
    result = command(sample.main, "--ckpt", adapter, "--sample-dir", tmp_path / "out", "--classes", query)
    assert result.code == 2 and result.err.count("\n") == 1 and repr(query) in result.err and near in result.err
    assert not (tmp_path / "out").exists()


def test_official_stream(run, adapter):
    flags = "--ckpt", adapter, "--per-class", 2, "--seed", 5, "--seed-mode", "official", "--cfg-scale", 2
    pictures = run(*flags, "--classes", "manx", "beagle")
    model, _ = checkpoint.load_adapted(adapter)
    for label, row in ((1, 5), (2, 6)):
        torch.manual_seed(5)
        z = torch.randn(2, 3, 8, 8).repeat(2, 1, 1, 1)
        options = dict(y=torch.tensor([label, label, row, row]), cfg_scale=2.0)
        loop = create_diffusion("3").p_sample_loop
        out = to_uint8(loop(model.forward_with_cfg, z.shape, z, clip_denoised=False, model_kwargs=options)[:2])
        for i in range(2):
            assert np.array_equal(pictures[f"{NAMES[label]}/00000{i}.png"], out[i].permute(1, 2, 0))


def test_the_base_may_have_moved(run, command, adapter, base, tmp_path):
    pictures = run("--ckpt", adapter)
    moved = Path(shutil.move(base, tmp_path / "moved.pt"))
    try:
        result = command(sample.main, "--ckpt", adapter, "--sample-dir", tmp_path / "none")
        assert result.code == 2 and "--base" in result.err and str(base) in result.err
        assert equal(run("--ckpt", adapter, "--base", moved), pictures)
    finally:
        shutil.move(moved, base)


# ---- checkpoints without a description -----------------------------------------------------------


def test_official_checkpoint_with_a_hierarchy(run, images, official, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(Hierarchy.from_folder(images).to_dict()))
    counts = "--num-classes", 5, "--num-super-classes", 2
    pictures = run("--ckpt", official, *PIXELS, *counts, "--hierarchy", path)
    assert list(pictures) == sorted(f"{name}/000000.png" for name in NAMES)
    # the EMA is sampled, not the weights beside it
    ema = tmp_path / "ema.pt"
    torch.save(torch.load(official, weights_only=False)["ema"], ema)
    assert equal(run("--ckpt", ema, *PIXELS, *counts, "--hierarchy", path), pictures)


def test_plain_checkpoint(run, base):
    pictures = run("--ckpt", base, *PIXELS, "--num-classes", 9, "--num-super-classes", 1, "--classes", "8", "0")
    assert list(pictures) == ["00000/000000.png", "00008/000000.png"]


def test_the_command_for_the_official_checkpoint(run, tmp_path, monkeypatch):
    preset = partial(models.DiT, hidden_size=32, depth=2, num_heads=4, patch_size=2)
    monkeypatch.setitem(models.DiT_models, "DiT-XL/2", preset)
    model = preset(num_classes=10_000, num_super_classes=11)
    torch.save({"ema": model.state_dict()}, tmp_path / "X.pt")
    flags = f"--image-size 256 --seed 0 --ckpt {tmp_path}/X.pt --num-classes 10000 --num-super-classes 11"
    pictures = run(*flags.split(), "--vae", VAE)
    assert len(pictures) == 8 and {image.shape for image in pictures.values()} == {(256, 256, 3)}
    names = [name.split("/")[0] for name in pictures]
    assert names[0] == "00000" and names[-1] == "09999"
