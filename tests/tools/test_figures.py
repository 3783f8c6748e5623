"""The figures of the paper: their contents, their style, and the same bytes from the same input."""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from helpers.evaluated_runs import EvaluatedRuns, change
from helpers.tiny_files import CLASSES, tree, write_adapter
from helpers.tiny_models import refusal
from PIL import Image

import sample
from checkpoint.format import read_weights
from checkpoint.loading import TABLE
from hierarchy import Hierarchy
from models import DiT
from sampling.grid import caption
from tools.figures import class_rows, gallery, plots
from tools.figures.__main__ import main

NAMES = [name for names in CLASSES.values() for name in names]
FAST = "--sampler", "ddim", "--num-sampling-steps", "2"


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(plots, "DPI", 40)  # fast


@pytest.fixture
def draw(command, tmp_path, monkeypatch):
    """draw(kind, *flags) -> the arguments of the drawing function, after checking that the files are complete."""
    calls = []

    def spied(function):
        def spy(*args, **options):
            calls.append((args, options))
            return function(*args, **options)

        return spy

    for name in ("mosaic", "embedding", "curves", "tradeoff"):
        monkeypatch.setattr(plots, name, spied(getattr(plots, name)))

    def draw(kind, *flags):
        calls.clear()
        out = tmp_path / "out" / kind
        result = command(main, kind, "--out", out, *flags)
        assert result.code == 0, result.err
        assert result.out.endswith(f"{out}.png {out}.pdf\n")
        with Image.open(f"{out}.png") as image:
            image.load()
        assert Path(f"{out}.pdf").read_bytes().startswith(b"%PDF") and len(calls) == 1
        return calls[0]

    return draw


def far(a, b):
    """Return the mean absolute difference of two images, 0..255."""
    return np.abs(np.asarray(a).astype(float) - b).mean()


# ---- class table ---------------------------------------------------------------------------------


@pytest.fixture
def plane(monkeypatch):
    """Replace t-SNE by the first two columns, and record its arguments."""
    seen = []

    def stand_in(rows, perplexity, seed):
        seen.append((len(rows), perplexity, seed))
        return rows[:, :2]

    monkeypatch.setattr(class_rows, "tsne", stand_in)
    return seen


def test_tsne_shows_classes_superclass_rows_and_means(draw, adapter, plane, tmp_path):
    (points, groups, names, marks, text), _ = draw("tsne", "--ckpt", adapter, "--neighbours", 2, "--seed", 5)
    table = read_weights(adapter)[0][TABLE]
    assert plane == [(5 + 2 + 2, 30.0, 5)] and names == ["cats", "dogs"]
    assert points.equal(table[:5, :2]) and groups.tolist() == [0, 0, 1, 1, 1]
    means = torch.stack([table[:2].mean(0), table[2:5].mean(0)])[:, :2]
    assert list(marks) == ["mean of the class rows", "superclass row"]
    torch.testing.assert_close(marks["mean of the class rows"], means)
    assert marks["superclass row"].equal(table[5:, :2])
    found = json.loads((tmp_path / "out/tsne.json").read_text())
    purity, silhouette = class_rows.separation(table[:5], groups, 2)
    assert found["purity"] == purity.mean() and found["silhouette"] == silhouette.mean() and found["neighbours"] == 2
    assert f"{found['purity']:.1%}" in text and f"{found['silhouette']:.3f}" in text


# ---- images --------------------------------------------------------------------------------------


@pytest.fixture
def species(tmp_path, base):
    """Write an adapter of four species with iNaturalist names."""
    names = [
        "00000_Animalia_Chordata_Aves_Passeriformes_Corvidae_Pica_pica",
        "00001_Animalia_Chordata_Aves_Passeriformes_Corvidae_Corvus_corax",
        "00002_Plantae_Tracheophyta_Liliopsida_Poales_Poaceae_Poa_annua",
        "00003_Animalia_Chordata_Aves_Strigiformes_Strigidae_Bubo_bubo",
    ]
    return write_adapter(tmp_path / "species.safetensors", base, Hierarchy.from_class_names(names).keep())


def test_grid_has_a_row_per_superclass_with_the_images_of_sample_py(draw, command, adapter, tmp_path):
    (rows, captions, titles), _ = draw("grid", "--ckpt", adapter, *FAST, "--batch-size", 3)
    assert titles == ["cats", "dogs"] and captions == [["lynx", "manx"], ["beagle", "pug", "pug dog"]]
    folder = tmp_path / "samples"
    assert command(sample.main, "--ckpt", adapter, *FAST, "--classes", "all", "--sample-dir", folder).code == 0
    samples = [np.asarray(Image.open(folder / name / "000000.png")) for name in NAMES]
    for image, sample_image in zip([image for row in rows for image in row], samples):
        assert image.shape == (8, 8, 3) and far(image, sample_image) < 0.5  # rounding differs in another batch
    assert far(samples[0], samples[1]) > 10

    (rows, captions, _), _ = draw("grid", "--ckpt", adapter, *FAST, "--columns", 2)
    assert captions == [["lynx", "manx"], ["beagle", "pug dog"]]  # evenly spread
    (rows, captions, titles), _ = draw("grid", "--ckpt", adapter, *FAST, "--classes", "pug", "4")
    assert captions == [["pug", "pug dog"]] and titles == ["dogs"]


