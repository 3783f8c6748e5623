"""sample_ddp.py: the same images for any batch size, processes and interruptions; exactly N of them; the files."""

import random
import shutil
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler  # noqa: F401  slow to import: forks have them
from helpers import sampling_runs
from helpers.sampling_runs import NAMES, files
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sample_ddp
from hierarchy import Hierarchy
from sampling.choice import balanced_labels, random_labels
from sampling.samplers import SAMPLERS
from sampling.store import Store, Writer

run, here = sampling_runs.run, sampling_runs.here


def opened(path):
    with np.load(path, allow_pickle=False) as archive:
        assert sorted(archive) == ["arr_0", "arr_1", "classes"] and archive["classes"].tolist() == NAMES
        return archive["arr_0"], archive["arr_1"]


# ---- the same images -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_bytes_for_any_batch_size_processes_and_interruption(sampler, run, tmp_path):
    flags = "--sampler", sampler, "--cfg-scale", 2
    assert run("reference", *flags, "--per-proc-batch-size", 1) == 0
    reference = files(tmp_path, "reference")
    assert len(reference) == 11 + 2  # settings.json, the npz
    assert run("four", *flags, "--per-proc-batch-size", 4) == 0
    assert run("seven", *flags, "--per-proc-batch-size", 7, world=3) == 0
    assert run("killed", *flags, world=3, kill=(1, 9)) == -signal.SIGKILL
    done = [path for path in files(tmp_path, "killed") if path.endswith(".png")]
    assert 0 < len(done) < 11 and not (tmp_path / "killed.npz").exists()
    assert run("killed", *flags, "--per-proc-batch-size", 4) == 0
    for name in ("four", "seven", "killed"):
        assert files(tmp_path, name) == reference


def test_other_settings_give_other_images(here, tmp_path):
    flags = {"a": [], "b": ["--global-seed", 1], "c": ["--cfg-scale", 1], "d": ["--num-sampling-steps", 4]}
    flags |= {"e": ["--guidance", "random-class"], "f": ["--labels", "random"], "g": ["--mixed-precision", "bf16"]}
    assert all(here(name, *more, "--format", "npz").code == 0 for name, more in flags.items())
    pixels = {name: opened(tmp_path / f"{name}.npz")[0] for name in flags}
    for name in "bcdefg":
        assert not np.array_equal(pixels[name], pixels["a"])
    near = abs(pixels["g"].astype(int) - pixels["a"])  # half precision is nearly the same
    assert near.mean() < 3 and abs(pixels["b"].astype(int) - pixels["a"]).mean() > 10


