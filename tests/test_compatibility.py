"""Files written before the modules moved into packages (tests/golden/before/make.py) still load.

They are adapters of a DiT of 60 thousand parameters, a run at step 3 of 5, cached latents, and a complete and an incomplete
folder of samples. Results from them must equal that version's bit for bit, if torch itself rounds here as it did there.
"""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from helpers.tiny_files import tree
from helpers.tiny_models import GOLDEN, TinyDiT, golden, same
from helpers.tiny_runs import SPEEDS
from PIL import Image
from torch import nn
from torch.testing import assert_close

import models
import sample
import sample_ddp
import train
from checkpoint.format import read_description, read_weights
from checkpoint.loading import load_adapted
from dataset.latents import LatentData
from tools import encode_latents

EXPECTED, RECORD = golden("before/expected")
CONTINUED = {name.removeprefix("continued/"): t for name, t in EXPECTED.items() if name.startswith("continued/")}
ADAPTER, STATE = "run/adapters/0000003.safetensors", "run/states/0000003.safetensors"
TRAIN, SAMPLE, MANY = (RECORD[key].split() for key in ("train", "sample", "many"))


def digest(tensors):
    """SHA-256 of tensors by name."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def probe():
    """A digest of what plain torch computes here: another CPU or another torch may round otherwise."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0, activation="gelu", batch_first=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    x = torch.randn(4, 16, 32, generator=generator)
    y = layer(x)
    (y * x).sum().backward()
    return digest({"y": y} | {name: p.grad for name, p in layer.named_parameters()})


@pytest.fixture(scope="module")
def agree():
    """Return agree(found, expected): equal bit for bit if torch rounds as it did there, otherwise nearly; pixels within 1."""
    exact = probe() == RECORD["probe"]

    def agree(found, expected, atol=1e-5):
        if exact:
            assert found.dtype == expected.dtype and found.equal(expected)
        elif expected.dtype == torch.uint8:
            assert_close(found.int(), expected.int(), rtol=0, atol=1)
        else:
            assert_close(found, expected, rtol=1e-4, atol=atol)

    return agree


@pytest.fixture(autouse=True)
def before(tmp_path, monkeypatch):
    """A copy of the files, as the working directory that the commands then had; the test's model among the presets."""
    monkeypatch.setitem(models.DiT_models, "DiT-Test/2", TinyDiT)
    shutil.copytree(GOLDEN / "before", tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    return tmp_path / "before"


def pixels(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image))


# ---- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [None, GOLDEN / "before/base.safetensors"])
def test_an_adapter_is_the_model_it_was(base, before, agree):
    if base:
        (before / "base.safetensors").unlink()
    model, description = load_adapted(before / ADAPTER, base)
    assert digest(model.state_dict()) == RECORD["model"]
    assert description.to_record() | RECORD["description"] == description.to_record()
    assert description.base.path == "base.safetensors"
    assert description.hierarchy == LatentData("latents").hierarchy
    with torch.no_grad():
        agree(model(EXPECTED["x"], EXPECTED["t"], EXPECTED["y"]), EXPECTED["output"])


def test_an_adapter_without_a_base_is_a_whole_model():
    model, description = load_adapted("base.safetensors")
    tensors, _ = read_weights("base.safetensors")
    assert description.method == "full" and description.base is None and same(model.state_dict(), tensors)


def test_sample_draws_the_same_images(before, command, agree):
    result = command(sample.main, *SAMPLE, "--classes", "all", "--sample-dir", "drawn")
    assert result.code == 0, result.err
    names = read_description(ADAPTER).hierarchy.classes
    agree(torch.stack([pixels(before / f"drawn/{name}/000000.png") for name in names]), EXPECTED["images"])


