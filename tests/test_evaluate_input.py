"""What evaluate.py refuses, and what it says may be wrong: folders, npz files, statistics, flags."""

import io
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from helpers import image_sets as painted
from helpers.image_sets import PLAIN, npz, pixels, run
from helpers.refusals import ODD, ROW, refused, write_png
from helpers.tiny_files import CLASSES, tree
from PIL import Image

import evaluate
from dataset.images import center_crop
from evaluation import features
from evaluation.image_sets import open_set
from evaluation.metrics import Gaussian
from evaluation.npz_sets import save_statistics

world, statistics = painted.world, painted.statistics


def refuse(command, tmp_path, words, *flags):
    """The program says so, and nothing is written."""
    before = tree(tmp_path)
    refused(command(evaluate.main, *flags, "--output", tmp_path / "never/out"), *words)
    assert tree(tmp_path) == before


def damaged(path, data=b"not an image"):
    path.write_bytes(data)


def white_folder(path):
    path.mkdir()
    white(path / "0.png")


def white(path):
    Image.new("RGB", (40, 40), "white").save(path)


FOLDERS = {  # name: (what happens to the copy of `fake`, words of the sentence)
    "no such folder": (lambda fake: shutil.rmtree(fake), ["There is no", "expected a folder"]),
    "an empty folder": (lambda fake: (shutil.rmtree(fake), fake.mkdir()), ["has no images in it"]),
    "no class folders": (
        lambda fake: (shutil.rmtree(fake), white_folder(fake)),
        ["has no classes", "expected class folders", "--hierarchy none"],
    ),
    "empty class folders": (lambda fake: [path.unlink() for path in fake.glob("*/*/*")], ["has no images in it"]),
    "one image": (
        lambda fake: [path.unlink() for path in sorted(fake.glob("*/*/*"))[1:]],
        ["has 1 image", "at least 2"],
    ),
    "one superclass": (
        lambda fake: shutil.rmtree(fake / "dogs"),
        ["no images of 1 superclasses", "'dogs'", "both sides"],
    ),
    "an unknown class": (lambda fake: (fake / "dogs/pug").rename(fake / "dogs/wolf"), ["'wolf'", "--hierarchy"]),
    "an unreadable image": (lambda fake: damaged(fake / "cats/lynx/2.png"), ["Cannot read image", "2.png", "replace"]),
    "an empty image": (lambda fake: damaged(fake / "cats/lynx/2.png", b""), ["Cannot read image", "2.png"]),
    "images of two sizes": (
        lambda fake: Image.new("RGB", (44, 40)).save(fake / "dogs/pug/1.png"),
        ["pug/1.png has 44 x 40 pixels", "expected 40 x 40", "--image-size"],
    ),
    "an image that is not square": (
        lambda fake: Image.new("RGB", (44, 40)).save(fake / "cats/lynx/0.png"),
        ["lynx/0.png has 44 x 40 pixels", "expected a square"],
    ),
    "a picture of 400 million pixels": (
        lambda fake: write_png(fake / "cats/lynx/2.png", 20_000, 20_000, depth=1),
        ["Cannot read image", "2.png", "400000000 pixels"],
    ),
    "HTML": (lambda fake: damaged(fake / "cats/lynx/2.png", b"<!DOCTYPE html>"), ["Cannot read image", "2.png"]),
    "a file": (lambda fake: (shutil.rmtree(fake), fake.touch()), ["is a file, expected a folder of images"]),
    "no settings": (lambda fake: (fake / "settings.json").write_text("{"), ["settings.json is no JSON"]),
}


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize("name", FOLDERS)
def test_bad_folders(world, command, tmp_path, name):
    change, words = FOLDERS[name]
    shutil.copytree(world / "fake", tmp_path / "fake")
    change(tmp_path / "fake")
    refuse(command, tmp_path, words, world / "real", tmp_path / "fake", *PLAIN, "--features", world / "tiles.pt")


@pytest.mark.reliability(*ROW)
def test_a_superclass_that_the_real_images_lack(world, command, tmp_path):
    shutil.copytree(world / "real", tmp_path / "real")
    shutil.rmtree(tmp_path / "real/dogs")
    both = tmp_path / "real", world / "fake", "--hierarchy", world / "real"
    words = ["real has no images of 1 superclasses that", "fake has ('dogs')", "both sides"]
    refuse(command, tmp_path, words, *both, *PLAIN, "--features", world / "tiles.pt")


