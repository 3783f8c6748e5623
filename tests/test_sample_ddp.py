"""Sampling at scale: the same pictures from any batch, processes and interruptions; exactly N of them; the files."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASSES, call, tree
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler  # noqa: F401  slow: forked processes find them
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sample_ddp
import sample_store
from hierarchy import Hierarchy
from sample_ddp import balanced, random_labels
from sample_store import Store, Writer
from sampling import SAMPLERS

NAMES = [name for names in CLASSES.values() for name in names]
KILLS = int(os.environ.get("TORTURE", 5))  # of the row of kills and damages; `make torture` asks for 20
DEADLY = [(os, "replace"), (os, "pwrite"), (os, "fsync"), (os, "unlink")]  # every step by which files come about


def launch(folder, flags, world=1, kill=None):
    """sample_ddp.py in `world` processes, as torchrun starts them, of which kill = (rank, operation) dies of signal 9.

    The exit code of that rank, or of the first that fails; when one fails the others are killed. What they say goes to
    `err<rank>`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks, codes = {}, []
    for rank in range(world):
        child = os.fork()
        if not child:
            os._exit(worker(folder, flags, world, rank, port, kill[1] if kill and kill[0] == rank else None))
        ranks[child] = rank
    while ranks:
        child, status = os.wait()
        codes.append((ranks.pop(child), os.waitstatus_to_exitcode(status)))
        if codes[-1][1]:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return dict(codes)[kill[0]] if kill else next((code for _, code in codes if code), 0)


