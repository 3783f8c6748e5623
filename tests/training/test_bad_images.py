"""Unusual folders of images: train.py ignores other files, warns, replaces unreadable images and converts formats."""

import io
import multiprocessing
import os
import resource
import shutil

import numpy as np
import pytest
import torch
from helpers.refusals import ODD, refused, write_png
from helpers.tiny_files import tree
from PIL import Image

import train
from dataset.images import ImageData, UnreadableImage, read_crop
from hierarchy import Hierarchy

PIXELS = "--model DiT-Ti/2 --vae none --image-size 8 --num-workers 0 --preview-images 0 --max-steps 1".split()


def random_pixels(width, height):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def encoded(kind):
    stream = io.BytesIO()
    Image.fromarray(random_pixels(64, 48)).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def trained(command, base, images, tmp_path):
    """trained(change, *flags) -> result of one step of train.py on all images, after change(image folder)."""

    def trained(change, *flags):
        change(shutil.copytree(images, tmp_path / "pets"))
        files = "--data-path", tmp_path / "pets", "--resume", base, "--results-dir", tmp_path / "out"
        before = tree(tmp_path / "pets")
        result = command(train.main, *PIXELS, *files, "--global-batch-size", 20, *flags)
        assert tree(tmp_path / "pets") == before
        return result

    return trained


# ---- other files, and names --------------------------------------------------------------------------------------


def hidden_files(pets):
    for name in (".DS_Store", "cats/.DS_Store", "cats/manx/._0.png", "cats/manx/notes.txt"):
        (pets / name).touch()
    for folder in (pets, pets / "cats", pets / "cats/manx"):
        shutil.copytree(pets / "dogs/pug", folder / ".ipynb_checkpoints")


def links(pets):
    (pets / "cats/manx/loop").symlink_to(pets)
    (pets / "cats/manx/itself.png").symlink_to("itself.png")
    (pets / "cats/manx/gone.png").symlink_to("nowhere.png")


def numbered(pets):
    for old, new in (("cats/lynx", "cats/1"), ("cats/manx", "cats/10"), ("dogs/pug", "dogs/2")):
        (pets / old).rename(pets / new)
    for rest in ("beagle", "pug_dog"):
        shutil.rmtree(pets / "dogs" / rest)
    for i in range(8):  # 20 images again
        shutil.copy(pets / "dogs/2/0.png", pets / f"dogs/2/{i + 4}.png")


MESSAGES = {  # name: (change to the folder, words of a line of the log)
    "hidden files": (
        hidden_files,
        "Ignored entries that are not images in a class folder: 7 "
        "('.DS_Store', '.ipynb_checkpoints', 'cats/.DS_Store' and 4 more)",
    ),
    "circular and broken links": (
        links,
        "Ignored entries that are not images in a class folder: 3 "
        "('cats/manx/gone.png', 'cats/manx/itself.png', 'cats/manx/loop')",
    ),
    "folders 1, 10, 2": (
        numbered,
        "numbered without padding and sorted as text, so that '1', '10', '2' have the labels 0, 1, 2: pad the numbers",
    ),
}


@pytest.mark.reliability(*ODD)
@pytest.mark.parametrize("name", MESSAGES)
def test_unusual_entries_are_logged(name, trained):
    change, words = MESSAGES[name]
    result = trained(change)
    assert result.code == 0 and words in result.out, result.err + result.out
    assert "20 images," in result.out and "Unreadable" not in result.out


# ---- unreadable images ---------------------------------------------------------------------------------------

UNREADABLE = {
    "zero bytes": lambda path: path.write_bytes(b""),
    "half a JPEG": lambda path: path.write_bytes(encoded("JPEG")[:1000]),
    "half a PNG": lambda path: path.write_bytes(encoded("PNG")[:1000]),
    "HTML": lambda path: path.write_bytes(b"<!DOCTYPE html><html><title>403 Forbidden</title></html>"),
    "a Git LFS pointer": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "20,000 x 20,000": lambda path: write_png(path, 20_000, 20_000, depth=1),
}


@pytest.mark.reliability(*ODD)
@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_image_is_named_and_replaced_by_one_of_its_class(name, trained):
    result = trained(lambda pets: UNREADABLE[name](pets / "cats/manx/0.png"))
    assert result.code == 0, result.err
    assert "Unreadable images were replaced by others of their classes: 'cats/manx/0.png' (1 so far)" in result.out


