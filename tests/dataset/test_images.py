"""Images of a folder: decoding, centre crop, substitutes for unreadable images."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import bomb
from helpers.tiny_models import THREE_PETS, make
from PIL import Image
from safetensors.torch import load_file

from dataset.images import ImageData, UnreadableImage, center_crop, collate, read_crop, to_rgb
from hierarchy import Hierarchy
from runtime.private import shutdown_workers
from training.batches import StepBatches

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


# ---- pixels --------------------------------------------------------------------------------------


def pattern(width, height):
    y, x, c = np.mgrid[:height, :width, :3]
    return Image.fromarray(((x * x // 7 + y * (5 + c) + x * y // 11 + 40 * c) % 256).astype("u1"))


@pytest.mark.parametrize("key, expected", load_file(GOLDEN / "center_crop.safetensors").items())
def test_center_crop_is_adms(key, expected):
    """Golden: DiT's own crop of `pattern(w, h)`; keys are {w}x{h}_{size}."""
    shape, size = key.split("_")
    cropped = center_crop(pattern(*map(int, shape.split("x"))), int(size))
    assert cropped.size == (int(size), int(size))
    assert np.array_equal(np.asarray(cropped), expected.numpy())


@pytest.mark.parametrize("width, height", [(1, 1), (1, 9), (255, 257), (511, 2), (1023, 400)])
@pytest.mark.parametrize("size", [1, 8, 17])
def test_center_crop_has_its_size_for_any_image(width, height, size):
    assert center_crop(Image.new("RGB", (width, height)), size).size == (size, size)


def test_every_mode_becomes_the_same_rgb(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rgb = np.repeat(grey[..., None], 3, -1)
    image = Image.fromarray(grey)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")  # 0..65535
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "p.png")
    image.convert("LA").save(tmp_path / "la.png")
    image.convert("RGBA").save(tmp_path / "rgba.png")
    image.save(tmp_path / "l.png")
    for path in sorted(tmp_path.iterdir()):
        with Image.open(path) as opened:
            result = to_rgb(opened)
        assert result.mode == "RGB"
        assert np.abs(np.asarray(result).astype(int) - rgb).max() <= 1, path.name


# ---- large images --------------------------------------------------------------------------------


