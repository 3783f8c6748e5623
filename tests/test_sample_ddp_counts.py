"""sample_ddp.py --counts, --fill-to and --init-images: the images that a data set lacks, and variations of real ones."""

import json
import shutil
import signal
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.launch import die_at, launch, worst
from helpers.refusals import ROW, refused
from helpers.sampling_runs import NAMES, files
from helpers.tiny_files import tree
from PIL import Image

import sample
import sample_ddp
from dataset.images import read_crop
from hierarchy import Hierarchy
from sampling.counts import expand_counts, lacking_counts, number_images
from sampling.store import Store
from sampling.variations import InitImages


@pytest.fixture
def flags(adapter, tmp_path):
    """flags(name, *more) -> the flags of a run of 2 steps into tmp_path/name."""

    def flags(name, *more):
        start = ["--ckpt", adapter, "--sample-dir", tmp_path, "--name", name, "--num-sampling-steps", 2]
        return [*start, "--cfg-scale", 2, *more]

    return flags


@pytest.fixture
def here(flags, command):
    """here(name, *flags) -> code, out, err of sample_ddp.py in this process."""
    return lambda name, *more: command(sample_ddp.main, *flags(name, *more))


@pytest.fixture
def tail(images, tmp_path):
    """A folder with 4, 3, 1, 1 and 0 images of the classes lynx, manx, beagle, pug and pug_dog."""
    folder = shutil.copytree(images, tmp_path / "tail")
    for name, kept in (("cats/manx", 3), ("dogs/beagle", 1), ("dogs/pug", 1)):
        for path in sorted((folder / name).iterdir())[kept:]:
            path.unlink()
    shutil.rmtree(folder / "dogs/pug_dog")
    return folder


def count_files(folder):
    return Counter(path.parent.name for path in folder.rglob("*.png"))


# ---- counts --------------------------------------------------------------------------------------


def test_positions_and_order():
    labels = expand_counts(np.array([2, 0, 3]))
    assert labels.tolist() == [0, 2, 0, 2, 2] and number_images(labels).tolist() == [0, 0, 1, 1, 2]
    draw = np.random.default_rng(0).integers(0, 7, 200)
    for label in range(7):
        assert number_images(draw)[draw == label].tolist() == list(range((draw == label).sum()))
    assert len(expand_counts(np.zeros(3, np.int64))) == 0


def test_counts_by_name_and_label_are_the_images_of_sample_py(here, command, adapter, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"manx": 2, "3": 1, "lynx": 0}))
    (tmp_path / "b.csv").write_text("class,count\nmanx,2\npug,1\n")
    assert here("a", "--counts", tmp_path / "a.json").out == f"3 images in {tmp_path}/a\n"
    assert here("b", "--counts", tmp_path / "b.csv").code == 0
    assert files(tmp_path, "a") == files(tmp_path, "b") and count_files(tmp_path / "a") == {"manx": 2, "pug": 1}
    start = "--ckpt", adapter, "--num-sampling-steps", 2, "--cfg-scale", 2, "--batch-size", 1
    assert (
        command(sample.main, *start, "--classes", "manx", 3, "--per-class", 2, "--sample-dir", tmp_path / "c").code == 0
    )
    for path in (tmp_path / "a").rglob("*.png"):
        other = tmp_path / "c" / path.relative_to(tmp_path / "a")
        assert np.array_equal(np.array(Image.open(path)), np.array(Image.open(other)))


def test_filling_a_long_tail_is_exact_and_the_same_after_a_kill(flags, tail, tmp_path):
    """3 lacking of 5 classes; the same bytes on one process, and on three after a kill on two."""
    before, fill = tree(tail), ("--fill-to", 3, "--data-path", tail, "--format", "both")

    def run(name, world=1, kill=None):
        prepare = lambda rank: kill and rank == 1 and die_at(kill)  # noqa: E731
        return launch(sample_ddp.main, flags(name, *fill), tmp_path, world, prepare)

    assert worst(run("one")) == 0
    assert count_files(tmp_path / "one") == {"beagle": 2, "pug": 2, "pug_dog": 3}
    assert sorted(path.name for path in (tmp_path / "one/pug_dog").iterdir()) == [f"00000{k}.png" for k in range(3)]
    assert run("many", 2, kill=2)[1] == -signal.SIGKILL and not (tmp_path / "many.npz").exists()
    assert worst(run("many", 3)) == 0
    assert files(tmp_path, "many") == files(tmp_path, "one") and tree(tail) == before
    settings = json.loads((tmp_path / "one/settings.json").read_text())
    assert settings["labels"] == "counts" and settings["num_fid_samples"] == 7
    with np.load(tmp_path / "one.npz") as archive:
        assert Counter(archive["classes"][archive["arr_1"]].tolist()) == count_files(tmp_path / "one")