def worker(folder, flags, world, rank, port, operation):
    code = 99
    with contextlib.suppress(BaseException), open(folder / f"err{rank}", "w") as err:
        os.dup2(err.fileno(), 2)
        sys.stderr = err
        if world > 1:
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.environ |= dict(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        if operation is not None:
            left = [operation]
            for module, name in DEADLY:
                setattr(module, name, deadly(getattr(module, name), left))
        result = call(sample_ddp.main, *flags)
        err.write(result.err)
        code = result.code
    return code


def deadly(function, left):
    """The function, until the operations that are `left` have been done."""

    def replacement(*arguments, **options):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return function(*arguments, **options)

    return replacement


@pytest.fixture
def run(adapter, tmp_path, command):
    """run(name, *flags, world=1, kill=None) -> exit code; 11 images in 3 steps to tmp_path/name unless flags say otherwise."""

    def run(name, *flags, **options):
        start = ["--ckpt", adapter, "--sample-dir", tmp_path, "--name", name, "--num-sampling-steps", 3]
        return launch(tmp_path, [*start, "--num-fid-samples", 11, "--format", "both", *flags], **options)

    return run


@pytest.fixture
def here(adapter, tmp_path, command):
    """The same in this process -> code, out, err."""

    def here(name, *flags):
        start = ["--ckpt", adapter, "--sample-dir", tmp_path, "--name", name, "--num-sampling-steps", 3]
        return command(sample_ddp.main, *start, "--num-fid-samples", 11, "--format", "both", *flags)

    return here


def files(root, name):
    """{path: bytes} of a run: folder and npz."""
    found = {f"{name}.npz": (root / f"{name}.npz").read_bytes()} if (root / f"{name}.npz").exists() else {}
    found |= {str(path.relative_to(root)): path.read_bytes() for path in (root / name).rglob("*") if path.is_file()}
    return {path.removeprefix(name): content for path, content in found.items()}


def opened(path):
    with np.load(path, allow_pickle=False) as archive:
        assert sorted(archive) == ["arr_0", "arr_1"]
        return archive["arr_0"], archive["arr_1"]


# ---- the same pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_bytes_from_any_batch_processes_and_interruption(sampler, run, tmp_path):
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


def test_other_settings_are_other_pictures(here, tmp_path):
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


def test_kills_and_damages_leave_no_trace(run, tmp_path):
    """37 images on 1 to 4 processes, KILLS deaths at an operation of a file, 5 damaged files: identical files, exactly N."""
    many = "--num-fid-samples", 37, "--num-sampling-steps", 2
    assert run("reference", *many) == 0
    reference, draw = files(tmp_path, "reference"), random.Random(0)
    deaths = lives = 0
    while deaths < KILLS:
        world = lives % 4 + 1
        kill = draw.randrange(world), draw.choice((0, 1, 4, 9, 20, 33, 50))
        code = run("tried", *many, world=world, kill=kill)
        assert code in (0, -signal.SIGKILL)
        deaths, lives = deaths + (code != 0), lives + 1
        found = files(tmp_path, "tried")
        for path in found:  # what is there under its name is whole
            assert path not in reference or found[path] == reference[path]
        if code == 0:  # done before that operation: once more from the beginning
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
    assert all(f"{path} is damaged and is made again." in said for path in damaged) and said.count("damaged") == 5
    assert files(tmp_path, "tried") == reference
    print(f"{deaths} kills in {lives} lives, 5 damaged files: 37 identical PNGs and the npz")


def test_a_finished_run_is_looked_at_and_left(here, tmp_path, monkeypatch):
    assert here("x").code == 0
    before, times = files(tmp_path, "x"), {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    monkeypatch.setattr(sample_ddp, "sample_keyed", None)  # nothing is sampled
    result = here("x")
    assert result.code == 0 and result.out == f"11 images in {tmp_path}/x and {tmp_path}/x.npz\n"
    assert files(tmp_path, "x") == before
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == times


@pytest.mark.parametrize("kind", ["bit", "cut", "empty", "html"])
def test_a_damaged_npz_is_made_again(kind, here, tmp_path):
    assert here("x").code == 0
    before = files(tmp_path, "x")
    damage(kind, tmp_path / "x.npz")
    result = here("x")
    assert result.code == 0 and f"{tmp_path}/x.npz is damaged and is made again." in result.err
    assert files(tmp_path, "x") == before


def test_a_damaged_row_is_made_again(here, tmp_path, monkeypatch):
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
    assert result.code == 0 and f"Picture 5 in {tmp_path}/x/rows is damaged and is made again." in result.err
    assert files(tmp_path, "x") == before


# ---- which pictures ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(1, 500))
@settings(max_examples=200, deadline=None)
def test_balanced_labels_differ_by_one_at_most(count, classes):
    labels = balanced(count, classes)
    assert labels.shape == (count,) and labels.min() >= 0 and labels.max() < classes
    counts = np.bincount(labels, minlength=classes)
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(labels, balanced(count + 7, classes)[:count])  # image k's class is of no other number
    assert len(set(labels[:classes])) == min(count, classes)  # a class comes again when all have been


def test_balanced_labels_show_each_superclass_in_its_share():
    """Of iNaturalist, whose superclasses are ranges of classes: any 1,000 images of a run, within 6 of the share."""
    parents = Hierarchy.load("inat2021").parents.numpy()
    labels = parents[balanced(20_000, 10_000)]
    share = np.bincount(parents) / 10
    for first in range(0, 19_000, 500):
        assert abs(np.bincount(labels[first : first + 1000], minlength=11) - share).max() < 6


def test_random_labels_are_uniform_and_set_by_seed_and_number():
    labels = random_labels(5000, 10, seed=3)
    assert np.array_equal(labels[:40], random_labels(40, 10, seed=3))
    assert not np.array_equal(labels, random_labels(5000, 10, seed=4))
    counts = np.bincount(labels, minlength=10)
    assert abs(counts - 500).max() < 4 * 450**0.5 and counts.max() - counts.min() > 1


@pytest.mark.parametrize("world", range(1, 6))
def test_each_picture_belongs_to_one_process(world, tmp_path):
    store = Store(tmp_path / "x", np.zeros(23), ["a"], 4, "png")
    shares = [store.missing(rank, world) for rank in range(world)]
    assert sorted(sum(shares, [])) == list(range(23)) and max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- the files --------------------------------------------------------------------------------------------------------


def test_pngs_by_class_and_the_npz_of_adm(here, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", None)  # no PNG is read back
    assert here("x").code == 0
    monkeypatch.undo()
    pixels, labels = opened(tmp_path / "x.npz")
    assert pixels.dtype == np.uint8 and pixels.shape == (11, 8, 8, 3)
    assert labels.dtype == np.int64 and labels.tolist() == balanced(11, 5).tolist()
    for k in range(11):
        with Image.open(tmp_path / f"x/{NAMES[labels[k]]}/{k:06d}.png") as image:
            assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels[k])
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == sorted({*NAMES, "settings.json"})
    assert pixels.std() > 10 and len({image.tobytes() for image in pixels}) == 11


@pytest.mark.parametrize("form, there", [("png", {"png"}), ("npz", {"npz"})])
def test_one_form_alone(form, there, here, tmp_path):
    result = here("x", "--format", form)
    assert result.code == 0 and result.out == f"11 images in {tmp_path}/x{'.npz' * (form == 'npz')}\n"
    suffixes = {path.split(".")[-1] for path in files(tmp_path, "x")} - {"json"}
    assert suffixes == there
    assert len(list((tmp_path / "x").rglob("*.png"))) == 11 * (form == "png")


def test_the_npz_is_not_held_in_memory(tmp_path):
    """100 MB of pixels, written and closed up with 8 MB at most."""
    import tracemalloc

    store = Store(tmp_path / "x", np.zeros(128), ["a"], 512, "npz")
    store.prepare({})
    for k in range(128):
        store.write(k, np.full((512, 512, 3), k, np.uint8))
    tracemalloc.start()
    assert store.missing() == []
    store.finish()
    assert store.whole_npz() and tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    with np.load(tmp_path / "x.npz", mmap_mode="r") as archive:
        assert archive["arr_0"][:, 0, 0, 0].tolist() == list(range(128))


def test_any_damage_to_a_png_is_seen(tmp_path, capsys):
    """Each single bit, and each length it can be cut to."""
    store = Store(tmp_path / "x", [0], ["a"], 4, "png")
    store.write(0, np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8))
    path = store.path(0)
    whole = path.read_bytes()
    broken = [whole[:length] for length in range(len(whole))]
    broken += [(int.from_bytes(whole, "big") ^ 1 << bit).to_bytes(len(whole), "big") for bit in range(8 * len(whole))]
    other = Store(tmp_path / "y", [0], ["a"], 8, "png")
    other.write(0, np.zeros((8, 8, 3), np.uint8))
    for content in (*broken, other.path(0).read_bytes()):
        path.write_bytes(content)
        assert store.missing() == [0]
    assert capsys.readouterr().err.count(f"{path} is damaged and is made again.\n") == len(broken) + 1
    path.write_bytes(whole)
    assert store.missing() == [] and not capsys.readouterr().err


def test_the_name_tells_model_checkpoint_and_settings(command, adapter, tmp_path, monkeypatch):
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


# ---- threads that write -----------------------------------------------------------------------------------------------


def test_writing_is_not_waited_for_up_to_a_depth():
    release, written = [], []

    def write(k):
        while not release:
            time.sleep(0.001)
        written.append(k)

    with Writer(write, threads=2, depth=4) as writer:
        for k in range(4):
            writer.put(k)  # at once, although nothing is written
        assert not written
        release.append(True)
        for k in range(4, 20):
            writer.put(k)
            assert len(writer.jobs) <= 4
    assert sorted(written) == list(range(20))


def test_what_fails_in_a_thread_stops_the_run(here, tmp_path, monkeypatch):
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


# ---- mistakes ---------------------------------------------------------------------------------------------------------


def refused(result, *words):
    """One sentence below the progress bar, exit code 2."""
    line = result.err.split("\r")[-1].split("\n")[-2]
    assert result.code == 2 and "Traceback" not in result.err
    assert line.startswith("sample_ddp.py: ") and line.endswith(".") and all(word in line for word in words), line


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--num-fid-samples 0", "--num-fid-samples is 0, expected 1 to"),
        ("--num-fid-samples -3", "--num-fid-samples is -3"),
        ("--per-proc-batch-size 0", "--per-proc-batch-size is 0"),
        ("--global-seed 18446744073709551616", "--global-seed is 18446744073709551616"),
        ("--num-sampling-steps 1001", "--num-sampling-steps is 1001, expected 1 to 1000"),
        ("--cfg-scale inf", "--cfg-scale is inf"),
        ("--guidance-interval 5 4", "--guidance-interval is 5 4"),
        ("--guidance null", "no null row"),
        ("--mixed-precision fp16", "expected a GPU"),
        ("--name a/b", "--name is a/b, expected the name of a folder"),
        ("--name ..", "--name is .., expected the name of a folder"),
    ],
)
def test_bad_input(flags, words, here, tmp_path):
    before = tree(tmp_path)
    refused(here("x", *flags.split()), words)
    assert tree(tmp_path) == before


