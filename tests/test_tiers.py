"""Seven ranks from a folder to samples: training, guidance by each rank, nodes as classes, extension and export."""

import json
import sys
from itertools import combinations

import pytest
import torch
from helpers.commands import call
from helpers.tiny_files import write_images
from helpers.tiny_runs import TINY
from safetensors.torch import load_file
from torch.testing import assert_close

import sample
import train
from checkpoint.format import read_weights
from checkpoint.loading import TABLE, load_adapted
from checkpoint.rows import nodes
from guidance import guided
from sampling.load import build_guidance, load_model
from tools import export, merge, taxonomy
from tools.figures.class_rows import read_class_table

CLASSES = {"a/b/c/d/e/f": ("x", "y"), "a/b/c/d/e/g": ("z",), "k/l/m/n/o/p": ("u", "v")}
FURTHER = {"a/b/c/d/e/g": ("w",), "k/l/m/n/o/q": ("s",)}
RANKS = ["superclass", *(f"level{i}" for i in range(2, 7))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiers")
    write_images(root / "deep", 8, CLASSES)
    write_images(root / "further", 8, FURTHER)
    return root


@pytest.fixture(scope="module")
def deep(root, base):
    """An adapter with rows for all ranks, each label the sum of its path."""
    flags = (
        "--data-path",
        root / "deep",
        "--tiers",
        *RANKS,
        "--embedder",
        "path",
        "--null-prob",
        0.2,
        "--resume",
        base,
    )
    run = (
        "--max-steps",
        2,
        "--class-dropout-prob",
        0.5,
        "--results-dir",
        root,
        "--experiment",
        "run",
        "--preview-images",
        0,
    )
    result = call(train.main, *TINY, *flags, *run, "--table-lr", 0.5, "--table-std", 1)
    assert result.code == 0, result.err
    return root / "run/adapters/0000002.safetensors"


def predicted(adapter, monkeypatch, *flags):
    """Return the guided prediction of the flags of sample.py for class x at timestep 400, (1, 6, 8, 8)."""
    monkeypatch.setattr(sys, "argv", ["sample.py", "--ckpt", str(adapter), "--cfg-channels", "all", *flags])
    args = sample.parse_args()
    sample.check_settings(args)
    model, description, _ = load_model(args, "cpu")
    guidance = build_guidance(args, model, description)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return guided(model, torch.tensor([0]), guidance, None)(x, 400)


def test_all_ranks_have_rows(deep, root):
    tensors, description = read_weights(deep)
    assert description.tiers == RANKS and description.embedder == "path"
    names = [name for _, name in nodes(description)]
    assert names == [*("a", "k"), *("b", "l"), *("c", "m"), *("d", "n"), *("e", "o"), *("f", "g", "p")]
    assert tensors[TABLE].shape == (5 + 13 + 1, 256)
    result = call(train.main, *TINY, "--dry-run", "--data-path", root / "deep", "--tiers", "level6")
    found = json.loads(result.out)
    assert found["tiers"] == ["level6"] and found["num_super_classes"] == 3
    result = call(taxonomy.main, root / "deep", "--to", "level2")
    assert "| level5 | 2 | 2 / 2 / 3 | 1 | 8 / 8 / 12 |" in result.out
    assert result.out.endswith(
        "a  (3 classes, 12 images)\n  b  (3 classes, 12 images)\nk  (2 classes, 8 images)\n  l  (2 classes, 8 images)\n"
    )


def test_figures_show_the_sum_of_a_path(deep):
    rows, superclasses, hierarchy = read_class_table(deep)
    embedder = load_adapted(deep)[0].y_embedder
    with torch.no_grad():
        assert_close(rows, embedder(torch.arange(5), False))
        assert superclasses.equal(embedder(torch.tensor([5, 6]), False)) and len(hierarchy.ranks) == 5


def test_samples_are_guided_by_each_rank(deep, monkeypatch):
    found = [predicted(deep, monkeypatch, "--guide", rank) for rank in RANKS]
    assert all((one - other).abs().max() > 1e-3 for one, other in combinations(found, 2))
    chain = "--guidance", "chain", "--cfg-scales"
    # the step to the class alone is equation 1 with the rank above it, and equal steps are classifier-free guidance
    assert predicted(deep, monkeypatch, *chain, "class=4").equal(found[5])
    equal = [*chain, *(f"{rank}=3" for rank in (*RANKS, "class"))]
    null = predicted(deep, monkeypatch, "--guidance", "null", "--cfg-scale", "3")
    assert predicted(deep, monkeypatch, *equal).equal(null)
    timed = predicted(deep, monkeypatch, *equal, "--cfg-intervals", "class=0:399", "level6=400:400")
    without = predicted(deep, monkeypatch, *equal[:-1])
    assert timed.equal(without) and not timed.equal(null)


def test_nodes_are_sampled_as_classes(deep, tmp_path):
    steps = "--sampler", "ddim", "--num-sampling-steps", 2
    classes = "--classes", "x", "f", "level5=o", "superclass=k"
    result = call(sample.main, "--ckpt", deep, "--sample-dir", tmp_path, *steps, *classes)
    assert result.code == 0, result.err
    assert {path.parent.name for path in tmp_path.glob("*/*.png")} == {"x", "level6 f", "level5 o", "superclass k"}


def test_classes_with_further_nodes_are_added(deep, root, tmp_path):
    flags = "--extend", "--resume", deep, "--data-path", root / "further", "--max-steps", 1, "--preview-images", 0
    result = call(train.main, *TINY, *flags, "--results-dir", root, "--experiment", "more")
    assert result.code == 0, result.err
    patch = root / "more/adapters/0000001.safetensors"
    result = call(merge.main, patch, "--out", tmp_path / "all.safetensors")
    assert result.code == 0, result.err
    (old, before), (new, after), (all_rows, _) = (load_adapted(p) for p in (deep, patch, tmp_path / "all.safetensors"))
    assert after.hierarchy.classes == ("x", "y", "z", "u", "v", "w", "s")
    assert after.hierarchy.ranks[-1].nodes == ("f", "g", "p", "q") and len(read_weights(patch)[1].patch_rows) == 3
    x, t = torch.randn(5, 3, 8, 8), torch.full((5,), 300)
    with torch.no_grad():
        assert old(x, t, torch.arange(5)).equal(new(x, t, torch.arange(5)))
        assert new(x, t, torch.arange(2, 7)).equal(all_rows(x, t, torch.tensor([2, 3, 4, 6, 5])))  # by name


def test_exports_know_all_ranks(deep, root, tmp_path):
    from diffusers import DDPMScheduler

    from tools.diffusers_pipeline.pipeline_finediffusion import FineDiffusionPipeline
    from tools.diffusers_pipeline.transformer_finediffusion import FineDiffusionTransformer

    result = call(export.main, "--ckpt", deep, "--format", "diffusers", "--out", tmp_path / "pipe")
    assert result.code == 0, result.err
    config = json.loads((tmp_path / "pipe/transformer/config.json").read_text())
    transformer = FineDiffusionTransformer(**{key: value for key, value in config.items() if not key.startswith("_")})
    transformer.load_state_dict(load_file(tmp_path / "pipe/transformer/diffusion_pytorch_model.safetensors"))
    pipe = FineDiffusionPipeline(transformer.eval(), None, DDPMScheduler.from_pretrained(tmp_path / "pipe/scheduler"))
    pipe.set_progress_bar_config(disable=True)
    model, _ = load_adapted(deep)
    rows = torch.arange(18)
    assert pipe.transformer.y_embedder(rows, False).equal(model.y_embedder(rows, False))
    assert [pipe.label_of(name) for name in ("y", "o", "g")] == [1, 14, 16]
    options = dict(
        num_inference_steps=2, output_type="latent", guidance_channels="all", latents=torch.randn(1, 3, 8, 8)
    )

    def images(**more):
        return pipe("x", generator=torch.Generator().manual_seed(0), **options, **more).images

    chain = images(guidance="chain", scales={"class": 4}, intervals={"class": (0, 999)})
    assert chain.equal(images(guide="level6")) and not chain.equal(images(guide="level2"))
    for wrong in (
        dict(guide="level9"),
        dict(guidance="chain", scales={"level2": -1}),
        dict(guidance="chain", intervals={"class": (9, 1)}, scales={"class": 2}),
    ):
        with pytest.raises(ValueError, match="level9|scales is -1|intervals is"):
            images(**wrong)
    result = call(export.main, "--ckpt", deep, "--format", "dit", "--out", tmp_path / "dit.safetensors")
    assert result.code == 0, result.err
    table = load_file(tmp_path / "dit.safetensors")[TABLE]  # a plain DiT looks up the sum of the path
    with torch.no_grad():
        assert table.equal(model.y_embedder(torch.tensor([*range(5), 18]), False))


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--guide", "order"],
            "--guide names rank 'order', expected one that the model has rows for: superclass, level2",
        ),
        (["--guide", "class"], "--guide names rank 'class'"),
        (["--guidance", "chain", "--cfg-scales", "genus=2"], "--cfg-scales names rank 'genus'"),
        (["--guidance", "chain", "--cfg-scales", "level2"], "'level2' is no RANK=W"),
        (["--guidance", "chain", "--cfg-scales", "level2=inf"], "'level2=inf' is no RANK=W"),
        (["--guidance", "chain", "--cfg-intervals", "level2=9:1"], "'level2=9:1' is no RANK=LO:HI"),
        (["--cfg-scales", "level2=2"], "--cfg-scales belongs to --guidance chain, found superclass"),
        (["--guidance", "null", "--guide", "level2"], "--guide belongs to --guidance superclass, found null"),
        (["--classes", "level2=z"], "No class of deep is called 'level2=z'"),
    ],
)
def test_mistakes_are_refused(deep, tmp_path, flags, words):
    result = call(sample.main, "--ckpt", deep, "--sample-dir", tmp_path / "out", *flags)
    assert result.code == 2 and words in result.err and not (tmp_path / "out").exists()