def photograph(width, height):
    """Return smooth areas, edges and a little noise, always the same."""
    noise = np.random.default_rng(0)
    coarse = Image.fromarray(noise.integers(0, 256, (24, 32, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((smooth + noise.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "width, height, size, bias",
    [(500, 375, 256, 0), (500, 500, 126, 0), (504, 504, 126, 0.5), (500, 376, 64, 0.5), (2096, 1104, 64, 1.5)],
)
def test_only_a_large_jpeg_is_shrunk_during_decoding(width, height, size, bias, tmp_path):
    path = tmp_path / "image.jpg"
    photograph(width, height).save(path, quality=92)
    found = np.asarray(read_crop(path, size))
    with Image.open(path) as image:
        expected = np.asarray(center_crop(image.convert("RGB"), size))
    assert found.shape == expected.shape
    if not bias:
        assert np.array_equal(found, expected)
    else:
        difference = expected.astype(float) - found
        assert abs(difference.mean() - bias) < 0.15 and difference.std() < 5


@pytest.mark.parametrize("mode, mean", [("L", 100), ("CMYK", 100)])
def test_large_jpegs_in_other_modes(mode, mean, tmp_path):
    Image.new("RGB", (403, 301), (100, 100, 100)).convert(mode).save(tmp_path / "image.jpg")
    assert abs(np.asarray(read_crop(tmp_path / "image.jpg", 16)).astype(int) - mean).max() <= 2


def test_a_large_png_is_not_shrunk_during_decoding(tmp_path):
    image = photograph(600, 500)
    image.save(tmp_path / "image.png")
    assert np.array_equal(np.asarray(read_crop(tmp_path / "image.png", 64)), np.asarray(center_crop(image, 64)))


# ---- the data set --------------------------------------------------------------------------------


def write_images(root):
    """Write five images in three classes; return the folder."""
    for i, name in enumerate(("manx/1.png", "pug/1.png", "beagle/1.png", "beagle/2.png", "beagle/3.png")):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (20 + i, 30), (255, 51 * i, 0)).save(root / name)
    return root


def test_image_data_items_depend_on_the_index_alone(tmp_path):
    data = ImageData(write_images(tmp_path), THREE_PETS, 8)
    assert len(data) == 5 and data.labels.tolist() == [0, 0, 0, 1, 2]
    image, label, shown = data[1]
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and label == 0 and shown == 1
    assert torch.equal(image[0], torch.ones(8, 8)) and torch.equal(image[2], -torch.ones(8, 8))
    torch.testing.assert_close(image[1], torch.full((8, 8), 3 * 51 / 127.5 - 1))
    assert all(torch.equal(data[1][0], image) for _ in range(3))
    names = ["beagle/1.png", "beagle/2.png", "beagle/3.png", "manx/1.png", "pug/1.png"]
    assert data.paths == names
    with pytest.raises(ValueError, match="--image-size is 0"):
        ImageData(tmp_path, THREE_PETS, 0)


def test_a_loader_with_workers_gives_the_batches(tmp_path):
    data = ImageData(write_images(tmp_path), THREE_PETS, 8)
    batches = StepBatches(5, 2, seed=0, max_steps=3)
    loader = torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=1, collate_fn=collate)
    found = [(y.tolist(), shown.tolist()) for _, y, shown in loader]
    assert found == [([int(data.labels[i]) for i in rows], rows) for rows in batches]


def test_the_fingerprint_depends_on_paths_and_labels(tmp_path):
    here, there = write_images(tmp_path / "here"), write_images(tmp_path / "there")
    before = ImageData(here, THREE_PETS, 8).fingerprint
    assert before == ImageData(there, THREE_PETS, 16).fingerprint
    assert (
        before
        != ImageData(here, Hierarchy(THREE_PETS.classes[::-1], THREE_PETS.superclasses, [1, 0, 1]), 8).fingerprint
    )
    (there / "pug/1.png").rename(there / "pug/2.png")
    assert before != ImageData(there, THREE_PETS, 8).fingerprint


def test_ignored_entries_are_named(tmp_path):
    make(
        write_images(tmp_path), ".DS_Store", "pug/._1.jpg", "pug/.ipynb_checkpoints/1.jpg", "manx/notes.txt", "manx.jpg"
    )
    (tmp_path / "manx/gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "manx/circle.jpg").symlink_to("circle.jpg")
    (tmp_path / "circle").symlink_to("circle")
    data = ImageData(tmp_path, THREE_PETS, 8)
    ignored = [".DS_Store", "manx.jpg", "manx/circle.jpg", "manx/gone.jpg", "manx/notes.txt"]
    assert data.ignored == [*ignored, "pug/._1.jpg", "pug/.ipynb_checkpoints"]
    assert data.warnings == [
        "Ignored entries that are not images in a class folder: 7 ('.DS_Store', 'manx.jpg', 'manx/circle.jpg' and 4 more)."
    ]
    assert ImageData(write_images(tmp_path / "pets"), THREE_PETS, 8).warnings == []


# ---- images that cannot be read ------------------------------------------------------------------


def encoded(kind):
    stream = io.BytesIO()
    pattern(64, 48).save(stream, kind)
    return stream.getvalue()


DAMAGED = {
    "nothing": b"",
    "html": b"<!DOCTYPE html><html>403</html>",
    "bomb": bomb(),
    **{f"half a {kind}": encoded(kind)[: len(encoded(kind)) // 2] for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF")},
    "half a WEBP": encoded("WEBP")[: len(encoded("WEBP")) // 2],
    "bits": bytes(b ^ 255 if i % 7 == 0 and i > 60 else b for i, b in enumerate(encoded("PNG"))),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_an_unreadable_image_is_one_sentence(content, tmp_path):
    (tmp_path / "image.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"^Cannot read image .*image.jpg \(.*\): replace or remove it\.$"):
        read_crop(tmp_path / "image.jpg", 8)


def first_batch(data, workers):
    loader = iter(torch.utils.data.DataLoader(data, len(data), num_workers=workers, collate_fn=collate))
    try:
        return next(loader)
    finally:
        if workers:
            shutdown_workers(loader)  # the garbage collector would take 5 seconds after an error


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_image_of_the_class_replaces_a_bad_one(workers, tmp_path):
    intact = ImageData(write_images(tmp_path), THREE_PETS, 8)
    expected = [intact[i] for i in range(5)]
    for bad, shown in (({0}, [1, 1, 2, 3, 4]), ({1, 2}, [0, 0, 0, 3, 4]), ({0, 2}, [1, 1, 1, 3, 4])):
        for i in bad:
            (tmp_path / intact.paths[i]).write_bytes(b"")
        data = ImageData(tmp_path, THREE_PETS, 8)
        x, y, indices = first_batch(data, workers)
        assert indices.tolist() == shown and y.tolist() == [0, 0, 0, 1, 2]
        assert torch.equal(x, torch.stack([expected[j][0] for j in shown]))
        assert data.fingerprint == intact.fingerprint
        write_images(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_without_a_readable_image_is_named(workers, tmp_path):
    write_images(tmp_path)
    for i in (1, 2, 3):
        (tmp_path / f"beagle/{i}.png").write_bytes(b"no image")
    data = ImageData(tmp_path, THREE_PETS, 8)
    words = (
        r"^None of the 3 images of class folder .*/beagle can be read \(Cannot read .*\), expected at least one: .*\.$"
    )
    with pytest.raises(UnreadableImage, match=words):
        first_batch(data, workers)