def damage(kind, path):
    content = bytearray(path.read_bytes())
    if kind == "bit":
        content[len(content) // 2] ^= 4
    elif kind == "end":
        content[-1] ^= 1
    path.write_bytes({"cut": content[:-9], "empty": b"", "html": b"<!DOCTYPE html>"}.get(kind, content))


@pytest.mark.reliability("R8", "sample_ddp.py on 1 to 4 processes, killed at file operations, with damaged files")
def test_kills_and_damage_leave_no_trace(run, tmp_path, cases, figure):
    """37 images on 1 to 4 processes, kills at file operations, 5 damaged files: identical files, exactly N."""
    many = "--num-fid-samples", 37, "--num-sampling-steps", 2
    assert run("reference", *many) == 0
    reference, draw = files(tmp_path, "reference"), random.Random(0)
    deaths, lives, kills = 0, 0, cases(5, full=20)
    while deaths < kills:
        world = lives % 4 + 1
        kill = draw.randrange(world), draw.choice((0, 1, 4, 9, 20, 33, 50))
        code = run("tried", *many, world=world, kill=kill)
        assert code in (0, -signal.SIGKILL)
        deaths, lives = deaths + (code != 0), lives + 1
        found = files(tmp_path, "tried")
        for path in found:  # a file under its final name is complete
            assert path not in reference or found[path] == reference[path]
        if code == 0:  # finished before that operation: start again
            assert found == reference
            (tmp_path / "tried.npz").unlink()
            shutil.rmtree(tmp_path / "tried")
    if sum(path.endswith(".png") for path in found) < 5:
        run("tried", *many, kill=(0, 50))
    damaged = draw.sample(sorted((tmp_path / "tried").glob("*/[0-9]*.png")), 5)
    for path, kind in zip(damaged, ("bit", "end", "cut", "empty", "html")):
        damage(kind, path)
    assert run("tried", *many, world=2) == 0
    said = (tmp_path / "err0").read_text() + (tmp_path / "err1").read_text()
    assert (
        all(f"{path} is damaged and will be sampled again." in said for path in damaged) and said.count("damaged") == 5
    )
    assert files(tmp_path, "tried") == reference
    figure(f"{deaths} kills in {lives} starts, 5 damaged files: 37 identical PNGs and the npz")


def test_a_finished_run_is_checked_and_not_changed(here, tmp_path, monkeypatch):
    assert here("x").code == 0
    before, times = files(tmp_path, "x"), {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    monkeypatch.setattr(sample_ddp, "sample_keyed", None)  # nothing is sampled
    result = here("x")
    assert result.code == 0 and result.out == f"11 images in {tmp_path}/x and {tmp_path}/x.npz\n"
    assert files(tmp_path, "x") == before
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == times


@pytest.mark.parametrize("kind", ["bit", "cut", "empty", "html"])
def test_a_damaged_npz_is_replaced(kind, here, tmp_path):
    assert here("x").code == 0
    before = files(tmp_path, "x")
    damage(kind, tmp_path / "x.npz")
    result = here("x")
    assert result.code == 0 and f"{tmp_path}/x.npz is damaged and will be sampled again." in result.err
    assert files(tmp_path, "x") == before


def test_a_damaged_row_is_replaced(here, tmp_path, monkeypatch):
    assert here("x").code == 0
    before = files(tmp_path, "x")
    shutil.rmtree(tmp_path / "x")
    (tmp_path / "x.npz").unlink()
    monkeypatch.setattr(Store, "finish", lambda self: None)
    assert here("x").code == 0
    with open(tmp_path / "x/rows", "r+b") as rows:
        rows.seek(5 * 192 + 7)
        rows.write(b"\7\7")
    monkeypatch.undo()
    result = here("x")
    assert result.code == 0 and f"Image 5 in {tmp_path}/x/rows is damaged and will be sampled again." in result.err
    assert files(tmp_path, "x") == before


# ---- labels --------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(1, 500))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_balanced_labels_differ_by_one_at_most(count, classes):
    labels = balanced_labels(count, classes)
    assert labels.shape == (count,) and labels.min() >= 0 and labels.max() < classes
    counts = np.bincount(labels, minlength=classes)
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(
        labels, balanced_labels(count + 7, classes)[:count]
    )  # the class of image k depends on k alone
    assert len(set(labels[:classes])) == min(count, classes)  # no class repeats before every class has appeared


def test_balanced_labels_show_each_superclass_in_its_share():
    """Any 1,000 consecutive images of iNaturalist, whose superclasses are ranges of classes: within 6 of the share."""
    parents = Hierarchy.load("inat2021").parents.numpy()
    labels = parents[balanced_labels(20_000, 10_000)]
    share = np.bincount(parents) / 10
    for first in range(0, 19_000, 500):
        assert abs(np.bincount(labels[first : first + 1000], minlength=11) - share).max() < 6


def test_random_labels_are_uniform_and_depend_on_seed_and_number():
    labels = random_labels(5000, 10, seed=3)
    assert np.array_equal(labels[:40], random_labels(40, 10, seed=3))
    assert not np.array_equal(labels, random_labels(5000, 10, seed=4))
    counts = np.bincount(labels, minlength=10)
    assert abs(counts - 500).max() < 4 * 450**0.5 and counts.max() - counts.min() > 1


@given(st.integers(1, 400), st.integers(1, 16))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_each_image_belongs_to_one_process(tmp_path_factory, count, world):
    store = Store(tmp_path_factory.getbasetemp() / "absent", np.zeros(count), ["a"], 4, "png")
    shares = [store.missing(rank, world) for rank in range(world)]
    assert sorted(sum(shares, [])) == list(range(count)) and max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- files ---------------------------------------------------------------------------------------


def test_pngs_by_class_and_the_npz_of_adm(here, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", None)  # no PNG is read
    assert here("x").code == 0
    monkeypatch.undo()
    pixels, labels = opened(tmp_path / "x.npz")
    assert pixels.dtype == np.uint8 and pixels.shape == (11, 8, 8, 3)
    assert labels.dtype == np.int64 and labels.tolist() == balanced_labels(11, 5).tolist()
    for k in range(11):
        with Image.open(tmp_path / f"x/{NAMES[labels[k]]}/{k:06d}.png") as image:
            assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels[k])
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == sorted({*NAMES, "settings.json"})
    assert pixels.std() > 10 and len({image.tobytes() for image in pixels}) == 11
    # an npz of an earlier version, without the names of the classes, is complete too
    np.savez(tmp_path / "x.npz", arr_0=pixels, arr_1=labels)
    earlier = (tmp_path / "x.npz").read_bytes()
    assert here("x").code == 0 and (tmp_path / "x.npz").read_bytes() == earlier


@pytest.mark.parametrize("form, expected", [("png", {"png"}), ("npz", {"npz"})])
def test_one_format_alone(form, expected, here, tmp_path):
    result = here("x", "--format", form)
    assert result.code == 0 and result.out == f"11 images in {tmp_path}/x{'.npz' * (form == 'npz')}\n"
    suffixes = {path.split(".")[-1] for path in files(tmp_path, "x")} - {"json"}
    assert suffixes == expected
    assert len(list((tmp_path / "x").rglob("*.png"))) == 11 * (form == "png")


def test_the_npz_is_not_held_in_memory(tmp_path):
    """100 MB of pixels are written with at most 8 MB of memory."""
    import tracemalloc

    store = Store(tmp_path / "x", np.zeros(128), ["a"], 512, "npz")
    store.prepare({})
    for k in range(128):
        store.write(k, np.full((512, 512, 3), k, np.uint8))
    tracemalloc.start()
    assert store.missing() == []
    store.finish()
    assert store.npz.is_intact() and tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    with np.load(tmp_path / "x.npz", mmap_mode="r") as archive:
        assert archive["arr_0"][:, 0, 0, 0].tolist() == list(range(128))


def test_any_damage_to_a_png_is_found(tmp_path, capsys):
    """Flip each bit, and cut the file to each length."""
    store = Store(tmp_path / "x", [0], ["a"], 4, "png")
    store.write(0, np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8))
    path = store.png.path(0)
    intact = path.read_bytes()
    broken = [intact[:length] for length in range(len(intact))]
    broken += [
        (int.from_bytes(intact, "big") ^ 1 << bit).to_bytes(len(intact), "big") for bit in range(8 * len(intact))
    ]
    other = Store(tmp_path / "y", [0], ["a"], 8, "png")
    other.write(0, np.zeros((8, 8, 3), np.uint8))
    for content in (*broken, other.png.path(0).read_bytes()):
        path.write_bytes(content)
        assert store.missing() == [0]
    assert capsys.readouterr().err.count(f"{path} is damaged and will be sampled again.\n") == len(broken) + 1
    path.write_bytes(intact)
    assert store.missing() == [] and not capsys.readouterr().err


def test_the_default_name_holds_model_checkpoint_and_settings(command, adapter, tmp_path, monkeypatch):
    run = tmp_path / "pets/adapters"
    run.mkdir(parents=True)
    shutil.copy(adapter, run / "0000007.safetensors")
    monkeypatch.chdir(tmp_path)
    start = ["--ckpt", run / "0000007.safetensors", "--num-fid-samples", 2, "--num-sampling-steps", 2]
    more = ["--sampler", "ddim", "--cfg-scale", 1.5, "--guidance", "random-class", "--global-seed", 3]
    assert command(sample_ddp.main, *start).code == command(sample_ddp.main, *start, *more).code == 0
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "DiT-Ti-2-pets-0000007-size-8-vae-none-cfg-1.5-steps-2-seed-3-random-class-ddim",
        "DiT-Ti-2-pets-0000007-size-8-vae-none-cfg-4.0-steps-2-seed-0",
    ]


