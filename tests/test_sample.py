import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.refusals import ODD, refused
from helpers.tiny_files import CLASSES, rewritten, write_adapter
from helpers.tiny_models import PETS
from PIL import Image

import models
import sample
from checkpoint.format import read_weights
from checkpoint.loading import load_adapted, load_weights
from diffusion import create_diffusion
from guidance import GUIDANCES, guided
from hierarchy import Hierarchy
from hierarchy.layouts import folder_names
from sampling.load import build_guidance
from sampling.samplers import SAMPLERS, sample_latents, to_uint8

VAE = Path(sample.__file__).parent / "examples/glyphs/vae"
NAMES = [name for names in CLASSES.values() for name in names]
PIXELS = "--model DiT-Ti/2 --vae none --image-size 8".split()
STEPS = "--num-sampling-steps", "3"


@pytest.fixture
def run(command, tmp_path):
    """Return run(*flags), which samples into a new folder and returns {path: uint8 (H, W, 3)} in the order of paths."""

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
    """Return whether pictures are equal up to rounding: they differ by at most 1 of 255, in at most 1% of the values."""
    assert a.keys() == b.keys()
    difference = np.abs(np.stack([a[name].astype(int) - b[name] for name in a]))
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.01


def test_writes_the_pictures_of_base_and_adapter(run, adapter, tmp_path):
    pictures = run("--ckpt", adapter, "--per-class", 2, "--batch-size", 3)
    assert list(pictures) == sorted(f"{name}/00000{i}.png" for name in NAMES for i in (0, 1))
    model, _ = load_adapted(adapter)
    latents = sample_latents(model, [3, 3], [0, 1], seed=0, cfg_scale=4.0, steps=3)
    for i, image in enumerate(to_uint8(latents)):
        difference = pictures[f"pug/00000{i}.png"].astype(int) - image.permute(1, 2, 0).numpy()
        assert abs(difference).max() <= 1  # rounding in another batch
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
    for flag in (("--seed", 1), ("--cfg-scale", 1), *(("--sampler", name) for name in SAMPLERS[1:])):
        with pytest.raises(AssertionError):
            assert_near(run(*flags, "--classes", "pug", *flag), alone)


def test_compiled_blocks_draw_the_same(run, adapter, monkeypatch):
    flags = "--ckpt", adapter, "--classes", 0, 1
    expected, graphs, compile_blocks = run(*flags), [], models.DiT.compile_blocks

    def eagerly(model):  # torch's own compiler takes half a minute
        compile_blocks(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)

    monkeypatch.setattr(models.DiT, "compile_blocks", eagerly)
    assert equal(run(*flags, "--compile"), expected) and graphs
    torch.compiler.reset()


@pytest.mark.parametrize("flags, expected", [([], True), (["--no-tf32"], False)])
def test_tf32(flags, expected, run, adapter):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not expected
    run("--ckpt", adapter, "--classes", 0, *flags)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == expected


def test_files_of_samples_never_take_the_place_of_a_class(run, adapter, tmp_path):
    """Classes that are called as the files beside the class folders."""
    names = ["rows", "digests", "settings.json", ".lock", "grid.png"]
    assert folder_names(names) == ["rows-0", "digests-1", "settings.json-2", "lock", "grid.png-4"]
    hierarchy = Hierarchy.load(saved_hierarchy(tmp_path / "x.json", *names))
    ckpt = rewritten(adapter, tmp_path / "x.safetensors", hierarchy=hierarchy)
    assert len(run("--ckpt", ckpt)) == 5


def test_a_folder_for_each_class():
    assert folder_names(["lynx", "a/b", "a:b", "..", " c. ", "a_b"]) == ["lynx", "a_b-1", "a_b-2", "_", "c", "a_b-5"]


@pytest.mark.parametrize(
    "classes, found",
    [
        (["0", "pug"], ["lynx", "pug"]),
        (["04"], ["pug_dog"]),
        (["BEAG", "pug dog"], ["beagle", "pug_dog"]),
        (["pug", "lynx", "3", "pug"], ["lynx", "pug"]),  # each once
        (["all"], NAMES),
    ],
)
def test_classes_by_index_by_part_of_a_name_or_all(classes, found, run, adapter):
    assert {name.split("/")[0] for name in run("--ckpt", adapter, "--classes", *classes)} == set(found)


@pytest.mark.parametrize(
    "query, near", [("bagle", "the nearest are 'beagle'"), ("nx", "fits 2 classes of pets ('lynx', 'manx')")]
)
def test_a_name_that_is_no_class_is_answered_with_the_nearest(query, near, command, adapter, tmp_path):
    refused(command(sample.main, "--ckpt", adapter, "--sample-dir", tmp_path / "out", "--classes", query), near)
    assert not (tmp_path / "out").exists()


