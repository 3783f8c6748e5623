import ast
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from helpers.tiny_files import random_dit, tree
from helpers.tiny_models import GOLDEN, PARENTS, ROOT, awake, golden, refusal, same
from safetensors.torch import load_file
from torch.nn import functional as F

from autoencoder import load_autoencoder
from checkpoint.description import Base, ModelDescription
from checkpoint.format import read_weights, save_adapter
from checkpoint.loading import build_model, load_adapted, load_weights
from diffusion import create_diffusion, space_timesteps
from finetune import METHODS
from guidance import Guidance, guided
from hierarchy import Hierarchy
from models import DiT_models
from sampling.samplers import run_sampler, to_uint8
from tools import export
from tools.diffusers_pipeline.pipeline_finediffusion import FineDiffusionPipeline, respaced
from tools.diffusers_pipeline.transformer_finediffusion import FineDiffusionTransformer

OFFICIAL = json.loads((GOLDEN / "state_dict_shapes.json").read_text())["DiT-XL/2"]["shapes"]


def relative(a, b):
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


def kinds(names):
    """Names of parameters, whichever block they belong to."""
    return {re.sub(r"blocks\.\d+", "blocks.N", name) for name in names}


def inputs(model, rows):
    """x (N, C, H, W), t (N,) and the labels `rows` (N,)."""
    x = torch.randn(len(rows), model.in_channels, model.input_size, model.input_size, generator=generator(5))
    return x, torch.arange(len(rows)) * 97 + 3, torch.tensor(rows)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def run(command):
    """run(*flags) -> stdout of tools.export."""

    def run(*flags):
        result = command(export.main, *flags)
        assert result.code == 0, result.err
        return result.out

    return run


# ---- DiT's form ----------------------------------------------------------------------------------


def plain_dit(w, x, t, y, heads):
    """DiT (arXiv 2212.09748) in plain functions: its tensors by name, patches of 2 x 2, no affine in its LayerNorms."""

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


def test_the_reference_is_dit():
    tensors, _ = golden("plain_dit")
    weights = {name.removeprefix("state/"): w for name, w in tensors.items() if name.startswith("state/")}
    assert relative(plain_dit(weights, tensors["x"], tensors["t"], tensors["y"], 4), tensors["out"]) < 1e-5


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_folding_is_exact(method):
    """Norms everywhere and, for DiffFit, factors: a plain DiT gives the same numbers without them."""
    classes = Hierarchy([*"abcde"], ["x", "y"], PARENTS)
    sizes = {"model": "DiT-Ti/2", "latent_size": 8, "channels": 3}
    model = build_model(sizes | {"hierarchy": classes, "embedder": "tiered", "method": method})
    awake(model, std=0.06).eval()
    tensors = export.fold_norms(export.fold_gammas(model.state_dict()))
    x, t, y = inputs(model, [0, 3, 4, 5, 6])
    expected = model(x, t, y)
    assert expected.std() > 0.1 and relative(plain_dit(tensors, x, t, y, 4), expected) < 1e-5
    assert {w.dtype for w in tensors.values()} == {torch.float32}
    assert kinds(tensors) == {name for name in kinds(OFFICIAL) if ".norm" not in name}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("superclass, row", [("cats", 5), ("1", 6)])
@torch.no_grad()
def test_dit(suffix, superclass, row, run, adapter, tmp_path):
    out = tmp_path / f"dit{suffix}"
    printed = run("--ckpt", adapter, "--format", "dit", "--superclass", superclass, "--out", out)
    assert printed == f"{out}: DiT-Ti/2, Hierarchy(pets: 5 / 2), in the form of dit\n"
    tensors = torch.load(out, weights_only=True) if suffix == ".pt" else load_file(out)
    assert {name: w.shape for name, w in tensors.items()} == {
        name: w.shape for name, w in random_dit(input_size=8, in_channels=3, num_classes=5).items()
    }
    model, _ = load_adapted(adapter)
    x, t, y = inputs(model, [0, 1, 2, 3, 4, row])
    expected = model(x, t, y)
    assert relative(plain_dit(tensors, x, t, y.clamp(max=5), 4), expected) < 1e-5
    # and read by this project's own loader: a plain DiT, null row at the end
    plain = DiT_models["DiT-Ti/2"](input_size=8, in_channels=3, num_classes=5)
    load_weights(plain, read_weights(out)[0], out)
    assert relative(plain.eval()(x, t, y.clamp(max=5)), expected) < 1e-5


