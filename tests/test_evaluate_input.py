"""Bad input of evaluate.py: folders, .npz files, statistics and flags that it refuses, and images that it doubts."""

import io
import json
import re
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import image_sets
from helpers.image_sets import NO_NETWORKS, assert_refused, run, save_npz
from helpers.launch import launch
from helpers.refusals import ODD, ROW, refused, write_png
from helpers.tiny_files import CLASSES, tree
from PIL import Image

import evaluate
from dataset.images import center_crop
from evaluation.image_sets import open_set

sets, saved_statistics = image_sets.sets, image_sets.saved_statistics


def overwrite(path, data=b"not an image"):
    path.write_bytes(data)


def write_white_image(path):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (40, 40), "white").save(path)


FOLDERS = {  # name: (change to the copy of `fake`, words of the sentence)
    "no such folder": (lambda fake: shutil.rmtree(fake), ["There is no", "expected a folder"]),
    "an empty folder": (lambda fake: (shutil.rmtree(fake), fake.mkdir()), ["has no images in it"]),
    "no class folders": (
        lambda fake: (shutil.rmtree(fake), write_white_image(fake / "0.png")),
        ["has no classes", "expected class folders", "--hierarchy none"],
    ),
    "empty class folders": (lambda fake: [path.unlink() for path in fake.glob("*/*/*")], ["has no images in it"]),
    "one image": (
        lambda fake: [path.unlink() for path in sorted(fake.glob("*/*/*"))[1:]],
        ["has 1 image", "at least 2"],
    ),
    "one superclass": (
        lambda fake: shutil.rmtree(fake / "dogs"),
        ["no images of 1 superclasses", "'dogs'", "both sets"],
    ),
    "an unknown class": (lambda fake: (fake / "dogs/pug").rename(fake / "dogs/wolf"), ["'wolf'", "--hierarchy"]),
    "unreadable images": (
        lambda fake: [overwrite(fake / f"cats/lynx/{i}.png") for i in (0, 2)],
        ["2 images cannot be read (", "lynx/0.png", "lynx/2.png), expected at most 1: replace", "--max-bad-images"],
    ),
    "no readable image": (
        lambda fake: [overwrite(path) for path in fake.glob("*/*/*")],
        ["Cannot read image", "0.png"],
    ),
    "images of two sizes": (
        lambda fake: Image.new("RGB", (44, 40)).save(fake / "dogs/pug/1.png"),
        ["pug/1.png has 44 x 40 pixels", "expected 40 x 40", "--image-size"],
    ),
    "an image that is not square": (
        lambda fake: Image.new("RGB", (44, 40)).save(fake / "cats/lynx/0.png"),
        ["lynx/0.png has 44 x 40 pixels", "expected a square"],
    ),
    "an image of 400 million pixels": (
        lambda fake: [write_png(fake / f"cats/lynx/{i}.png", 20_000, 20_000, depth=1) for i in (2, 3)],
        ["2 images cannot be read (", "2.png"],
    ),
    "a class under two superclasses": (
        lambda fake: shutil.copytree(fake / "cats/lynx", fake / "dogs/lynx"),
        ["Class 'lynx' is in", "cats and in", "dogs: rename one"],
    ),
    "a file": (lambda fake: (shutil.rmtree(fake), fake.touch()), ["is a file, expected a folder of images"]),
    "no settings": (lambda fake: (fake / "settings.json").write_text("{"), ["settings.json is not JSON"]),
    "half sampled": (
        lambda fake: (fake / "settings.json").write_text(json.dumps({"num_fid_samples": 40})),
        ["has 20 images, but sample_ddp.py was to make 40", "run the same sample_ddp.py command again"],
    ),
}


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize("name", FOLDERS)
def test_bad_folders_are_refused(sets, command, tmp_path, name):
    change, words = FOLDERS[name]
    shutil.copytree(sets / "fake", tmp_path / "fake")
    change(tmp_path / "fake")
    assert_refused(
        command, tmp_path, words, sets / "real", tmp_path / "fake", *NO_NETWORKS, "--features", sets / "tiles.pt"
    )


@pytest.mark.reliability(*ROW)
def test_a_superclass_missing_from_the_real_set_is_refused(sets, command, tmp_path):
    shutil.copytree(sets / "real", tmp_path / "real")
    shutil.rmtree(tmp_path / "real/dogs")
    both = tmp_path / "real", sets / "fake", "--hierarchy", sets / "real"
    words = ["real has no images of 1 superclasses that", "fake has ('dogs')", "both sets"]
    assert_refused(command, tmp_path, words, *both, *NO_NETWORKS, "--features", sets / "tiles.pt")