# ---- a run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [[], ["--resume", "run"], ["--resume", STATE]])
def test_a_run_goes_on(resume, command, agree):
    """From a state within a row of metrics, whose rows after it are written anew."""
    assert any(name.startswith("row/") for name in read_weights(STATE)[0])
    assert [json.loads(line)["step"] for line in open("run/metrics.jsonl")] == [2, 4, 5]
    result = command(train.main, *TRAIN, *resume)
    assert result.code == 0, result.err
    found, description = read_weights("run/adapters/0000005.safetensors")
    assert found.keys() == CONTINUED.keys() and description.step == 5
    for name in found:  # a key's bias has a gradient of 0, so AdamW steps by the rounding of it: 2e-5 between CPUs
        agree(found[name], CONTINUED[name], atol=1e-4)
    rows = [json.loads(line) for line in open("run/metrics.jsonl")]
    assert [row["step"] for row in rows] == [2, 4, 5]
    for row, expected in zip(rows, RECORD["rows"]):
        for key in row.keys() - SPEEDS:
            assert (row[key] is None) == (expected[key] is None)
            if row[key] is not None:
                agree(torch.tensor(row[key], dtype=torch.float64), torch.tensor(expected[key], dtype=torch.float64))


def test_a_run_goes_on_with_the_images_themselves(images, before, command):
    """The state and the latents have the same fingerprint as the folder of images."""
    flags = [flag for flag in TRAIN if flag not in ("--latents", "latents")]
    result = command(train.main, *flags, "--data-path", images)
    assert result.code == 0 and (before / "run/adapters/0000005.safetensors").is_file(), result.err


# ---- cached latents -----------------------------------------------------------------------------------------------------


def test_a_training_starts_on_latents(before, command):
    result = command(train.main, *TRAIN, "--experiment", "new")
    assert result.code == 0 and (before / "new/adapters/0000005.safetensors").is_file(), result.err


def test_encoded_latents_are_left(images, before, command, monkeypatch):
    monkeypatch.setattr(encode_latents, "encode", None)  # nothing is encoded
    earlier = tree("latents")
    flags = "--vae none --image-size 8 --num-workers 0 --out latents --data-path".split()
    result = command(encode_latents.main, *flags, images)
    assert result.code == 0 and result.out.startswith("latents: latents of 20 images"), result.err
    assert tree("latents") == earlier


# ---- folders of samples -------------------------------------------------------------------------------------------------


def test_finished_samples_are_left(before, command, monkeypatch):
    monkeypatch.setattr(sample_ddp, "sample_keyed", None)  # nothing is sampled
    earlier = tree("samples")
    result = command(sample_ddp.main, *MANY, "whole")
    assert result.code == 0 and result.out == "11 images in samples/whole and samples/whole.npz\n", result.err
    assert tree("samples") == earlier


def test_samples_go_on(before, command, agree, monkeypatch):
    """From five of the eleven; the others come as they do in a whole run."""
    made, real = [], sample_ddp.sample_keyed

    def counted(model, y, keys, *rest, **options):
        made.extend(keys)
        return real(model, y, keys, *rest, **options)

    monkeypatch.setattr(sample_ddp, "sample_keyed", counted)
    earlier = tree("samples/half")
    result = command(sample_ddp.main, *MANY, "half")
    assert result.code == 0 and made == [(0, k) for k in range(5, 11)], result.err
    half, whole = before / "samples/half", before / "samples/whole"
    found, expected = ({path.removeprefix(str(folder)) for path in tree(folder)} for folder in (half, whole))
    assert found == expected
    for path in half.rglob("*.png"):
        agree(pixels(path), pixels(whole / path.relative_to(half)))
        assert earlier.get(f"samples/half/{path.relative_to(half)}", path.read_bytes()) == path.read_bytes()
    with np.load(f"{half}.npz") as ours, np.load(f"{whole}.npz") as theirs:
        assert np.array_equal(ours["arr_1"], theirs["arr_1"])
        agree(torch.from_numpy(ours["arr_0"]), torch.from_numpy(theirs["arr_0"]))
        assert set(ours.files) - set(theirs.files) == {"classes"}  # earlier versions did not name the classes
    assert (half / "settings.json").read_bytes() == (whole / "settings.json").read_bytes()