def test_an_image_does_not_depend_on_the_counts_of_others(here, tail, tmp_path):
    assert here("to2", "--fill-to", 2, "--data-path", tail).code == 0
    assert here("to3", "--fill-to", 3, "--data-path", tail).code == 0
    small, large = files(tmp_path, "to2"), files(tmp_path, "to3")
    pngs = [name for name in small if name.endswith(".png")]
    assert len(pngs) == 4 and all(small[name] == large[name] for name in pngs)
    shutil.copy(tail / "cats/lynx/0.png", tail / "dogs/pug/9.png")
    refused(here("to3", "--fill-to", 3, "--data-path", tail), "num_fid_samples 7, here 6", "counts_sha256")


def test_nothing_is_missing(here, tail, tmp_path):
    (tmp_path / "none.json").write_text("{}")
    shutil.copytree(tail / "cats/lynx", tail / "dogs/pug_dog")
    for name in ("beagle", "pug"):
        shutil.copytree(tail / "cats/lynx", tail / "dogs" / name, dirs_exist_ok=True)
    before = tree(tmp_path)
    result = here("x", "--fill-to", 3, "--data-path", tail)
    assert result.code == 0 and result.out == f"Nothing to sample: every class of {tail} has 3 images or more.\n"
    result = here("x", "--counts", tmp_path / "none.json")
    assert result.code == 0 and result.out == f"Nothing to sample: {tmp_path}/none.json asks for no images.\n"
    assert tree(tmp_path) == before


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize(
    "content, words",
    [
        ('{"wolf": 3}', "'wolf'"),
        ('{"5": 3}', "Class 5 is out of range"),
        ('{"pug": -1}', "has -1 as the number of images of 'pug', expected an integer of 0"),
        ("pug,1.5", "has '1.5' as the number of images of 'pug', expected an integer"),
        ('{"pug": true}', "has True as the number of images of 'pug'"),
        ('{"pug": 1, "3": 2}', "names class 3 twice, as 'pug' and '3': remove one"),
        ('{"pug": 1', "cannot be read ("),
        ("pug\nmanx,2", "cannot be read ("),
        ("pug,1\npug,1", "names class 3 twice"),
        (None, "There is no file"),
    ],
)
def test_bad_counts(content, words, here, tmp_path):
    if content is not None:
        (tmp_path / "counts").write_text(content)
    before = tree(tmp_path)
    refused(here("x", "--counts", tmp_path / "counts"), words)
    assert tree(tmp_path) == before


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize(
    "more, words",
    [
        ("--counts a.json --fill-to 3", "--counts and --fill-to are given, expected one of them"),
        ("--counts a.json --num-fid-samples 3", "--num-fid-samples and --counts are given"),
        ("--fill-to 3", "--fill-to is given without --data-path, expected both or none: add --data-path."),
        ("--data-path x", "--data-path is given without --fill-to"),
        ("--fill-to 0 --data-path x", "--fill-to is 0, expected 1 to"),
        ("--fill-to 3 --data-path nowhere", "nowhere"),
        ("--labels random --counts a.json", "--labels is random and --counts chooses the classes"),
        ("--init-images x", "--init-images is given without --strength"),
        ("--strength 0.5", "--strength is given without --init-images"),
        ("--init-images x --strength 1.5", "--strength is 1.5, expected 0 to 1."),
        ("--init-images x --strength nan", "--strength is nan, expected 0 to 1."),
        ("--init-images nowhere --strength 0.5 --num-fid-samples 2", "nowhere"),
    ],
)
def test_bad_flags(more, words, here, tmp_path):
    before = tree(tmp_path)
    refused(here("x", *more.split()), words)
    assert tree(tmp_path) == before