@pytest.mark.reliability(*ODD)
def test_too_many_unreadable_images_stop_the_run(trained, tmp_path):
    def change(pets):
        for i, spoil in enumerate((UNREADABLE["zero bytes"], UNREADABLE["HTML"])):
            spoil(pets / f"cats/manx/{i}.png")

    words = (
        "2 images could not be read ('cats/manx/0.png', 'cats/manx/1.png'), expected at most 1: find",
        "--max-bad-images",
    )
    refused(trained(change, "--max-bad-images", 1), *words)
    assert not list(tmp_path.glob("out/*/*/*"))  # neither adapter nor state


@pytest.mark.reliability(*ODD)
def test_a_class_without_readable_images_stops_the_run(trained, tmp_path):
    def change(pets):
        for i in range(4):
            UNREADABLE["zero bytes"](pets / f"cats/manx/{i}.png")

    words = "None of the 4 images of class folder", "cats/manx can be read", "remove the class"
    refused(trained(change, "--num-workers", 1), *words)
    assert not list(tmp_path.glob("out/*/*/*")) and not multiprocessing.active_children()


def test_workers_end_with_the_run_after_any_error(trained, monkeypatch):
    """Otherwise Python waits for them at exit, since they ignore the signal that it sends them."""

    def fails(*_):
        raise RuntimeError

    monkeypatch.setattr(train, "train_step", fails)
    with pytest.raises(RuntimeError):
        trained(lambda pets: None, "--num-workers", 2)
    assert not multiprocessing.active_children()


def memory_of(function, *arguments):
    """Return the peak memory of a call in MB, at most 255, measured in a forked process."""
    child = os.fork()
    if not child:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            function(*arguments)
        finally:
            os._exit(min(255, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refused_crop(path):
    with pytest.raises(UnreadableImage, match=r"image.jpg \(Image size \(400000000 pixels\) exceeds limit"):
        read_crop(path, 8)


@pytest.mark.reliability(*ODD)
def test_an_image_of_400_million_pixels_takes_no_memory(tmp_path):
    write_png(tmp_path / "small.png", 8000, 8000, depth=1)  # is read: 64 MB
    write_png(tmp_path / "image.jpg", 20_000, 20_000, depth=1)
    assert (tmp_path / "image.jpg").stat().st_size < 1e6
    assert memory_of(read_crop, tmp_path / "small.png", 8) > 50
    assert memory_of(refused_crop, tmp_path / "image.jpg") < 20
    refused_crop(tmp_path / "image.jpg")


# ---- image formats --------------------------------------------------------------------------------------------

GREY = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))  # (64, 64)
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)
FORMATS = {  # file name: (function that writes it, expected pixels)
    "rgb16.png": (lambda path: write_png(path, 64, 64, 16, (COLOURS.astype(">u2") * 257).astype(">u2")), COLOURS),
    "grey16.png": (lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path), GREY),
    "grey16.tif": (lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path), GREY),
    "grey32.tif": (lambda path: Image.fromarray(GREY.astype(np.int32) * 257).save(path), GREY),
    "cmyk.tif": (lambda path: Image.fromarray(COLOURS).convert("CMYK").save(path), COLOURS),
    "cmyk.jpg": (lambda path: Image.fromarray(GREY).convert("CMYK").save(path, quality=100, subsampling=0), GREY),
}


@pytest.mark.reliability(*ODD)
@pytest.mark.parametrize("name", FORMATS)
def test_image_formats_are_converted_correctly(name, tmp_path):
    write, expected = FORMATS[name]
    (tmp_path / "manx").mkdir()
    write(tmp_path / "manx" / name)
    pixels, _, shown = ImageData(tmp_path, Hierarchy(("manx",), ("cats",), [0]), 64)[0]
    expected = np.broadcast_to(expected.reshape(64, 64, -1), (64, 64, 3)).astype(int)
    levels = ((pixels.permute(1, 2, 0) + 1) * 127.5).round().to(torch.int).numpy()
    assert shown == 0 and abs(levels - expected).max() <= (2 if name.endswith("jpg") else 1)