def test_grid_of_a_compiled_model(draw, adapter, monkeypatch):
    graphs, compile_blocks = [], DiT.compile_blocks

    def eagerly(model):  # torch's own compiler takes half a minute
        compile_blocks(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)

    monkeypatch.setattr(DiT, "compile_blocks", eagerly)
    (expected, *_), _ = draw("grid", "--ckpt", adapter, *FAST, "--classes", 0)
    assert not graphs
    (found, *_), _ = draw("grid", "--ckpt", adapter, *FAST, "--classes", 0, "--compile")
    torch.compiler.reset()
    assert graphs and np.array_equal(found, expected)


def test_grid_of_a_folder_of_images(draw, images, tmp_path):
    (rows, captions, titles), _ = draw("grid", "--images", images, "--columns", 2)
    assert captions == [["lynx", "manx"], ["beagle", "pug dog"]] and titles == ["cats", "dogs"]
    assert far(rows[1][1], np.asarray(Image.open(images / "dogs/pug_dog/0.png"))) == 0
    # a folder of samples has no superclasses: --hierarchy provides them
    for name in ("lynx", "pug"):
        (tmp_path / "samples" / name).mkdir(parents=True)
        Image.open(images / f"{'cats' if name == 'lynx' else 'dogs'}/{name}/1.png").save(
            tmp_path / f"samples/{name}/9.png"
        )
    (rows, captions, _), _ = draw("grid", "--images", tmp_path / "samples", "--hierarchy", images)
    assert captions == [["lynx"], ["pug"]] and far(rows[0][0], np.asarray(Image.open(images / "cats/lynx/1.png"))) == 0


def test_compare_puts_real_images_first_and_uses_the_same_noise(draw, adapter, base, images64, tmp_path, monkeypatch):
    other = write_adapter(tmp_path / "b.safetensors", base, Hierarchy.from_folder(images64), "bitfit", seed=4)
    classes = [NAMES[i] for i in (4, 0, 3, 2, 1)]  # the same classes in another order
    parents = [Hierarchy.from_folder(images64).parents[NAMES.index(name)].item() for name in classes]
    turned = write_adapter(
        tmp_path / "t.safetensors", base, Hierarchy(classes, ["cats", "dogs"], parents), "bitfit", seed=4
    )
    flags = "--real", images64, "--classes", "pug", "lynx", *FAST, "--cfg-scale", 1
    (rows,), options = draw(
        "compare", "--adapters", f"A={adapter}", f"Again={adapter}", f"B={other}", f"T={turned}", *flags
    )
    assert options == {"row_titles": ["pug", "lynx"], "column_titles": ["Real", "A", "Again", "B", "T"]}
    for row, path in zip(rows, ("dogs/pug", "cats/lynx")):
        real, a, again, b, _ = row
        expected = Image.open(images64 / path / "0.png").resize((8, 8), Image.Resampling.BOX)
        assert real.shape == (8, 8, 3) and far(real, np.asarray(expected)) < 15
        assert far(a, again) == 0 and far(a, b) > 5
    seen, real = [], gallery.sample_keyed

    def spy(model, labels, keys, *args, **options):
        seen.append((labels, keys))
        return real(model, labels, keys, *args, **options)

    monkeypatch.setattr(gallery, "sample_keyed", spy)
    draw("compare", "--adapters", f"A={adapter}", f"T={turned}", *flags)
    keys = [(0, NAMES.index(name), 0) for name in ("pug", "lynx")]
    assert seen == [([3, 0], keys), ([2, 1], keys)]  # each adapter has its own labels; the noise is the same


