"""The exported diffusers pipeline: it works without this repository and samples the same images as sample.py."""

import ast
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from helpers.exports import OFFICIAL, generator, inputs, kinds, relative
from helpers.noise_models import gaussian
from helpers.tiny_files import random_dit
from helpers.tiny_models import PARENTS, ROOT, awake, refusal

from autoencoder import load_autoencoder
from checkpoint.description import ModelDescription
from checkpoint.format import save_adapter
from checkpoint.loading import build_model, load_adapted
from diffusion import create_diffusion, space_timesteps
from guidance import Guidance, guided
from hierarchy import Hierarchy
from models import DiT_models
from runtime.files import UMASK
from sampling.samplers import run_sampler, to_uint8
from tools import export
from tools.diffusers_pipeline.pipeline_finediffusion import FineDiffusionPipeline, respace
from tools.diffusers_pipeline.transformer_finediffusion import FineDiffusionTransformer


@pytest.fixture(scope="module")
def folder(adapter, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("diffusers") / "pets"
    result = command(export.main, "--ckpt", adapter, "--format", "diffusers", "--out", out)
    assert result.code == 0, result.err
    return out


def load(folder, tmp_path_factory, **options):
    """Load the pipeline of a folder in this process, with an empty cache for its code."""
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
    """Sample latents as sample.py does, but with the noise of image i from a torch generator with seed i."""
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
own = {"models", "tiered_embedder", "guidance", "sampling", "tools", "checkpoint", "hierarchy", "diffusion", "runtime"}
assert not own & sys.modules.keys(), own & sys.modules.keys()
"""


def test_the_example_of_the_model_card_runs_without_the_repository(folder, model, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert relative(torch.load(folder.parent / "latents.pt"), sampled(model, [4, 1], steps=6)) < 1e-5


@torch.no_grad()
def test_the_transformer_computes_the_same_as_the_model(pipe, model):
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


def test_no_guidance_equals_scale_1(pipe):
    options = dict(num_inference_steps=4, latents=torch.ones(2, 3, 8, 8), output_type="latent")
    options |= {"generator": generator(0)}
    alone = pipe([1, 4], guidance="none", **options).images
    options["generator"].manual_seed(0)
    assert pipe([1, 4], guidance_scale=1.0, **options).images.equal(alone)
    options["generator"].manual_seed(0)
    assert not pipe([1, 4], **options).images.equal(alone)


@torch.no_grad()
def test_guidance_with_a_null_row():
    """The null row guides sampling; a DiT export uses it as the null class unless --superclass names another."""
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
def test_timesteps_match_those_of_the_diffusion(steps):
    _, timesteps = respace(DDPMScheduler(**export.SCHEDULER), steps)
    assert timesteps.flip(0).tolist() == sorted(space_timesteps(1000, str(steps)))


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_a_single_step_goes_from_noise_to_the_mean_of_the_data(kind):
    scheduler, timesteps = respace(kind.from_config(DDPMScheduler(**export.SCHEDULER).config), 1)
    x = torch.randn(16, 3, 8, 8, generator=generator(0))
    out = gaussian(mean=0.3, deviation=0.5)(x, timesteps.expand(len(x)))
    out = out if kind is DDPMScheduler else out[:, :3]
    samples = scheduler.step(out, scheduler.timesteps[0], x).prev_sample
    assert abs(samples.mean() - 0.3) < 0.01 and samples.std() < 0.01


def test_half_precision(folder, pipe, tmp_path_factory):
    """Weights are bfloat16 except norms and positions; latents stay float32."""
    half = load(folder, tmp_path_factory, torch_dtype=torch.bfloat16)
    wide = {name for name, w in half.transformer.named_parameters() if w.dtype == torch.float32}
    assert half.transformer.dtype == torch.bfloat16 and {n for n in kinds(OFFICIAL) if ".norm" in n} < kinds(wide)
    options = dict(num_inference_steps=4, latents=torch.ones(1, 3, 8, 8), output_type="latent")
    a, b = (p([2], generator=generator(0), **options).images for p in (half, pipe))
    assert a.dtype == torch.float32 and 0 < relative(a, b) < 0.1


# ---- with an autoencoder -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latent_adapter(images, tmp_path_factory):
    """Write an adapter without a base: a plain DiT with a null class, for 8 x 8 x 4 latents of examples/glyphs/vae."""
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
def latent_folder(latent_adapter, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("latent_diffusers") / "pets64"
    result = command(export.main, "--ckpt", latent_adapter, "--format", "diffusers", "--out", out)
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="module")
def latent_pipe(latent_folder, tmp_path_factory):
    return load(latent_folder, tmp_path_factory)


def test_the_umask_decides_who_can_read_an_export(latent_folder):
    files = [path for path in latent_folder.rglob("*") if path.is_file()]
    assert latent_folder / "vae/diffusion_pytorch_model.safetensors" in files
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~UMASK}


def test_decoded_images_match(latent_pipe, latent_adapter):
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
def test_a_solver_gets_the_noise_without_the_variance(latent_pipe, latent_adapter, monkeypatch):
    """DPM-Solver++ steps on 4 channels; with the config's learned variance it would split off 3."""
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


# ---- class names and invalid arguments -----------------------------------------------------------


@pytest.mark.parametrize("query, label", [(0, 0), ("pug", 3), ("PUG dog", 4), ("beag", 2), (np.int64(4), 4)])
def test_a_query_finds_its_label(query, label, pipe):
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
        (["bagle"], {}, "No class is called 'bagle'.*such as beagle"),
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
def test_invalid_arguments_are_refused(labels, options, words, pipe):
    with refusal(words):
        pipe(labels, **{"num_inference_steps": 1} | options)


# ---- the bundled code ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pipeline_finediffusion", "transformer_finediffusion"])
def test_bundled_code_imports_nothing_of_the_project(name):
    body = ast.parse(export.bundle(export.PIPELINE_FOLDER / f"{name}.py")).body
    own = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    sources = {alias.name for node in imports for alias in node.names if isinstance(node, ast.Import)}
    sources |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    assert "torch" in sources and not sources & own
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names += [target.id for node in body if isinstance(node, ast.Assign) for target in node.targets]
    assert len(names) == len(set(names)) > 3  # no definition hides one of another file
