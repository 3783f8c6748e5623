"""Input that sample_ddp.py refuses, if possible before the first sample: flags, foreign folders, a full disk, NaN."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import sampling_runs
from helpers.launch import launch
from helpers.refusals import ODD, ROW, refused
from helpers.sampling_runs import NAMES, files
from helpers.tiny_files import tree

import sample
import sample_ddp
from models import DiT
from sampling import store
from sampling.choice import balanced_labels
from sampling.store import Store

run, here = sampling_runs.run, sampling_runs.here


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize(
    "flags, words",
    [
        ("--num-fid-samples 0", "--num-fid-samples is 0, expected 1 to"),
        ("--num-fid-samples -3", "--num-fid-samples is -3"),
        ("--per-proc-batch-size 0", "--per-proc-batch-size is 0"),
        ("--global-seed 18446744073709551616", "--global-seed is 18446744073709551616"),
        ("--num-fid-samples many", "--num-fid-samples: invalid int value: 'many'"),
        ("--num-sampling-steps 0", "--num-sampling-steps is 0, expected 1 to 1000"),
        ("--num-sampling-steps abc", "--num-sampling-steps: invalid int value: 'abc'"),
        ("--format gif", "--format: invalid choice: 'gif'"),
        ("--cfg-scale nan", "--cfg-scale is nan"),
        ("--ckpt nowhere.safetensors", "no file nowhere.safetensors"),
        ("--base nowhere.pt", "nowhere.pt"),
        ("--num-sampling-steps 1001", "--num-sampling-steps is 1001, expected 1 to 1000"),
        ("--cfg-scale inf", "--cfg-scale is inf"),
        ("--guidance-interval 5 4", "--guidance-interval is 5 4"),
        ("--guidance null", "no null row"),
        ("--mixed-precision fp16", "expected a GPU"),
        ("--name a/b", "--name is a/b, expected the name of a folder"),
        ("--name ..", "--name is .., expected the name of a folder"),
    ],
)
def test_bad_flags(flags, words, here, tmp_path):
    before = tree(tmp_path)
    refused(here("x", *flags.split()), words)
    assert tree(tmp_path) == before


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize(
    "command_of, flag, advice",
    [
        ("load", [], "full while weights are loaded (CUDA out of memory), expected room: stop other programs"),
        (sample, ["--batch-size", 4], "4 images in a forward pass (CUDA out of memory), expected .* --batch-size 2."),
        (sample, ["--batch-size", 1], "1 images in a forward pass (CUDA out of memory), expected .* --mixed-precision"),
        (sample_ddp, [], "1 images in a forward pass (CUDA out of memory), expected room: pass --mixed-precision bf16"),
    ],
)
def test_full_gpu_memory(command_of, flag, advice, command, adapter, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 31.7"
        )

    if command_of == "load":
        monkeypatch.setattr(DiT, "to", full)
        command_of = sample
    else:
        monkeypatch.setattr(command_of, "sample_keyed", full)
    result = command(command_of.main, "--ckpt", adapter, "--sample-dir", tmp_path / "out", *flag)
    assert result.code == 2 and re.search(advice.replace("(", r"\(").replace(")", r"\)"), result.err.split("\n")[-2])


def test_the_precision_in_use_is_recorded(here, tmp_path, monkeypatch):
    """A V100 computes in fp16 for bf16: an A100 must not resume its folder in bf16."""
    assert here("x").code == 0
    assert json.loads((tmp_path / "x/settings.json").read_text())["mixed_precision"] == "no"
    monkeypatch.setattr(sample_ddp, "resolve_precision", lambda wanted, device: "bf16" if wanted == "auto" else wanted)
    refused(here("x"), "was begun with other settings (mixed_precision no, here bf16)")


@pytest.mark.reliability(*ROW)
def test_more_processes_than_images(run, tmp_path):
    assert run("x", "--num-fid-samples", 2, world=3) == 2
    words = "3 processes are more than --num-fid-samples 2: start as many as there are images, or fewer."
    said = [(tmp_path / f"err{rank}").read_text() for rank in range(3)]
    for text in filter(None, said):  # a process that the launcher killed may have printed nothing
        refused(SimpleNamespace(code=2, err=text), words)
    assert any(said)
    assert not (tmp_path / "x").exists()


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize(
    "flags, words",
    [
        ((), "x holds files but no settings.json"),
        (("--ckpt", "nowhere.pt"), "nowhere.pt"),
        (("--cfg-scale", "nan"), "--cfg-scale is nan"),
        (("--colour",), "unrecognized arguments: --colour"),
    ],
)
def test_on_two_processes_one_of_them_says_what_is_wrong(adapter, tmp_path, flags, words):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/other.txt").touch()
    flags = ("--ckpt", adapter, "--sample-dir", tmp_path, "--name", "x", *flags)
    assert launch(sample_ddp.main, flags, tmp_path, world=2, patience=30) == {0: 2, 1: 2}
    refused(SimpleNamespace(code=2, err=(tmp_path / "err0").read_text()), words)
    assert (tmp_path / "err1").read_text() == ""


@pytest.mark.reliability(*ROW)
def test_a_folder_with_other_settings_is_refused_and_the_differences_named(here, adapter, tmp_path):
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


@pytest.mark.reliability(*ROW)
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
    refused(here("z"), "z holds 12 PNGs, expected 11: remove the files that do not belong to this run.")


@pytest.mark.reliability(*ROW)
def test_two_launches_into_one_folder(here, tmp_path):
    assert here("x").code == 0
    store = Store(tmp_path / "x", balanced_labels(11, 5), NAMES, 8, "both")
    store.prepare(json.loads((tmp_path / "x/settings.json").read_text()))
    refused(here("x"), "Another process is sampling into")
    store.close()
    assert here("x").code == 0


def test_the_lock_file_of_a_killed_launch_is_not_foreign(here, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/.lock").touch()  # killed before it wrote settings.json
    assert here("x").code == 0
    assert not (tmp_path / "x/.lock").exists()


@pytest.mark.reliability(*ROW)
def test_a_disk_that_is_too_small_is_refused_before_the_first_sample(here, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_ddp, "sample_keyed", None)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 11 * 8 * 8 * 3 - 1))
    before = tree(tmp_path)
    for form in ("npz", "both"):
        refused(
            here("x", "--format", form), "GB more and has 4.22e-06 GB free: make room, or choose another --sample-dir"
        )
    assert tree(tmp_path) == before
    monkeypatch.undo()
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 11 * 8 * 8 * 3))
    assert here("x", "--format", "npz").code == 0


def test_the_room_needed_is_that_of_the_files_still_to_be_written(tmp_path, monkeypatch):
    """100,000 images of 256 pixels: 19.7 GB of rows, and as much for the npz beside them."""
    asked = []
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=39.3e9))
    with pytest.raises(ValueError, match="needs about 39.3 GB more and has 39.3 GB free"):
        Store(tmp_path / "a/b/x", np.zeros(100_000), ["a"], 256, "npz").check_room()
    assert asked == [tmp_path]
    (tmp_path / "x").mkdir()
    (tmp_path / "x/rows").write_bytes(b"\1" * 30_000_000)
    Store(tmp_path / "x", np.zeros(100_000), ["a"], 256, "npz").check_room()


@pytest.mark.reliability(*ODD)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_sample_that_is_not_finite_is_named_and_not_written(value, here, tmp_path, monkeypatch):
    real = sample_ddp.sample_keyed

    def broken(model, labels, keys, *rest, **options):
        latents = real(model, labels, keys, *rest, **options)
        latents[[key == (6, 7) for key in keys], 1, 2, 3] = float(value)
        return latents

    monkeypatch.setattr(sample_ddp, "sample_keyed", broken)
    result = here("x", "--global-seed", 6)
    refused(result, f"Image 7 of seed 6 (class {balanced_labels(8, 5)[7]}) is not finite, expected finite pixels")
    numbers = sorted(int(path.stem) for path in (tmp_path / "x").rglob("*.png"))
    assert numbers == list(range(7)) and not (tmp_path / "x.npz").exists()
    monkeypatch.undo()
    assert here("x", "--global-seed", 6).code == 0
    assert len(list((tmp_path / "x").rglob("*.png"))) == 11


@pytest.mark.reliability(*ODD)
def test_a_number_of_images_that_does_not_divide_and_a_cut_png(run, tmp_path):
    assert run("x", world=3) == 0
    before = files(tmp_path, "x")
    assert sum(name.endswith(".png") for name in before) == 11
    path = next((tmp_path / "x/pug").iterdir())
    path.write_bytes(path.read_bytes()[:-20])
    assert run("x", world=2) == 0
    said = "".join((tmp_path / f"err{rank}").read_text() for rank in range(2))
    assert said.count(f"{path} is damaged and will be sampled again.") == 1 and files(tmp_path, "x") == before