def test_official_stream(run, adapter):
    flags = "--ckpt", adapter, "--per-class", 2, "--seed", 5, "--seed-mode", "official", "--cfg-scale", 2
    pictures = run(*flags, "--classes", "manx", "beagle")
    model, _ = load_adapted(adapter)
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


@pytest.mark.reliability(*ODD)
@pytest.mark.parametrize("scale", [3e38, 1e300])
def test_a_sample_that_is_not_finite_is_named_and_not_written(scale, command, adapter, tmp_path):
    flags = (
        "--ckpt",
        adapter,
        "--sample-dir",
        tmp_path / "out",
        "--seed",
        6,
        "--classes",
        "pug",
        "--per-class",
        2,
        *STEPS,
    )
    refused(command(sample.main, *flags, "--cfg-scale", scale), "Image 0 of class 3 of seed 6 is not finite", "--ckpt")
    assert list((tmp_path / "out").iterdir()) == []


# ---- --hierarchy with an adapter ---------------------------------------------------------------


def saved_hierarchy(path, *names, parents=(0, 0, 1, 1, 1)):
    path.write_text(json.dumps({"superclasses": ["cats", "dogs"], "classes": names or None, "parents": parents}))
    return path


@pytest.mark.parametrize(
    "names, words",
    [
        (["manx", "lynx", *NAMES[2:]], "has 'manx' as class 0, expected 'lynx'"),
        ([*NAMES[:4], "akita"], "has 'akita' as class 4, expected 'pug_dog'"),
        ([], "has '00000' as class 0, expected 'lynx'"),
    ],
)
def test_a_hierarchy_of_other_classes_is_refused(names, words, command, adapter, tmp_path):
    path = saved_hierarchy(tmp_path / "x.json", *names)
    refused(command(sample.main, "--ckpt", adapter, "--sample-dir", tmp_path / "out", "--hierarchy", path), words)
    assert not (tmp_path / "out").exists()


def test_a_hierarchy_gives_names_to_an_adapter_with_numbers(run, adapter, tmp_path):
    names = "ocelot", "puma", "akita", "corgi", "husky"
    numbered = Hierarchy.load(saved_hierarchy(tmp_path / "numbers.json"))
    ckpt = rewritten(adapter, tmp_path / "numbers.safetensors", hierarchy=numbered)
    found = run("--ckpt", ckpt, "--hierarchy", saved_hierarchy(tmp_path / "x.json", *names), "--classes", "corgi")
    assert list(found) == ["corgi/000000.png"]
    assert np.array_equal(found["corgi/000000.png"], run("--ckpt", ckpt, "--classes", 3)["00003/000000.png"])
    own = saved_hierarchy(tmp_path / "own.json", *NAMES)  # the adapter's own names
    assert list(run("--ckpt", adapter, "--hierarchy", own, "--classes", "pug")) == ["pug/000000.png"]


# ---- guidance: flags and the other weights that they name ------------------------------------------------------------


@pytest.fixture
def asked(adapter, monkeypatch):
    """Return asked(*flags), which returns the model, guidance and description that sample.py makes from the flags."""

    def asked(*flags, ckpt=adapter):
        monkeypatch.setattr("sys.argv", ["sample.py", "--ckpt", str(ckpt), *map(str, flags)])
        args = sample.parse_args()
        sample.check_settings(args)
        model, description, _ = sample.load_model(args, "cpu")
        return model, build_guidance(args, model, description), description

    return asked


@torch.no_grad()
def guides(model, guidance, x, t, labels):
    """Return the prediction that a class is guided away from: the guided one at scale 0."""
    assert guidance.scale == 0 and guidance.channels == "all"
    return guided(model, labels, guidance, [(0, i) for i in range(len(x))])(x, t)[:, : model.in_channels]


X, T, Y = torch.linspace(-2, 2, 3 * 3 * 64).view(3, 3, 8, 8), torch.full((3,), 300), torch.tensor([0, 3, 4])
AT_0 = "--cfg-scale", 0, "--cfg-channels", "all"


@torch.no_grad()
def test_autoguidance_is_by_the_weak_adapter(asked, adapter, tmp_path):
    weak = rewritten(adapter, tmp_path / "weak.safetensors")
    model, guidance, _ = asked("--guidance", "autoguidance", "--weak", weak, *AT_0)
    other, _ = load_adapted(weak)
    for _ in range(2):  # the weights are put back
        assert guides(model, guidance, X, T, Y).equal(other(X, T, Y)[:, :3])
        assert model(X, T, Y).equal(load_adapted(adapter)[0](X, T, Y))