@pytest.mark.reliability(*ROW)
def test_weights_of_another_hash(world, command, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth").write_bytes(b"other weights")
    words = ["alexnet-owt-7be5be79.pth has the SHA-256", "expected 7be5be79", "--lpips-trunk"]
    refuse(command, tmp_path, words, world / "real", world / "fake", *PLAIN[:4])


@pytest.mark.reliability(*ROW)
def test_an_unreadable_image_in_a_worker(world, command, tmp_path):
    shutil.copytree(world / "fake", tmp_path / "fake")
    damaged(tmp_path / "fake/cats/lynx/2.png")
    flags = ("--num-workers", 1, *PLAIN[2:], "--features", world / "tiles.pt")
    refuse(command, tmp_path, ["Cannot read image", "2.png"], world / "real", tmp_path / "fake", *flags)


@pytest.mark.reliability(*ROW)
def test_features_that_are_not_finite_name_the_image(world, command, tmp_path):
    shutil.copytree(world / "fake", tmp_path / "fake")
    white(tmp_path / "fake/dogs/pug/3.png")
    words = ["undefined features of", "pug/3.png", "not finite", "expected"]
    flags = (*PLAIN, "--features", world / "undefined.pt")
    refuse(command, tmp_path, words, world / "real", tmp_path / "fake", *flags)


SQUARE = np.zeros((4, 8, 8, 3), np.uint8)
ARCHIVES = {  # name: (arrays of FAKE.npz, words)
    "missing keys": ({"images": SQUARE}, ["holds 'images'", "expected images in arr_0"]),
    "objects": ({"arr_0": np.array([None, "x"], dtype=object)}, ["arr_0 of object", "expected uint8"]),
    "floats": ({"arr_0": SQUARE / 255}, ["arr_0 of float64", "expected uint8"]),
    "channels first": ({"arr_0": SQUARE.transpose(0, 3, 1, 2)}, ["(4, 3, 8, 8)", "expected uint8 (N, H, W, 3)"]),
    "no images": ({"arr_0": SQUARE[:0]}, ["has no images"]),
    "labels of other length": ({"arr_0": SQUARE, "arr_1": np.zeros(3, int)}, ["labels of the shape (3,)"]),
    "labels that are text": ({"arr_0": SQUARE, "arr_1": np.array(list("abcd"))}, ["of the type", "plain numbers"]),
    "labels outside the range": (
        {"arr_0": SQUARE, "arr_1": np.array([0, 1, 2, 5])},
        ["the label 5", "expected 0 to 4"],
    ),
    "labels below the range": ({"arr_0": SQUARE, "arr_1": np.array([0, 1, 2, -1])}, ["the label -1"]),
    "labels of objects": (
        {"arr_0": SQUARE, "arr_1": np.array([0, 1, 2, None], dtype=object)},
        ["'arr_1' of the type object", "expected plain numbers"],
    ),
    "one image": ({"arr_0": SQUARE[:1], "arr_1": np.zeros(1, int)}, ["has 1 image", "at least 2"]),
    "no labels": ({"arr_0": SQUARE}, ["has no classes", "--hierarchy none"]),
    "only mu": ({"mu": np.zeros(12)}, ["does not say"]),
}


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize("name", ARCHIVES)
def test_bad_npz_files(world, command, tmp_path, name):
    arrays, words = ARCHIVES[name]
    np.savez(tmp_path / "fake.npz", **arrays)
    refuse(command, tmp_path, words, world / "real", tmp_path / "fake.npz", *PLAIN, "--features", world / "tiles.pt")


def test_labels_without_a_hierarchy(world, command, tmp_path):
    for side in ("real", "fake"):
        npz(world, tmp_path / f"{side}.npz", side=side)
    both = (tmp_path / "real.npz", tmp_path / "fake.npz", *PLAIN, "--features", world / "tiles.pt", "--image-size", 40)
    refuse(command, tmp_path, ["superclass", "only numbers", "expected --hierarchy"], *both)
    _, found = run(command, tmp_path / "out", *both, "--hierarchy", world / "real")
    assert list(found["superclasses"]) == list(CLASSES)


STATISTICS = {  # name: (arrays of REAL.npz, words)
    "no sigma": ({"mu": np.zeros(12)}, ["holds 'mu'", "expected 'sigma'"]),
    "shapes": ({"mu": np.zeros(12), "sigma": np.eye(11)}, ["sigma (11, 11)", "expected (d,) and (d, d)"]),
    "NaN": ({"mu": np.zeros(12), "sigma": np.full((12, 12), np.nan)}, ["not finite"]),
    "one NaN": ({"mu": np.array([np.nan] + [0.0] * 11), "sigma": np.eye(12)}, ["not finite"]),
    "infinity": ({"mu": np.zeros(12), "sigma": np.diag([np.inf] + [1.0] * 11)}, ["not finite"]),
    "objects": ({"mu": np.array([None] * 12), "sigma": np.eye(12)}, ["'mu' of the type object"]),
    "another dimension": ({"mu": np.zeros(8), "sigma": np.eye(8)}, ["of 8 numbers", "expected the 12 of tiles"]),
}


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize("name", STATISTICS)
def test_bad_statistics(world, command, tmp_path, name):
    arrays, words = STATISTICS[name]
    np.savez(tmp_path / "real.npz", **arrays)
    flags = (*PLAIN, "--features", world / "tiles.pt", "--trust-stats", "--hierarchy", "none")
    refuse(command, tmp_path, words, tmp_path / "real.npz", world / "fake", *flags)


@pytest.mark.reliability(*ROW)
def test_damaged_npz_files(world, command, tmp_path):
    path = tmp_path / "fake.npz"
    flags = (world / "real", path, *PLAIN, "--features", world / "tiles.pt")
    refuse(command, tmp_path, ["There is no file"], *flags)
    whole = npz(world, path).read_bytes()
    for content in (b"", b"<html></html>", whole[: len(whole) // 2]):
        path.write_bytes(content)
        refuse(command, tmp_path, ["fake.npz is damaged or no .npz file"], *flags)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (20, 40, 40, 3)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(1000))
    refuse(command, tmp_path, ["fake.npz is damaged or no .npz file"], *flags)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", "no array")
    refuse(command, tmp_path, ["fake.npz is damaged or no .npz file"], *flags)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:  # 100 GB of zeros, says the header
        with archive.open("arr_0.npy", "w") as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (500_000, 256, 256, 3)}
            np.lib.format.write_array_header_1_0(stream, header)
    refuse(command, tmp_path, ["fake.npz is damaged or no .npz file", "(500000, 256, 256, 3)"], *flags)


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize(
    "flags, words",
    [
        (("--batch-size", 0), ["--batch-size is 0, expected 1"]),
        (("--seed", 2**64), ["--seed is", "expected 0"]),
        (("--image-size", -1), ["--image-size is -1"]),
        (("--save-stats", "stats.txt"), ["stats.txt", "ends in .npz"]),
        (("--inception", "nowhere.pth"), ["There is no file nowhere.pth"]),
        (("--features", "nowhere.pt"), ["nowhere.pt"]),
        (("--hierarchy", "vegfru"), ["VegFru"]),
        (("--batch-size", "many"), ["--batch-size: invalid int value: 'many'"]),
        (("--resize", "nearest"), ["--resize: invalid choice: 'nearest'"]),
        (("--no-such-flag",), ["unrecognized arguments: --no-such-flag"]),
        ((), ["No network was named"]),
    ],
)
def test_bad_flags(world, command, tmp_path, flags, words):
    refuse(command, tmp_path, words, world / "real", world / "fake", *PLAIN, *flags)


@pytest.mark.reliability(*ROW)
def test_outputs_that_cannot_be_written(world, command, tmp_path):
    (tmp_path / "file").write_text("")
    flags = (world / "real", world / "fake", *PLAIN, "--features", world / "tiles.pt")
    for more in (("--output", tmp_path / "file"), ("--save-stats", tmp_path / "file/stats.npz")):
        before = tree(tmp_path)
        result = command(evaluate.main, *flags, *more)
        assert result.code == 2 and "file cannot be written" in result.err and tree(tmp_path) == before


@pytest.mark.reliability(*ROW)
def test_flags_that_do_not_go_together(world, command, tmp_path):
    real, tiles, reader = world / "real", world / "tiles.pt", world / "reader.pt"
    refuse(command, tmp_path, ["There is no FAKE"], real, *PLAIN, "--features", tiles)
    refuse(command, tmp_path, ["no features to save"], real, *PLAIN, "--save-stats", tmp_path / "s.npz")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2), sigma=np.eye(2))
    again = (tmp_path / "stats.npz", "--trust-stats", "--save-stats", tmp_path / "s.npz")
    refuse(command, tmp_path, ["holds statistics", "expected images"], *again)
    refuse(command, tmp_path, ["a network 'tiles'"], real, world / "fake", *PLAIN, "--features", tiles, tiles)
    refuse(command, tmp_path, ["12 classes, expected the 5"], real, world / "fake", *PLAIN, "--classifier", tiles)
    flat = (real, world / "fake", *PLAIN, "--classifier", reader, "--hierarchy", "none")
    refuse(command, tmp_path, ["no classes", "drop the flag"], *flat)
    shutil.copy(tiles, tmp_path / "inception.pt")
    refuse(command, tmp_path, ["'inception'"], real, world / "fake", *PLAIN, "--features", tmp_path / "inception.pt")


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize(
    "change, words",
    [
        ({"network": {"name": "tiles", "weights": "0" * 64}}, ["made with weights 0000", "expected "]),
        ({"network": {"name": "other"}}, ["made with name other, expected tiles"]),
        ({"crop": 64}, ["expected 64 x 64"]),
        ({"crop": None}, ["made with crop None, expected 40"]),
        ({"format": "another"}, ["does not say by which network"]),
    ],
)
def test_statistics_made_otherwise_are_refused(world, command, tmp_path, statistics, change, words):
    with np.load(statistics) as file:
        arrays = dict(file)
    arrays["record"] = json.dumps(json.loads(str(arrays["record"])) | change)
    np.savez(tmp_path / "changed.npz", **arrays)
    flags = (*PLAIN, "--features", world / "tiles.pt")
    refuse(command, tmp_path, words, tmp_path / "changed.npz", world / "fake", *flags)