# ---- FineDiffusion's form ------------------------------------------------------------------------


@torch.no_grad()
def test_finediffusion(run, adapter, tmp_path):
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


# ---- diffusers' form -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(adapter, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("diffusers") / "pets"
    result = command(export.main, "--ckpt", adapter, "--format", "diffusers", "--out", out)
    assert result.code == 0, result.err
    return out


def load(folder, tmp_path_factory, **options):
    """The pipeline of a folder, in this process; its code goes through diffusers' cache."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(folder, tmp_path_factory):
    return load(folder, tmp_path_factory)


@pytest.fixture(scope="module")
def model(adapter):
    return load_adapted(adapter)[0]


@torch.no_grad()
def sampled(model, labels, sampler="ddpm", steps=3, **guidance):
    """Latents as sample.py makes them, but for the noise: image i has that of torch's generator with seed i."""
    streams = [generator(i) for i in range(len(labels))]
    shape = (model.in_channels, model.input_size, model.input_size)
    predict = guided(model, torch.tensor(labels), Guidance(**guidance), None)
    return run_sampler(predict, lambda: torch.stack([torch.randn(shape, generator=g) for g in streams]), sampler, steps)


ALONE = """
import sys, torch
from pathlib import Path
text = Path("pets/README.md").read_text()
exec(text.split("```python")[1].split("```")[0].replace("250", "3"))
assert image.size == (8, 8)
generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
latents = pipe([4, "manx"], num_inference_steps=6, generator=generators, output_type="latent").images
torch.save(latents, "latents.pt")
own = {"models", "tiered_embedder", "guidance", "sampling", "tools", "checkpoint", "diffusion"}
assert not own & sys.modules.keys(), own & sys.modules.keys()
"""