@torch.no_grad()
def test_domain_guidance_is_by_the_plain_dit_before_the_fine_tune(asked, adapter, base):
    model, guidance, _ = asked("--guidance", "domain", *AT_0)
    plain = models.DiT_models["DiT-Ti/2"](input_size=8, in_channels=3, num_classes=9).eval()
    load_weights(plain, read_weights(base)[0], base)
    own = load_adapted(adapter)[0](X, T, Y)
    for _ in range(2):
        assert guides(model, guidance, X, T, Y).equal(plain(X, T, torch.tensor([9, 9, 9]))[:, :3])
        assert model(X, T, Y).equal(own)
    swapped = sum(tensor.numel() for tensor in guidance.other_weights.values())
    trained = sum(tensor.numel() for tensor in read_weights(adapter)[0].values())
    assert swapped == trained - 7 * 256 + 256  # one row of the class table


@torch.no_grad()
def test_low_rank_updates_are_merged_unless_a_guidance_exchanges_them(asked, base, tmp_path):
    path = write_adapter(tmp_path / "lora.safetensors", base, PETS, "lora")
    own = load_adapted(path)[0](X, T, Y)
    merged, _, _ = asked("--guidance", "superclass", ckpt=path)
    assert not any("lora" in name for name in merged.state_dict())
    assert torch.allclose(merged(X, T, Y), own, atol=1e-5)
    model, guidance, _ = asked("--guidance", "domain", *AT_0, ckpt=path)
    plain = models.DiT_models["DiT-Ti/2"](input_size=8, in_channels=3, num_classes=9).eval()
    load_weights(plain, read_weights(base)[0], base)
    assert guides(model, guidance, X, T, Y).equal(plain(X, T, torch.tensor([9, 9, 9]))[:, :3])
    assert model(X, T, Y).equal(own) and not torch.allclose(own, plain(X, T, torch.tensor([9, 9, 9])), atol=1e-2)


@torch.no_grad()
def test_null_guidance_and_the_chain_are_by_the_null_row(asked, adapter, tmp_path):
    rooted = rewritten(adapter, tmp_path / "rooted.safetensors", null_row=True)
    model, guidance, _ = asked("--guidance", "null", *AT_0, ckpt=rooted)
    chain = asked("--guidance", "chain", "--cfg-scale-parent", 3, *AT_0, ckpt=rooted)[1]
    e_p, e_0 = (model(X, T, rows)[:, :3] for rows in (torch.tensor([5, 6, 6]), torch.tensor([7, 7, 7])))
    for found, expected in (
        (guides(model, guidance, X, T, Y), e_0),
        (guides(model, chain, X, T, Y), e_0 + 3 * (e_p - e_0)),
    ):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def flags_for(kind, adapter, tmp_path):
    weak = ("--weak", rewritten(adapter, tmp_path / "weak.safetensors")) if kind == "autoguidance" else ()
    if kind in ("null", "chain"):
        adapter = rewritten(adapter, tmp_path / "rooted.safetensors", null_row=True)
    return "--ckpt", adapter, *weak


@pytest.mark.parametrize("kind", GUIDANCES)
def test_every_guidance_draws_and_at_scale_one_is_none(kind, run, adapter, tmp_path):
    flags = *flags_for(kind, adapter, tmp_path), "--classes", "pug", "lynx"
    none = run(*flags[:2], *flags[-3:], "--guidance", "none", "--cfg-scale", 3)
    assert equal(run(*flags, "--guidance", kind, "--cfg-scale", 1), none)
    assert equal(run(*flags, "--guidance", kind, "--cfg-scale", 3, "--guidance-interval", 1, 2), none)  # of 0, 500, 999
    guided = run(*flags, "--guidance", kind, "--cfg-scale", 3)
    assert equal(guided, none) == (kind == "none")
    assert equal(run(*flags, "--guidance", kind, "--cfg-scale", 3, "--guidance-interval", 0, 999), guided)


# ---- checkpoints without a description -----------------------------------------------------------


@pytest.mark.reliability(*ODD)
def test_official_checkpoint_with_a_hierarchy(run, images, official, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(Hierarchy.from_folder(images).to_dict()))
    counts = "--num-classes", 5, "--num-super-classes", 2
    pictures = run("--ckpt", official, *PIXELS, *counts, "--hierarchy", path)
    assert list(pictures) == sorted(f"{name}/000000.png" for name in NAMES)
    # the EMA is sampled, not the weights beside it
    ema = torch.load(official, weights_only=False)["ema"]
    for prefix in ("", "module."):  # as named by DistributedDataParallel
        torch.save({prefix + name: tensor for name, tensor in ema.items()}, tmp_path / "ema.pt")
        assert equal(run("--ckpt", tmp_path / "ema.pt", *PIXELS, *counts, "--hierarchy", path), pictures)


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
