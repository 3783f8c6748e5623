"""Exports: folding keeps a model's output, each format loads elsewhere, and mistakes write nothing."""

import copy
import importlib.util
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers.exports import OFFICIAL, inputs, kinds, relative
from helpers.tiny_files import random_dit, tree
from helpers.tiny_models import PARENTS, ROOT, awake, described, golden, same
from safetensors.torch import load_file
from torch.nn import functional as F

from checkpoint.description import Base
from checkpoint.format import read_weights, save_adapter
from checkpoint.loading import build_model, load_adapted, load_weights
from finetune import METHODS, fold_gammas, fold_lora
from hierarchy import Hierarchy
from models import DiT_models
from tools import export


@pytest.fixture
def run(command):
    """Run tools.export with flags and return its stdout."""

    def run(*flags):
        result = command(export.main, *flags)
        assert result.code == 0, result.err
        return result.out

    return run


# ---- DiT -----------------------------------------------------------------------------------------


def plain_dit(w, x, t, y, heads):
    """Compute a DiT (arXiv 2212.09748) with plain functions: tensors by name, 2 x 2 patches, no LayerNorm affine."""

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def normed(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = F.silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1)))
    c = F.silu(linear("t_embedder.mlp.2", time) + w["y_embedder.embedding_table.weight"][y])
    tokens = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2)
    n, dim, side, _ = tokens.shape
    h = tokens.flatten(2).mT + w["pos_embed"]
    for block in dict.fromkeys(name.split(".attn")[0] for name in w if ".attn." in name):
        m = linear(f"{block}.adaLN_modulation.1", c).chunk(6, 1)
        qkv = linear(f"{block}.attn.qkv", normed(h, m[0], m[1])).view(n, -1, 3, heads, dim // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT) / math.sqrt(dim // heads)).softmax(-1) @ v
        h = h + m[2][:, None] * linear(f"{block}.attn.proj", mixed.transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"{block}.mlp.fc1", normed(h, m[3], m[4])), approximate="tanh")
        h = h + m[5][:, None] * linear(f"{block}.mlp.fc2", inner)
    out = linear("final_layer.linear", normed(h, *linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)))
    return out.view(n, side, side, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(n, -1, 2 * side, 2 * side)


def test_plain_functions_match_golden_dit():
    tensors, _ = golden("plain_dit")
    weights = {name.removeprefix("state/"): w for name, w in tensors.items() if name.startswith("state/")}
    assert relative(plain_dit(weights, tensors["x"], tensors["t"], tensors["y"], 4), tensors["out"]) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_folding_is_exact(method):
    """A plain DiT without norms and without DiffFit's factors computes the same output."""
    classes = Hierarchy([*"abcde"], ["x", "y"], PARENTS)
    model = build_model(described(classes, method, embedder="tiered"))
    awake(model, std=0.06).eval()
    tensors = export.fold_norms(fold_gammas(fold_lora(model.state_dict())))
    x, t, y = inputs(model, [0, 3, 4, 5, 6])
    expected = model(x, t, y)
    assert expected.std() > 0.1 and relative(plain_dit(tensors, x, t, y, 4), expected) < 1e-5
    assert {w.dtype for w in tensors.values()} == {torch.float32}
    assert kinds(tensors) == {name for name in kinds(OFFICIAL) if ".norm" not in name}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("superclass, row", [("cats", 5), ("1", 6)])
@torch.no_grad()
def test_dit_export_computes_the_same(suffix, superclass, row, run, adapter, tmp_path):
    out = tmp_path / f"dit{suffix}"
    printed = run("--ckpt", adapter, "--format", "dit", "--superclass", superclass, "--out", out)
    assert printed == f"{out}: DiT-Ti/2, Hierarchy(pets: 5 / 2), exported as dit\n"
    tensors = torch.load(out, weights_only=True) if suffix == ".pt" else load_file(out)
    assert {name: w.shape for name, w in tensors.items()} == {
        name: w.shape for name, w in random_dit(input_size=8, in_channels=3, num_classes=5).items()
    }
    model, _ = load_adapted(adapter)
    x, t, y = inputs(model, [0, 1, 2, 3, 4, row])
    expected = model(x, t, y)
    assert relative(plain_dit(tensors, x, t, y.clamp(max=5), 4), expected) < 1e-5
    # the project's own loader reads it as a plain DiT with the null row last
    plain = DiT_models["DiT-Ti/2"](input_size=8, in_channels=3, num_classes=5)
    load_weights(plain, read_weights(out)[0], out)
    assert relative(plain.eval()(x, t, y.clamp(max=5)), expected) < 1e-5


# ---- FineDiffusion -------------------------------------------------------------------------------


@torch.no_grad()
def test_finediffusion_export_computes_the_same(run, adapter, tmp_path):
    out = tmp_path / "models/finediffusion.pt"
    run("--ckpt", adapter, "--format", "finediffusion", "--out", out)
    record = torch.load(out, weights_only=True)
    assert set(record) == {"model", "ema", "opt", "args"}
    assert record["args"] == {"model": "DiT-Ti/2", "image_size": 8, "num_classes": 5, "num_super_classes": 2}
    assert kinds(record["ema"]) == kinds(OFFICIAL)
    model, _ = load_adapted(adapter)
    again = DiT_models["DiT-Ti/2"](input_size=8, in_channels=3, num_classes=5, num_super_classes=2)
    load_weights(again, read_weights(out)[0], out)
    x, t, y = inputs(model, range(7))
    assert again.eval()(x, t, y).equal(model(x, t, y))


# ---- PEFT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "difffit-orig+lora"])
@torch.no_grad()
def test_peft_export_computes_the_same(method, run, tmp_path):
    """The low-rank updates on the other weights are the model, for PEFT too if it is installed."""
    hierarchy = Hierarchy([*"abcde"], ["x", "y"], PARENTS)
    description = described(hierarchy, method, embedder="tiered", lora_targets="qkv adaln")
    model = awake(build_model(description), std=0.06).eval()
    save_adapter(tmp_path / "a.safetensors", {}, model, description)
    run("--ckpt", tmp_path / "a.safetensors", "--format", "peft", "--out", tmp_path / "peft")
    base, updates = (load_file(tmp_path / f"peft/{name}_model.safetensors") for name in ("base", "adapter"))
    x, t, y = inputs(model, [0, 3, 4, 5, 6])
    expected = model(x, t, y)

    plain = build_model(described(hierarchy, "finediffusion")).eval()
    plain.load_state_dict(base)
    assert relative(plain(x, t, y), expected) > 0.01
    if importlib.util.find_spec("peft"):
        import peft

        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "peft")
        assert relative(adapted(x, t, y), expected) < 1e-5
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    layers = [name for name, _ in plain.named_modules() if re.fullmatch(config["target_modules"], name)]
    assert len(updates) == 2 * len(layers) and config["lora_alpha"] == config["r"]
    for name in layers:
        a, b = (updates[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert len(a) == config["r"]
        plain.get_submodule(name).weight.add_(b @ a)
    assert relative(plain(x, t, y), expected) < 1e-5


def test_an_adapter_without_updates_is_no_peft_adapter(command, adapter, tmp_path):
    result = command(export.main, "--ckpt", adapter, "--format", "peft", "--out", tmp_path / "peft")
    assert result.code == 2 and "--method finediffusion, expected lora or one with +lora" in result.err
    assert not list(tmp_path.iterdir())


# ---- model card and Hub --------------------------------------------------------------------------


def test_model_card_names_the_licence_of_the_base(adapter):
    description = load_adapted(adapter)[1]
    text = export.model_card(description, "me/pets")
    assert "license: other" in text and "$" not in text and 'from_pretrained("me/pets"' in text
    description = replace(description, base=Base("x/DiT-XL-2-256x256.pt", "0"))
    assert "license: cc-by-nc-4.0" in export.model_card(description, "me/pets")


def test_push(run, adapter, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append((repo_id, options))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append((repo_id, {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*.*")}))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    out = tmp_path / "out"
    run("--ckpt", adapter, "--format", "diffusers", "--out", out, "--push", "me/pets", "--private")
    files = {"README.md", "model_index.json", "pipeline_finediffusion.py", "scheduler/scheduler_config.json"}
    files |= {f"transformer/{name}" for name in ("config.json", "transformer_finediffusion.py")}
    files |= {"transformer/diffusion_pytorch_model.safetensors"}
    assert calls == [("me/pets", {"private": True, "exist_ok": True}), ("me/pets", files)]
    assert 'from_pretrained("me/pets"' in (out / "README.md").read_text()


def test_push_without_network(command, adapter, tmp_path):
    out = tmp_path / "out"
    result = command(export.main, "--ckpt", adapter, "--format", "diffusers", "--out", out, "--push", "me/pets")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "could not be pushed to me/pets" in result.err and f"hf upload me/pets {out}" in result.err
    assert (out / "README.md").is_file()


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--format dit --out x.pt", "the model has 2 superclasses instead"),
        ("--format dit --out x.pt --superclass birds", "--superclass is birds"),
        ("--format dit --out x.pt --superclass 2", "--superclass is 2"),
        ("--format dit --out x.bin --superclass 0", "ends in .pt or .safetensors"),
        ("--format dit --out x.pt --superclass 0 --push me/x", "--push needs --format diffusers"),
        ("--format finediffusion --out x.safetensors", "ends in .pt"),
        ("--format finediffusion --out x.pt --superclass 0", "--superclass needs --format dit"),
        ("--format diffusers --out x --private", "--private needs --push"),
        ("--format diffusers --out x --vae nowhere", "The autoencoder nowhere could not be loaded"),
        (f"--format diffusers --out x --vae {ROOT}/examples/glyphs/vae", "latents of the autoencoder are 4 x 1"),
        ("--format diffusers --out old", "old exists and is not overwritten"),
        ("--format diffusers --out x --base old", "old"),
    ],
)
def test_refused_flags_write_nothing(flags, words, command, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    before = tree(tmp_path)
    result = command(export.main, "--ckpt", adapter, *flags.split())
    assert result.code == 2 and result.err.count("\n") == 1 and words in result.err, result.err
    assert tree(tmp_path) == before


def test_a_checkpoint_without_a_description(command, official, images, tmp_path):
    """Export an official checkpoint, described by the flags of sample.py."""
    flags = ["--model", "DiT-Ti/2", "--image-size", 8, "--vae", "none", "--hierarchy", images]
    for form, name in (("finediffusion", "again.pt"), ("diffusers", "folder")):
        result = command(export.main, "--ckpt", official, *flags, "--format", form, "--out", tmp_path / name)
        assert result.code == 0, result.err
    before, after = (read_weights(path)[0] for path in (official, tmp_path / "again.pt"))
    assert same(before, after)
    config = json.loads((tmp_path / "folder/transformer/config.json").read_text())
    assert config["id2superclass"] == {"0": "cats", "1": "dogs"} and config["id2label"]["4"] == "pug_dog"


def test_a_failed_export_leaves_nothing_behind(command, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(export.main, "--ckpt", adapter, "--format", "diffusers", "--out", tmp_path / "x")
    assert not any(tmp_path.iterdir())