def test_more_processes_than_images(run, tmp_path):
    assert run("x", "--num-fid-samples", 2, world=3) == 2
    said = "".join((tmp_path / f"err{rank}").read_text() for rank in range(3))
    assert "3 processes are more than --num-fid-samples 2: start as many as there are images, or fewer." in said
    assert not (tmp_path / "x").exists()


def test_a_refusal_reaches_every_process(run, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/other.txt").touch()
    assert run("x", world=2) == 2
    assert "holds files but no settings.json" in (tmp_path / "err0").read_text()


def test_a_folder_of_other_settings_is_refused_with_the_differences(here, adapter, tmp_path):
    assert here("x").code == 0
    before = tree(tmp_path)
    refused(here("x", "--global-seed", 1, "--cfg-scale", 2), "cfg_scale 4.0, here 2.0; global_seed 0, here 1)")
    refused(here("x", "--num-fid-samples", 12), "num_fid_samples 11, here 12")
    refused(here("x", "--format", "png"), "format both, here png")
    refused(here("x", "--sampler", "ddim"), "sampler ddpm, here ddim")
    assert tree(tmp_path) == before
    settings = json.loads((tmp_path / "x/settings.json").read_text())
    (tmp_path / "x/settings.json").write_text(json.dumps(settings | {"ckpt_sha256": "0" * 64}))
    refused(here("x"), f"ckpt_sha256 {'0' * 64}, here {settings['ckpt_sha256']}")
    (tmp_path / "x/settings.json").write_text("{")
    refused(here("x"), "settings.json is damaged")


def test_foreign_folders_and_files_are_left_alone(here, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/holiday.png").write_bytes(b"mine")
    (tmp_path / "y.npz").write_bytes(b"mine")
    before = tree(tmp_path)
    refused(here("x"), "x holds files but no settings.json")
    refused(here("y"), "y holds files but no settings.json")
    assert tree(tmp_path) == before
    assert here("z").code == 0
    shutil.copy(next((tmp_path / "z/pug").iterdir()), tmp_path / "z/pug/000099.png")
    refused(here("z"), "z holds 12 PNGs, expected 11: remove what is not of this run.")


def test_two_launches_into_one_folder(here, tmp_path):
    assert here("x").code == 0
    store = Store(tmp_path / "x", balanced(11, 5), NAMES, 8, "both")
    store.prepare(json.loads((tmp_path / "x/settings.json").read_text()))
    refused(here("x"), "Another process is sampling into")
    store.close()
    assert here("x").code == 0


def test_a_disk_that_is_too_small_is_said_before_the_first_sample(here, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_ddp, "sample_keyed", None)
    monkeypatch.setattr(sample_store.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 11 * 8 * 8 * 3 - 1))
    before = tree(tmp_path)
    for form in ("npz", "both"):
        refused(
            here("x", "--format", form), "GB more and has 4.22e-06 GB free: make room, or choose another --sample-dir"
        )
    assert tree(tmp_path) == before
    monkeypatch.undo()
    monkeypatch.setattr(sample_store.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 11 * 8 * 8 * 3))
    assert here("x", "--format", "npz").code == 0