@pytest.mark.reliability(*ROW)
def test_weights_of_another_hash_are_refused(sets, command, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth").write_bytes(b"other weights")
    words = ["alexnet-owt-7be5be79.pth has the SHA-256", "expected 7be5be79", "--lpips-trunk"]
    assert_refused(command, tmp_path, words, sets / "real", sets / "fake", *NO_NETWORKS[:4])


@pytest.mark.reliability(*ROW)
def test_an_unreadable_image_in_a_worker_is_refused(sets, command, tmp_path):
    shutil.copytree(sets / "fake", tmp_path / "fake")
    overwrite(tmp_path / "fake/cats/lynx/2.png")
    flags = ("--num-workers", 1, *NO_NETWORKS[2:], "--features", sets / "tiles.pt", "--max-bad-images", 0)
    words = ["1 images cannot be read (", "2.png), expected at most 0"]
    assert_refused(command, tmp_path, words, sets / "real", tmp_path / "fake", *flags)


@pytest.mark.reliability(*ODD)
def test_an_unreadable_image_is_left_out(sets, command, tmp_path):
    """The metrics are those without its file, also if it would set the size of the images."""
    for name in ("fake", "without"):
        shutil.copytree(sets / "fake", tmp_path / name)
    overwrite(tmp_path / "fake/cats/lynx/0.png", b"<!DOCTYPE html>")
    (tmp_path / "without/cats/lynx/0.png").unlink()
    both = []
    for name in ("fake", "without"):
        flags = (
            *NO_NETWORKS,
            "--features",
            sets / "tiles.pt",
            "--classifier",
            sets / "classifier.pt",
            "--batch-size",
            7,
        )
        result, found = run(command, tmp_path / f"{name} out", sets / "real", tmp_path / name, *flags)
        assert result.code == 0 and found["overall"]["n_fake"] == 19, result.err
        both.append(found)
    found, expected = both
    rows = [(report["overall"], *report["superclasses"].values()) for report in both]
    for a, b in zip(*rows):
        assert a["top1"] == b["top1"] and a["superclass_accuracy"] == b["superclass_accuracy"]
        assert a["features"]["tiles"]["fd"] == pytest.approx(b["features"]["tiles"]["fd"], rel=1e-9)
    name = str(tmp_path / "fake/cats/lynx/0.png")
    assert found["fake"]["unreadable"] == [name] and found["real"]["unreadable"] == []
    assert any(f"1 images of {tmp_path}/fake cannot be read and are left out ({name})" in n for n in found["notes"])


@pytest.mark.reliability(*ROW)
def test_non_finite_features_name_the_image(sets, command, tmp_path):
    shutil.copytree(sets / "fake", tmp_path / "fake")
    write_white_image(tmp_path / "fake/dogs/pug/3.png")
    words = ["non_finite features of", "pug/3.png", "non-finite", "expected"]
    flags = (*NO_NETWORKS, "--features", sets / "non_finite.pt")
    assert_refused(command, tmp_path, words, sets / "real", tmp_path / "fake", *flags)


SQUARE = np.zeros((4, 8, 8, 3), np.uint8)  # 4 images of 8 pixels
ARCHIVES = {  # name: (arrays of FAKE.npz, words)
    "missing keys": ({"images": SQUARE}, ["holds 'images'", "expected images in arr_0"]),
    "objects": ({"arr_0": np.array([None, "x"], dtype=object)}, ["arr_0 of object", "expected uint8"]),
    "floats": ({"arr_0": SQUARE / 255}, ["arr_0 of float64", "expected uint8"]),
    "channels first": ({"arr_0": SQUARE.transpose(0, 3, 1, 2)}, ["(4, 3, 8, 8)", "expected uint8 (N, H, W, 3)"]),
    "no images": ({"arr_0": SQUARE[:0]}, ["has no images"]),
    "labels of another length": ({"arr_0": SQUARE, "arr_1": np.zeros(3, int)}, ["labels of the shape (3,)"]),
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
def test_bad_npz_files_are_refused(sets, command, tmp_path, name):
    arrays, words = ARCHIVES[name]
    np.savez(tmp_path / "fake.npz", **arrays)
    assert_refused(
        command, tmp_path, words, sets / "real", tmp_path / "fake.npz", *NO_NETWORKS, "--features", sets / "tiles.pt"
    )


def test_labels_without_a_hierarchy_are_refused(sets, command, tmp_path):
    for name in ("real", "fake"):
        save_npz(sets, tmp_path / f"{name}.npz", name=name)
    both = (
        tmp_path / "real.npz",
        tmp_path / "fake.npz",
        *NO_NETWORKS,
        "--features",
        sets / "tiles.pt",
        "--image-size",
        40,
    )
    assert_refused(command, tmp_path, ["superclasses", "only numbers", "expected --hierarchy"], *both)
    _, found = run(command, tmp_path / "out", *both, "--hierarchy", sets / "real")
    assert list(found["superclasses"]) == list(CLASSES)


STATISTICS = {  # name: (arrays of REAL.npz, words)
    "no sigma": ({"mu": np.zeros(12)}, ["holds 'mu'", "expected 'sigma'"]),
    "shapes": ({"mu": np.zeros(12), "sigma": np.eye(11)}, ["sigma (11, 11)", "expected (d,) and (d, d)"]),
    "NaN": ({"mu": np.zeros(12), "sigma": np.full((12, 12), np.nan)}, ["non-finite"]),
    "one NaN": ({"mu": np.array([np.nan] + [0.0] * 11), "sigma": np.eye(12)}, ["non-finite"]),
    "infinity": ({"mu": np.zeros(12), "sigma": np.diag([np.inf] + [1.0] * 11)}, ["non-finite"]),
    "objects": ({"mu": np.array([None] * 12), "sigma": np.eye(12)}, ["'mu' of the type object"]),
    "another dimension": ({"mu": np.zeros(8), "sigma": np.eye(8)}, ["of 8 dimensions", "expected the 12 of tiles"]),
}


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize("name", STATISTICS)
def test_bad_statistics_are_refused(sets, command, tmp_path, name):
    arrays, words = STATISTICS[name]
    np.savez(tmp_path / "real.npz", **arrays)
    flags = (*NO_NETWORKS, "--features", sets / "tiles.pt", "--trust-stats", "--hierarchy", "none")
    assert_refused(command, tmp_path, words, tmp_path / "real.npz", sets / "fake", *flags)


@pytest.mark.reliability(*ROW)
def test_damaged_npz_files_are_refused(sets, command, tmp_path):
    path = tmp_path / "fake.npz"
    flags = (sets / "real", path, *NO_NETWORKS, "--features", sets / "tiles.pt")
    assert_refused(command, tmp_path, ["There is no file"], *flags)
    intact = save_npz(sets, path).read_bytes()
    for content in (b"", b"<html></html>", intact[: len(intact) // 2]):
        path.write_bytes(content)
        assert_refused(command, tmp_path, ["fake.npz is damaged or not an .npz file"], *flags)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (20, 40, 40, 3)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(1000))
    assert_refused(command, tmp_path, ["fake.npz is damaged or not an .npz file"], *flags)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", "no array")
    assert_refused(command, tmp_path, ["fake.npz is damaged or not an .npz file"], *flags)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:  # the header promises 100 GB of zeros
        with archive.open("arr_0.npy", "w") as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (500_000, 256, 256, 3)}
            np.lib.format.write_array_header_1_0(stream, header)
    assert_refused(command, tmp_path, ["fake.npz is damaged or not an .npz file", "(500000, 256, 256, 3)"], *flags)


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize(
    "flags, words",
    [
        (("--batch-size", 0), ["--batch-size is 0, expected 1"]),
        (("--max-bad-images", -1), ["--max-bad-images is -1, expected 0"]),
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
def test_bad_flags_are_refused(sets, command, tmp_path, flags, words):
    assert_refused(command, tmp_path, words, sets / "real", sets / "fake", *NO_NETWORKS, *flags)


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize("flags", [("--inception", "nowhere.pth"), ("--batch-size", 0), ("--no-such-flag",)])
def test_on_two_processes_one_of_them_says_what_is_wrong(sets, tmp_path, flags):
    flags = (sets / "real", sets / "fake", *NO_NETWORKS, "--features", sets / "tiles.pt", *flags)
    assert launch(evaluate.main, flags, tmp_path, world=2, patience=30) == {0: 2, 1: 2}
    first, other = (SimpleNamespace(code=2, err=(tmp_path / f"err{rank}").read_text()) for rank in (0, 1))
    refused(first, str(flags[-1]) if flags[-1] != 0 else "--batch-size is 0")
    assert other.err == ""


@pytest.mark.reliability(*ROW)
def test_outputs_that_cannot_be_written_are_refused(sets, command, tmp_path):
    (tmp_path / "file").write_text("")
    flags = (sets / "real", sets / "fake", *NO_NETWORKS, "--features", sets / "tiles.pt")
    for more in (("--output", tmp_path / "file"), ("--save-stats", tmp_path / "file/stats.npz")):
        before = tree(tmp_path)
        result = command(evaluate.main, *flags, *more)
        assert result.code == 2 and "file cannot be written" in result.err and tree(tmp_path) == before


@pytest.mark.reliability(*ROW)
def test_contradictory_flags_are_refused(sets, command, tmp_path):
    real, tiles, classifier = sets / "real", sets / "tiles.pt", sets / "classifier.pt"
    assert_refused(command, tmp_path, ["There is no FAKE"], real, *NO_NETWORKS, "--features", tiles)
    assert_refused(command, tmp_path, ["no features to save"], real, *NO_NETWORKS, "--save-stats", tmp_path / "s.npz")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2), sigma=np.eye(2))
    again = (tmp_path / "stats.npz", "--trust-stats", "--save-stats", tmp_path / "s.npz")
    assert_refused(command, tmp_path, ["holds statistics", "expected images"], *again)
    assert_refused(
        command, tmp_path, ["a second network 'tiles'"], real, sets / "fake", *NO_NETWORKS, "--features", tiles, tiles
    )
    assert_refused(
        command, tmp_path, ["12 classes, expected the 5"], real, sets / "fake", *NO_NETWORKS, "--classifier", tiles
    )
    halves = (tmp_path / "stats.npz", sets / "fake", "--trust-stats", "--hierarchy", "none", "--floor")
    assert_refused(command, tmp_path, ["holds statistics, expected images to halve for --floor"], *halves)
    both = (real, sets / "fake", *NO_NETWORKS, "--features", tiles, "--floor")
    assert_refused(command, tmp_path, ["--floor is", "expected a folder"], *both, tmp_path / "stats.npz")
    assert_refused(command, tmp_path, ["There is no", "expected a folder"], *both, tmp_path / "nowhere")
    flat = (real, sets / "fake", *NO_NETWORKS, "--classifier", classifier, "--hierarchy", "none")
    assert_refused(command, tmp_path, ["no classes", "drop the flag"], *flat)
    shutil.copy(tiles, tmp_path / "inception.pt")
    assert_refused(
        command, tmp_path, ["'inception'"], real, sets / "fake", *NO_NETWORKS, "--features", tmp_path / "inception.pt"
    )


# ---- layouts of folders --------------------------------------------------------------------------


def test_without_a_hierarchy_images_beside_folders_count_too(sets, tmp_path):
    shutil.copytree(sets / "fake/cats", tmp_path / "flat/cats")
    for name in ("1.png", "2.png", "grid.png"):
        write_white_image(tmp_path / "flat" / name)
    images = open_set(tmp_path / "flat")
    images.label(None)
    assert len(images) == 8 + 2 and not any("grid" in path for path in images.paths)


def test_a_folder_without_images_names_the_npz_beside_it(sets, tmp_path):
    (tmp_path / "samples").mkdir()
    save_npz(sets, tmp_path / "samples.npz")
    with pytest.raises(ValueError, match=r"samples has no images in it, expected some: name .*samples\.npz, which may"):
        open_set(tmp_path / "samples")


# ---- notes ---------------------------------------------------------------------------------------


@pytest.mark.reliability(*ODD)
def test_notes_about_the_images(sets, command, tmp_path):
    for name in ("real", "fake"):
        shutil.copytree(sets / name, tmp_path / name)
    shutil.copy(tmp_path / "fake/cats/lynx/0.png", tmp_path / "fake/cats/lynx/copy.png")
    shutil.copytree(tmp_path / "fake/dogs/pug_dog", tmp_path / "fake/cats/pug_dog")
    shutil.rmtree(tmp_path / "fake/dogs/pug_dog")
    for name in ("real/1.png", "fake/grid.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    small = Image.open(tmp_path / "real/dogs/beagle/0.png").resize((30, 30))
    small.save(tmp_path / "real/dogs/beagle/0.png")
    shutil.rmtree(tmp_path / "fake/dogs/pug")
    for i in (1, 2, 3):
        (tmp_path / f"fake/cats/manx/{i}.png").unlink()
    real = tmp_path / "real/cats/lynx/0.png"
    Image.open(real).convert("RGB").save(real.with_suffix(".jpg"))
    real.unlink()
    center_crop(Image.open(tmp_path / "real/dogs/pug/0.png"), 40).save(tmp_path / "fake/dogs/beagle/stolen.png")
    flags = (*NO_NETWORKS, "--features", sets / "tiles.pt")
    result, found = run(command, tmp_path / "out", tmp_path / "real", tmp_path / "fake", *flags)
    assert result.code == 0, result.err
    for words in (
        "1 files of .*real have lossy compression",
        "1 images of .*fake are exact copies of other images in it",
        "1 images of .*fake are exact copies of images of .*real",
        r"fake has no images of 1 classes of .*real \('pug'\)",
        "1 classes of .*fake have one image",
        "fake has 1 classes under another superclass than real \\('pug_dog' of 'dogs' under 'cats'\\)",
        "real has 1 images beside its class folders",
        "1 images of .*real are smaller than 40 pixels and were enlarged",
        "The classes have other shares in .*fake than in .*real: 3.% of the images",
        "2 rows have fewer than 12 images, the features of tiles \\('cats', 'dogs'\\)",
    ):
        assert any(re.search(words, note) for note in found["notes"]), (words, found["notes"])
    assert all(note in result.out for note in found["notes"])