def test_another_resize_is_refuse(command, tmp_path):
    record = {"network": {"name": "inception", "weights": "random", "resize": "pytorch"}, "crop": 40}
    save_statistics(tmp_path / "stats.npz", {None: Gaussian(9, torch.zeros(4), torch.eye(4))}, record)
    with pytest.raises(ValueError, match="made with resize pytorch, expected tf1"):
        open_set(tmp_path / "stats.npz").check(features.inception().record, 40)


def test_foreign_statistics_are_trusted_on_request(world, command, tmp_path):
    network = torch.jit.load(world / "tiles.pt")
    real = network(torch.cat(list(pixels(world / "real").values()))).double()
    np.savez(tmp_path / "foreign.npz", mu=real.mean(0), sigma=torch.cov(real.T))
    flags = (*PLAIN, "--features", world / "tiles.pt", "--hierarchy", "none")
    refuse(command, tmp_path, ["does not say", "--trust-stats"], tmp_path / "foreign.npz", world / "fake", *flags)
    _, found = run(command, tmp_path / "out", tmp_path / "foreign.npz", world / "fake", *flags, "--trust-stats")
    assert found["overall"]["n_real"] is None and not found["comparable"]
    assert found["overall"]["features"]["tiles"]["fd"] > 0


# ---- what may be wrong ---------------------------------------------------------------------------