def test_room_is_what_is_still_to_be_written(tmp_path, monkeypatch):
    """100,000 images of 256 pixels: 19.7 GB of rows, as much for the npz beside them."""
    asked = []
    monkeypatch.setattr(
        sample_store.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=39.3e9)
    )
    with pytest.raises(ValueError, match="needs about 39.3 GB more and has 39.3 GB free"):
        Store(tmp_path / "a/b/x", np.zeros(100_000), ["a"], 256, "npz").check_room()
    assert asked == [tmp_path]
    (tmp_path / "x").mkdir()
    (tmp_path / "x/rows").write_bytes(b"\1" * 30_000_000)
    Store(tmp_path / "x", np.zeros(100_000), ["a"], 256, "npz").check_room()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_sample_that_is_not_finite_is_named_and_not_written(value, here, tmp_path, monkeypatch):
    real = sample_ddp.sample_keyed

    def broken(model, labels, keys, *rest, **options):
        latents = real(model, labels, keys, *rest, **options)
        latents[[key == (6, 7) for key in keys], 1, 2, 3] = float(value)
        return latents

    monkeypatch.setattr(sample_ddp, "sample_keyed", broken)
    result = here("x", "--global-seed", 6)
    refused(result, f"Image 7 of seed 6 (class {balanced(8, 5)[7]}) is not finite, expected pixels")
    numbers = sorted(int(path.stem) for path in (tmp_path / "x").rglob("*.png"))
    assert numbers == list(range(7)) and not (tmp_path / "x.npz").exists()
    monkeypatch.undo()
    assert here("x", "--global-seed", 6).code == 0
    assert len(list((tmp_path / "x").rglob("*.png"))) == 11


def test_labels_in_every_folder(here, tmp_path):
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