# ---- writer threads ------------------------------------------------------------------------------


def test_put_does_not_wait_up_to_a_depth():
    release, written = [], []

    def write(k):
        while not release:
            time.sleep(0.001)
        written.append(k)

    with Writer(write, threads=2, depth=4) as writer:
        for k in range(4):
            writer.put(k)  # returns although nothing is written
        assert not written
        release.append(True)
        for k in range(4, 20):
            writer.put(k)
            assert len(writer.jobs) <= 4
    assert sorted(written) == list(range(20))


def test_an_error_in_a_thread_stops_the_run(here, tmp_path, monkeypatch):
    real, full = Store.write, OSError(28, "No space left on device", str(tmp_path / "x/rows"))

    def fails(self, k, pixels):
        if k == 3:
            raise full
        real(self, k, pixels)

    monkeypatch.setattr(Store, "write", fails)
    result = here("x")
    assert result.code == 2 and "x/rows cannot be used (No space left on device)" in result.err
    assert not (tmp_path / "x.npz").exists()
    monkeypatch.undo()
    assert here("x").code == 0


def test_random_labels_in_folders_and_npz(here, tmp_path):
    assert here("x", "--labels", "random").code == 0
    _, labels = opened(tmp_path / "x.npz")
    found = Counter(path.parent.name for path in (tmp_path / "x").rglob("*.png"))
    assert found == Counter(NAMES[label] for label in labels) and labels.tolist() == random_labels(11, 5, 0).tolist()


def test_one_thread_on_a_cpu(here):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert here("x").code == 0 and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