@pytest.mark.reliability(*ODD)
def test_doubtful_images_are_told(world, command, tmp_path):
    for side in ("real", "fake"):
        shutil.copytree(world / side, tmp_path / side)
    shutil.copy(tmp_path / "fake/cats/lynx/0.png", tmp_path / "fake/cats/lynx/copy.png")
    shutil.rmtree(tmp_path / "fake/dogs/pug")
    for i in (1, 2, 3):
        (tmp_path / f"fake/cats/manx/{i}.png").unlink()
    real = tmp_path / "real/cats/lynx/0.png"
    Image.open(real).convert("RGB").save(real.with_suffix(".jpg"))
    real.unlink()
    center_crop(Image.open(tmp_path / "real/dogs/pug/0.png"), 40).save(tmp_path / "fake/dogs/beagle/stolen.png")
    flags = (*PLAIN, "--features", world / "tiles.pt")
    result, found = run(command, tmp_path / "out", tmp_path / "real", tmp_path / "fake", *flags)
    assert result.code == 0, result.err
    for words in (
        "1 files of .*real were compressed with loss",
        "1 images of .*fake are exact copies of others",
        "1 images of .*fake are exact copies of images of .*real",
        r"fake has no images of 1 classes of .*real \('pug'\)",
        "1 classes of .*fake have one image",
    ):
        assert any(re.search(words, note) for note in found["notes"]), (words, found["notes"])
    assert all(note in result.out for note in found["notes"])