def test_alone_in_a_fresh_process_as_the_card_says(folder, model, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert relative(torch.load(folder.parent / "latents.pt"), sampled(model, [4, 1], steps=6)) < 1e-5


@torch.no_grad()
def test_the_transformer_is_the_model(pipe, model):
    x, t, y = inputs(model, range(7))
    assert pipe.transformer(x, t, y).equal(model(x, t, y))
    tensors = pipe.transformer.state_dict()
    assert kinds(tensors) == kinds(OFFICIAL) and all(w.equal(tensors[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("sampler, scheduler", [("ddpm", DDPMScheduler), ("ddim", DDIMScheduler)])
@pytest.mark.parametrize(
    "steps, settings",
    [(1, {}), (21, {"scale": 1.0}), (23, {"scale": 2.5, "channels": "all"}), (5, {"interval": (100, 700)})],
)
def test_the_same_image_from_the_same_noise(sampler, scheduler, steps, settings, pipe, model, monkeypatch):
    monkeypatch.setattr(pipe, "scheduler", scheduler.from_config(pipe.scheduler.config))
    expected = sampled(model, [0, 3, 2], sampler=sampler, steps=steps, **settings)
    options = {f"guidance_{name}": value for name, value in settings.items()}
    options |= dict(num_inference_steps=steps, output_type="latent")
    found = pipe([0, 3, 2], generator=[generator(i) for i in range(3)], **options).images
    assert relative(found, expected) < 1e-5
    streams = [generator(i) for i in range(3)]
    latents = torch.stack([torch.randn(3, 8, 8, generator=stream) for stream in streams])
    assert pipe([0, 3, 2], latents=latents, generator=streams, **options).images.equal(found)


def test_without_guidance(pipe):
    options = dict(num_inference_steps=4, latents=torch.ones(2, 3, 8, 8), output_type="latent")
    options |= {"generator": generator(0)}
    alone = pipe([1, 4], guidance="none", **options).images
    options["generator"].manual_seed(0)
    assert pipe([1, 4], guidance_scale=1.0, **options).images.equal(alone)
    options["generator"].manual_seed(0)
    assert not pipe([1, 4], **options).images.equal(alone)


@torch.no_grad()
def test_a_null_row():
    """Sampling guided by it; in DiT's form it is the null class, unless a superclass is asked for."""
    sizes = dict(input_size=8, in_channels=3, null_row=True)
    model = DiT_models["DiT-Ti/2"](**sizes, num_classes=5, num_super_classes=2, parents=PARENTS)
    names = [{str(i): value for i, value in enumerate(values)} for values in ("abcde", PARENTS, "xy")]
    transformer = FineDiffusionTransformer(8, 2, 3, 256, 4, 4, *names, null_row=True).eval()
    transformer.load_state_dict(awake(model, std=0.05).eval().state_dict())
    pipe = FineDiffusionPipeline(transformer, None, DDIMScheduler.from_config(export.SCHEDULER))
    pipe.set_progress_bar_config(disable=True)
    options = dict(latents=torch.randn(1, 3, 8, 8, generator=generator(0)), num_inference_steps=3)
    for kind, rows in (("null", (3, 7)), ("superclass", (3, 6))):
        found = pipe("d", guidance=kind, guidance_scale=2.0, output_type="latent", **options).images
        kwargs = {"y": torch.tensor(rows), "cfg_scale": 2.0}
        x = options["latents"].repeat(2, 1, 1, 1)
        loop = create_diffusion("3").ddim_sample_loop
        expected = loop(model.forward_with_cfg, x.shape, x, clip_denoised=False, model_kwargs=kwargs)[:1]
        assert relative(found, expected) < 1e-5
    chain = pipe("d", guidance="chain", guidance_scale=2.0, parent_scale=1.0, output_type="latent", **options).images
    assert chain.equal(found)
    assert export.null_row(model.y_embedder, ("x", "y")) == 7
    assert export.null_row(model.y_embedder, ("x", "y"), "y") == 6


@pytest.mark.parametrize("steps", [1, 2, 3, 21, 23, 250, 999, 1000, *range(4, 600, 83)])
def test_timesteps_are_those_of_the_diffusion(steps):
    _, timesteps = respaced(DDPMScheduler(**export.SCHEDULER), steps)
    assert timesteps.flip(0).tolist() == sorted(space_timesteps(1000, str(steps)))


def test_half_precision(folder, pipe, tmp_path_factory):
    """Weights in bfloat16, but for norms and positions; the latents stay float32."""
    half = load(folder, tmp_path_factory, torch_dtype=torch.bfloat16)
    wide = {name for name, w in half.transformer.named_parameters() if w.dtype == torch.float32}
    assert half.transformer.dtype == torch.bfloat16 and {n for n in kinds(OFFICIAL) if ".norm" in n} < kinds(wide)
    options = dict(num_inference_steps=4, latents=torch.ones(1, 3, 8, 8), output_type="latent")
    a, b = (p([2], generator=generator(0), **options).images for p in (half, pipe))
    assert a.dtype == torch.float32 and 0 < relative(a, b) < 0.1


# ---- with an autoencoder -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latent_adapter(images, tmp_path_factory):
    """A model of 8 x 8 x 4 latents under examples/glyphs/vae, without a base; a plain DiT with a null class."""
    hierarchy = replace(Hierarchy.from_folder(images), name="pets")
    description = ModelDescription(
        model="DiT-Ti/2",
        image_size=64,
        latent_size=8,
        channels=4,
        vae=str(ROOT / "examples/glyphs/vae"),
        method="bitfit",
        embedder="null",
        hierarchy=hierarchy,
        step=3,
    )
    model = build_model(description)
    averages = random_dit(4, affine=True, input_size=8, in_channels=4, num_classes=5)
    path = tmp_path_factory.mktemp("latent") / "adapter.safetensors"
    save_adapter(
        path, {name: w * 0.3 if ".norm" not in name else w for name, w in averages.items()}, model, description
    )
    return path


@pytest.fixture(scope="module")
def latent_pipe(latent_adapter, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("latent_diffusers") / "pets64"
    result = command(export.main, "--ckpt", latent_adapter, "--format", "diffusers", "--out", out)
    assert result.code == 0, result.err
    return load(out, tmp_path_factory)


def test_pictures_of_an_autoencoder(latent_pipe, latent_adapter):
    model, description = load_adapted(latent_adapter)
    autoencoder = load_autoencoder(description.vae)
    expected = autoencoder.decode(sampled(model, [0, 4]))
    results = {}
    for kind in ("pil", "np", "pt"):
        streams = [generator(0), generator(1)]
        results[kind] = latent_pipe([0, 4], num_inference_steps=3, generator=streams, output_type=kind).images
    pixels = np.stack([np.asarray(image) for image in results["pil"]])
    difference = np.abs(pixels.astype(int) - to_uint8(expected).permute(0, 2, 3, 1).numpy())
    assert pixels.shape == (2, 64, 64, 3) and pixels.std() > 10
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
    assert relative(results["pt"], (expected / 2 + 0.5).clamp(0, 1)) < 1e-5
    assert np.array_equal(results["np"], results["pt"].permute(0, 2, 3, 1).numpy())


@torch.no_grad()
def test_a_solver_gets_the_noise_alone(latent_pipe, latent_adapter, monkeypatch):
    """DPM-Solver++ on 4 channels, by a loop of its own; the config's learned variance would make it take 3."""
    model, _ = load_adapted(latent_adapter)
    monkeypatch.setattr(latent_pipe, "scheduler", DPMSolverMultistepScheduler.from_config(latent_pipe.scheduler.config))
    x = torch.randn(1, 4, 8, 8, generator=generator(0))
    options = dict(num_inference_steps=5, guidance_scale=2.0, output_type="latent")
    found = latent_pipe("lynx", latents=x, **options).images
    solver = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace")
    solver.set_timesteps(5)
    predict = guided(model, torch.tensor([0]), Guidance(scale=2.0), None)
    for t in solver.timesteps:
        x = solver.step(predict(x, t[None])[:, :4], t, x).prev_sample
    assert relative(found, x) < 1e-6


# ---- names and mistakes in the pipeline ----------------------------------------------------------


@pytest.mark.parametrize("query, label", [(0, 0), ("pug", 3), ("PUG dog", 4), ("beag", 2), (np.int64(4), 4)])
def test_labels(query, label, pipe):
    assert pipe.label_of(query) == label


def test_config_lists_classes_and_superclasses(pipe):
    config = pipe.transformer.config
    assert config.id2label["4"] == "pug_dog" and config.label2superclass["4"] == 1
    assert config.id2superclass == {"0": "cats", "1": "dogs"}


@pytest.mark.parametrize(
    "labels, options, words",
    [
        ([5], {}, "Class 5 is out of range, expected 0..4"),
        (["nx"], {}, "fits 2 classes .lynx, manx."),
        (["bagle"], {}, "No class is called 'bagle': there are beagle"),
        ([0], {"guidance_scale": -1}, "guidance_scale is -1"),
        ([0], {"guidance_scale": math.inf}, "guidance_scale is inf"),
        ([0], {"parent_scale": -1}, "parent_scale is -1"),
        ([0], {"guidance": "random"}, "guidance is 'random', expected one of superclass, null"),
        ([0], {"guidance": "null"}, "guidance is 'null', which needs a null row"),
        ([0], {"guidance_interval": (5, 4)}, "guidance_interval is .5, 4."),
        ([0], {"guidance_channels": 2}, "guidance_channels is 2"),
        ([0], {"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ([0], {"latents": torch.ones(2, 3, 8, 8)}, "latents have shape"),
        ([0, 1, 2], {"generator": [generator(0)] * 2}, "Found 2 generators for 3 images"),
    ],
)
def test_mistakes_in_a_call(labels, options, words, pipe):
    with refusal(words):
        pipe(labels, **{"num_inference_steps": 1} | options)


# ---- the code that travels -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pipeline_finediffusion", "transformer_finediffusion"])
def test_the_code_that_travels_stands_alone(name):
    body = ast.parse(export.bundle(export.SHIPPED / f"{name}.py")).body
    own = {path.stem for path in ROOT.glob("*.py")} | {"diffusion", "tools"}
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    sources = {alias.name for node in imports for alias in node.names if isinstance(node, ast.Import)}
    sources |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    assert "torch" in sources and not sources & own
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names += [target.id for node in body if isinstance(node, ast.Assign) for target in node.targets]
    assert len(names) == len(set(names)) > 3  # of several files: none hides another's


# ---- the card and the Hub ------------------------------------------------------------------------


def test_the_card_names_the_licence_of_the_base(adapter):
    description = load_adapted(adapter)[1]
    text = export.card(description, "me/pets")
    assert "license: other" in text and "$" not in text and 'from_pretrained("me/pets"' in text
    description = replace(description, base=Base("x/DiT-XL-2-256x256.pt", "0"))
    assert "license: cc-by-nc-4.0" in export.card(description, "me/pets")


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


# ---- mistakes on the command line ----------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--format dit --out x.pt", "the model has 2 superclasses"),
        ("--format dit --out x.pt --superclass birds", "--superclass is birds"),
        ("--format dit --out x.pt --superclass 2", "--superclass is 2"),
        ("--format dit --out x.bin --superclass 0", "ends in .pt or .safetensors"),
        ("--format dit --out x.pt --superclass 0 --push me/x", "--push is for --format diffusers"),
        ("--format finediffusion --out x.safetensors", "ends in .pt"),
        ("--format finediffusion --out x.pt --superclass 0", "--superclass is for --format dit"),
        ("--format diffusers --out x --private", "found no --push"),
        ("--format diffusers --out x --vae nowhere", "The autoencoder nowhere could not be loaded"),
        (f"--format diffusers --out x --vae {ROOT}/examples/glyphs/vae", "the autoencoder makes 4 x 1"),
        ("--format diffusers --out old", "old exists and is not overwritten"),
        ("--format diffusers --out x --base old", "old"),
    ],
)
def test_mistakes_write_nothing(flags, words, command, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    before = tree(tmp_path)
    result = command(export.main, "--ckpt", adapter, *flags.split())
    assert result.code == 2 and result.err.count("\n") == 1 and words in result.err, result.err
    assert tree(tmp_path) == before


def test_a_checkpoint_without_a_description(command, official, images, tmp_path):
    """One of the official form, named by sample.py's flags."""
    flags = ["--model", "DiT-Ti/2", "--image-size", 8, "--vae", "none", "--hierarchy", images]
    for form, name in (("finediffusion", "again.pt"), ("diffusers", "folder")):
        result = command(export.main, "--ckpt", official, *flags, "--format", form, "--out", tmp_path / name)
        assert result.code == 0, result.err
    before, after = (read_weights(path)[0] for path in (official, tmp_path / "again.pt"))
    assert same(before, after)
    config = json.loads((tmp_path / "folder/transformer/config.json").read_text())
    assert config["id2superclass"] == {"0": "cats", "1": "dogs"} and config["id2label"]["4"] == "pug_dog"


def test_nothing_half_written(command, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(export.main, "--ckpt", adapter, "--format", "diffusers", "--out", tmp_path / "x")
    assert not any(tmp_path.iterdir())