@pytest.mark.reliability(*ROW)
def test_a_folder_of_other_classes_and_more_processes_than_images(here, flags, tail, tmp_path):
    shutil.copytree(tail / "cats/lynx", tail / "cats/puma")
    refused(here("x", "--fill-to", 9, "--data-path", tail), "has 1 class folders that pets lacks ('puma')")
    shutil.rmtree(tail / "cats/puma")
    fill = flags("x", "--fill-to", 1, "--data-path", tail)
    assert worst(launch(sample_ddp.main, fill, tmp_path, 2, patience=30)) == 2
    said = SimpleNamespace(code=2, err=(tmp_path / "err0").read_text())
    refused(said, "2 processes are more than the number of images, 1: start as many as there are images, or fewer.")


# ---- variations ----------------------------------------------------------------------------------


def test_strength_1_is_plain_sampling_and_0_the_image(here, images, tail, tmp_path):
    vary, plain = ("--init-images", images, "--strength"), ("--num-fid-samples", 7)
    assert here("a", *plain).code == here("b", *plain, *vary, 1).code == here("c", *plain, *vary, 0).code == 0
    assert files(tmp_path, "a") == files(tmp_path, "b")
    labels = [NAMES.index(path.parent.name) for path in sorted((tmp_path / "c").rglob("*.png"), key=lambda p: p.name)]
    positions = number_images(np.array(labels))
    for path in (tmp_path / "c").rglob("*.png"):  # image k of a class varies the class's sorted file k
        source = sorted(
            (images / ("cats" if path.parent.name in ("lynx", "manx") else "dogs") / path.parent.name).iterdir()
        )
        expected = np.array(read_crop(source[positions[int(path.stem)] % 4], 8))
        assert np.array_equal(np.array(Image.open(path)), expected)
    assert here("d", "--fill-to", 3, "--data-path", tail).code == 0
    assert here("e", "--fill-to", 3, "--data-path", tail, *vary, 1).code == 0
    assert files(tmp_path, "d") == files(tmp_path, "e")


@pytest.mark.parametrize("sampler", ["ddpm", "unipc"])
def test_variations_are_the_same_for_any_processes(sampler, flags, here, images, tmp_path):
    more = "--num-fid-samples", 5, "--num-sampling-steps", 4, "--sampler", sampler
    vary = "--init-images", images, "--strength", 0.5
    assert here("one", *more, *vary).code == here("plain", *more).code == 0
    assert worst(launch(sample_ddp.main, flags("two", *more, *vary, "--per-proc-batch-size", 3), tmp_path, 2)) == 0
    one, two, plain = (files(tmp_path, name) for name in ("one", "two", "plain"))
    assert one == two and not set(one.values()) & set(plain.values())
    refused(here("one", *more, *vary[:3], 0.6), "strength 0.5, here 0.6")
    refused(here("one", *more), "strength 0.5, here None")


@pytest.mark.reliability(*ROW)
def test_a_class_without_an_image_to_vary(here, tail, tmp_path):
    before, vary = tree(tmp_path), ("--init-images", tail, "--strength", 0.5)
    refused(here("x", "--num-fid-samples", 5, *vary), "no images of 1 classes that are to be sampled ('pug_dog')")
    assert tree(tmp_path) == before
    (tmp_path / "counts.csv").write_text("pug,2")  # this class has one, which is varied twice
    assert here("x", "--counts", tmp_path / "counts.csv", *vary).code == 0
    assert len({path.read_bytes() for path in (tmp_path / "x/pug").iterdir()}) == 2


def test_the_mean_latents_of_files_in_turn(images):
    """Image `position` of a class varies its sorted file `position` modulo their count; latents are the means."""
    hierarchy = Hierarchy.from_folder(images)
    init = InitImages(images, hierarchy, [0])
    halves = SimpleNamespace(encode_moments=lambda x: (x / 2, None))
    latents = init.latents([0, 0, 4], [1, 5, 2], 8, halves, "cpu")
    assert latents.shape == (3, 3, 8, 8) and latents[0].equal(latents[1])
    crop = torch.from_numpy(np.array(read_crop(images / "dogs/pug_dog/2.png", 8))).permute(2, 0, 1)
    assert latents[2].equal((crop / 127.5 - 1) / 2)
    assert lacking_counts(images, 6, hierarchy).tolist() == [2] * 5


def test_pngs_by_position(tmp_path):
    store = Store(tmp_path / "x", [1, 0, 1], ["a", "b"], 4, "png", np.array([0, 0, 1]))
    assert [str(store.png.path(k).relative_to(tmp_path)) for k in range(3)] == [
        "x/b/000000.png",
        "x/a/000000.png",
        "x/b/000001.png",
    ]