class TinyTextToImage(diffusers.DiffusionPipeline):
    """A pipeline with the arguments of diffusers' text-to-image pipelines; the prompt sets the colour."""

    prompts = []

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt=None, num_inference_steps=3, generator=None, output_type="pil"):
        self.prompts.append((prompt, num_inference_steps))
        x = torch.randn(1, 3, 16, 16, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t).sample, t, x, generator=generator).prev_sample
        pixels = (x[0].permute(1, 2, 0).sigmoid() * 200 + len(prompt)).to(torch.uint8).numpy()
        return diffusers.ImagePipelineOutput(images=[Image.fromarray(pixels)])


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """Save a TinyTextToImage as a diffusers folder."""
    monkeypatch.setattr(diffusers, "TinyTextToImage", TinyTextToImage, raising=False)
    monkeypatch.setattr(TinyTextToImage, "prompts", [])
    torch.manual_seed(0)
    blocks = dict(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    unet = UNet2DModel(sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, **blocks)
    TinyTextToImage(unet, DDPMScheduler()).save_pretrained(tmp_path / "tiny-pipeline")
    return tmp_path / "tiny-pipeline"


def test_text_to_image_prompts_for_a_photo_of_the_species(draw, pipeline, species):
    flags = "--ckpt", species, "--pipeline", pipeline, "--classes", "Bubo bubo", "Poa annua", *FAST
    (rows,), options = draw("text-to-image", *flags, "--pipeline-steps", 2)
    assert TinyTextToImage.prompts == [("a photo of Bubo bubo", 2), ("a photo of Poa annua", 2)]
    titles = {"row_titles": ["Bubo bubo", "Poa annua"], "column_titles": ["tiny-pipeline", "FineDiffusion"]}
    assert options == titles and rows[0][0].shape == (16, 16, 3) and rows[0][1].shape == (8, 8, 3)
    assert far(rows[0][0], rows[1][0]) == 0  # prompts of equal length and the same noise
    (again,), _ = draw("text-to-image", *flags, "--pipeline-steps", 2, "--seed", 1)
    assert far(again[0][0], rows[0][0]) > 1 and far(again[0][1], rows[0][1]) > 1


def test_text_to_image_with_real_images(draw, pipeline, adapter, images):
    flags = "--ckpt", adapter, "--pipeline", pipeline, "--real", images, "--title", "Ours", *FAST
    (rows,), options = draw("text-to-image", *flags)
    assert options["column_titles"] == ["Real", "tiny-pipeline", "Ours"] and len(rows) == 5
    assert TinyTextToImage.prompts[3:] == [
        ("a photo of pug", 3),
        ("a photo of pug dog", 3),
    ]  # the pipeline's default steps
    assert far(rows[0][0], np.asarray(Image.open(images / "cats/lynx/0.png"))) == 0


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    return EvaluatedRuns(tmp_path)


def test_tradeoff_and_convergence(draw, runs, tmp_path):
    entries = runs.write("ours"), runs.write("bits", "bitfit", {100: 30.0, 200: 12.0}, speed=4.0)
    files = [file for several in runs.files.values() for file in several]
    (counts, times, label, stamp), _ = draw("tradeoff", "--runs", *entries, "--metrics", *files)
    assert label == "FID (lower is better)" and stamp == "" and list(counts) == ["ours", "bits"]
    assert counts["ours"][1] == 10.0 and counts["bits"][1] == 12.0 and counts["bits"][0] < counts["ours"][0]
    assert times["bits"] == [(pytest.approx(37.5 / 3600), 30.0), (pytest.approx(75 / 3600), 12.0)]

    (points, axis, label, _), _ = draw("convergence", "--metric", "kid", "--runs", *entries, "--metrics", *files)
    assert points == {"ours": [(100, 0.02), (200, 0.01)], "bits": [(100, 0.03), (200, 0.012)]}
    assert (axis, label) == ("training steps", "KID (lower is better)")

    change(files[0], comparable=False)
    (tmp_path / "results/ours/metrics.jsonl").unlink()
    (counts, times, _, stamp), _ = draw("tradeoff", "--runs", *entries, "--metrics", *files)
    assert list(times) == ["bits"] and list(counts) == ["ours", "bits"] and "not comparable" in stamp


# ---- invalid input -------------------------------------------------------------------------------


def bad_inputs(adapter, base, images, pipeline, species, runs, tmp_path):
    """Return (pattern of the message, flags) of invalid calls."""
    ours, bits = runs.write("ours"), runs.write("bits", "bitfit", {100: 30.0}, settings={"global_seed": 1})
    wide = runs.write("wide", fids={9: 1.0}, image_size=64)
    inat = runs.write("inat", hierarchy=Hierarchy.load("inat2021").keep(), image_size=256)
    files, bit, other = runs.files["ours"], runs.files["bits"][0], runs.files["wide"][0]
    loose, foreign, broken = (tmp_path / f"{name}.json" for name in ("loose", "foreign", "broken"))
    for path in (loose, foreign):
        path.write_text(files[0].read_text())
    change(loose, sampling=None)
    change(foreign, sampling={"ckpt_sha256": "f" * 64})
    broken.write_text('{"fid": 3}')
    numbers = write_adapter(tmp_path / "n.safetensors", base, Hierarchy(["00000", "00001"], ["x"], [0, 0]))
    single = tmp_path / "one/cats/lynx"
    single.mkdir(parents=True)
    Image.open(images / "cats/lynx/0.png").save(single / "0.png")
    text = "text-to-image", "--ckpt", species, *FAST, "--pipeline"
    run = "--runs", ours, "--metrics"
    other_pipeline = tmp_path / "no-prompt"
    diffusers.DDPMPipeline(UNet2DModel.from_pretrained(pipeline, subfolder="unet"), DDPMScheduler()).save_pretrained(
        other_pipeline
    )
    compare = "compare", "--real", images, *FAST, "--adapters"
    return [
        ("nowhere could not be loaded.*pass another --pipeline", (*text, tmp_path / "nowhere")),
        ("no/such-pipeline could not be loaded", (*text, "no/such-pipeline")),
        ("is a DDPMPipeline, expected one that makes an image from a prompt alone", (*text, other_pipeline)),
        ("only numbers for classes", ("text-to-image", "--ckpt", numbers, "--pipeline", pipeline, *FAST)),
        ("expected --ckpt", ("text-to-image", "--pipeline", pipeline, *FAST)),
        ("--pipeline-steps is 0, expected 1 to 1000", (*text, pipeline, "--pipeline-steps", 0)),
        ("expected one of the two", ("grid", *FAST)),
        ("expected one of the two", ("grid", "--ckpt", adapter, "--images", images)),
        ("--columns is 0", ("grid", "--ckpt", adapter, "--columns", 0)),
        ("--cfg-scale is -1.0", ("grid", "--ckpt", adapter, "--cfg-scale", -1)),
        ("cannot be written", ("grid", "--ckpt", adapter, *FAST, "--out", adapter / "inside")),
        ("expected NAME=PATH", (*compare, adapter)),
        ("gives a name twice", (*compare, f"A={adapter}", f"A={adapter}")),
        ("is not an adapter", (*compare, f"A={base}")),
        ("No class of .* is called", (*compare, f"A={adapter}", f"B={species}")),
        ("has no image of 'manx'", ("compare", "--real", single.parents[1], "--adapters", f"A={adapter}", *FAST)),
        ("too small for 10 neighbours", ("tsne", "--ckpt", adapter)),
        ("does not record which adapter", ("tradeoff", *run, loose)),
        ("SHA-256 ffffffffffff", ("tradeoff", *run, foreign)),
        ("it has no 'overall'", ("tradeoff", *run, broken)),
        ("cannot be used", ("tradeoff", *run, tmp_path / "none.json")),
        ("has no adapters", ("tradeoff", "--runs", f"x={images}", "--metrics", files[0])),
        ("has no metric 'fdi'", ("tradeoff", *run, files[0], "--metric", "fdi")),
        ("differ in global_seed \\(0 and 1\\)", ("convergence", "--runs", ours, bits, "--metrics", *files, bit)),
        ("at one step", ("convergence", *run, files[0])),
        ("both of step 100", ("convergence", *run, files[0], copied(files[0], tmp_path / "again.json"))),
        ("--runs is missing, expected both", ("tables", "--metrics", other)),
        ("--metrics is missing, expected both", ("tables", "--runs", wide)),
        ("both for FineDiffusion in Table 1", ("tables", "--runs", inat, "--metrics", *runs.files["inat"])),
    ]


def copied(path, to):
    to.write_text(path.read_text())
    return to


def test_invalid_input_is_one_sentence_and_writes_nothing(
    command, adapter, base, images, pipeline, species, runs, tmp_path, plane
):
    cases = bad_inputs(adapter, base, images, pipeline, species, runs, tmp_path)
    before = tree(tmp_path)
    for words, flags in cases:
        out = () if "--out" in flags else ("--out", tmp_path / "out/figure")
        result = command(main, *flags, *out)
        assert result.code == 2, (words, result)
        lines = [line for line in result.err.splitlines() if line.startswith("figures.py: ")]
        assert len(lines) == 1 and result.err.endswith(lines[0] + "\n") and "Traceback" not in result.err
        assert not result.out
        with refusal(words):
            raise ValueError(lines[0].removeprefix("figures.py: "))
    assert tree(tmp_path) == before


def test_tsne_without_scikit_learn_says_what_to_install(command, adapter, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    result = command(main, "tsne", "--ckpt", adapter, "--neighbours", 2, "--out", tmp_path / "t")
    assert result.code == 2 and "pip install scikit-learn" in result.err and not list(tmp_path.iterdir())


def test_a_failed_save_leaves_no_file(tmp_path, monkeypatch):
    figure = plots.mosaic([[np.zeros((4, 4, 3), np.uint8)]])
    monkeypatch.setattr(figure, "savefig", lambda part, **_: (part.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        plots.save(figure, tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_a_species_is_named_by_its_last_two_words():
    assert caption("00003_Animalia_Chordata_Aves_Strigiformes_Strigidae_Bubo_bubo") == "Bubo bubo"
