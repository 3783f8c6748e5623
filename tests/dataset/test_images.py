import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import bomb
from helpers.tiny_models import THREE_PETS, make
from PIL import Image
from safetensors.torch import load_file

from dataset.images import ImageData, UnreadableImage, center_crop, collate, list_images, read_crop, to_rgb
from hierarchy import Hierarchy
from hierarchy.hierarchy import check_counts
from training.batches import StepBatches

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
VEGFRU = [
    "veg200_images/carrot/v_13_01_0001.jpg",
    "veg200_images/carrot/v_13_01_0002.jpg",
    "veg200_images/chive/v_01_02_0001.jpg",
    "fru92_images/apple/f_09_01_0001.jpg",
]


def relative(paths, root):
    return [str(Path(path).relative_to(root)) for path in paths]


def picture(width, height):
    y, x, c = np.mgrid[:height, :width, :3]
    return Image.fromarray(((x * x // 7 + y * (5 + c) + x * y // 11 + 40 * c) % 256).astype("u1"))


# ---- listing -------------------------------------------------------------------------------------


def test_one_level_is_sorted_and_labelled_by_the_hierarchy(tmp_path):
    h = Hierarchy(("pug", "beagle", "manx"), ("cats", "dogs"), [1, 1, 0])
    make(tmp_path, "manx/b.png", "manx/a.JPG", "pug/1.jpeg", "beagle/2.webp", "beagle/1.webp")
    paths, labels = list_images(tmp_path, h)
    assert relative(paths, tmp_path) == ["pug/1.jpeg", "beagle/1.webp", "beagle/2.webp", "manx/a.JPG", "manx/b.png"]
    assert labels.tolist() == [0, 1, 1, 2, 2] and labels.dtype == torch.int64


def test_two_levels_take_the_superclass_from_the_hierarchy(tmp_path):
    make(tmp_path, "cats/manx/1.jpg", "dogs/pug/1.jpg", "dogs/beagle/1.jpg")
    for h in (THREE_PETS, Hierarchy(THREE_PETS.classes, ("a", "b"), [0, 0, 1])):
        paths, labels = list_images(tmp_path, h)
        assert relative(paths, tmp_path)[0] == "dogs/beagle/1.jpg" and labels.tolist() == [0, 1, 2]
    paths, labels = list_images(tmp_path, Hierarchy.load(tmp_path))
    assert relative(paths, tmp_path)[0] == "cats/manx/1.jpg" and labels.tolist() == [0, 1, 2]


def test_hidden_and_other_files_are_passed_over(tmp_path):
    make(
        tmp_path,
        "manx/1.jpg",
        "pug/1.jpg",
        "beagle/1.jpg",
        "pug/._1.jpg",
        "pug/.DS_Store",
        "pug/notes.txt",
        ".ipynb_checkpoints/1.jpg",
        "pug/.ipynb_checkpoints/1.jpg",
        "hierarchy.json",
        ".DS_Store",
    )
    assert list_images(tmp_path, THREE_PETS)[1].tolist() == [0, 1, 2]


def test_inaturalist_as_it_unpacks_by_name_and_by_number(tmp_path):
    names = [
        "00000_Animalia_Chordata_Aves_Passeriformes_Corvidae_Corvus_corax",
        "00001_Plantae_Tracheophyta_Magnoliopsida_Asterales_Asteraceae_Bellis_perennis",
    ]
    make(tmp_path, *(f"train_mini/{name}/1.jpg" for name in names))
    numbered = Hierarchy.from_dict({"superclasses": ["Plants", "Birds"], "parents": [1, 0]})
    for h in (Hierarchy.load(tmp_path), numbered):
        for root in (tmp_path, tmp_path / "train_mini"):
            paths, labels = list_images(root, h)
            assert labels.tolist() == [0, 1] and names[1] in paths[1]
    with pytest.raises(ValueError, match="lacks 9998 of the 10000 classes of inat2021"):
        list_images(tmp_path, Hierarchy.load("inat2021"))


def test_vegfru_folder_means_its_train_list_and_a_list_means_itself(tmp_path):
    make(tmp_path, *VEGFRU)
    h = Hierarchy.load(tmp_path)
    assert h.classes == ("carrot", "chive", "apple")
    paths, labels = list_images(tmp_path, h)
    assert relative(paths, tmp_path) == VEGFRU and labels.tolist() == [0, 0, 1, 2]
    (tmp_path / "vegfru_list").mkdir()
    train, val = (tmp_path / f"vegfru_list/vegfru_{name}.txt" for name in ("train", "val"))
    train.write_text("".join(f"{VEGFRU[i]} {i}\n" for i in (3, 2, 1)))
    val.write_text("".join(f"./{VEGFRU[i]} {i}\n" for i in (0, 2, 3)))
    paths, labels = list_images(tmp_path, h)
    assert relative(paths, tmp_path) == VEGFRU[1:] and labels.tolist() == [0, 1, 2]
    assert relative(list_images(val, h)[0], tmp_path) == [VEGFRU[0], *VEGFRU[2:]]
    val.write_text("veg200_images/carrot/v_13_01_0009.jpg 1\n")
    with pytest.raises(ValueError, match="lacks 1 .*v_13_01_0009.jpg"):
        list_images(val, h)
    val.write_text("carrot\n")
    with pytest.raises(ValueError, match="is not a list of VegFru"):
        list_images(val, h)


@pytest.mark.parametrize(
    "files, words",
    [
        ([], "has no class folders"),
        (["1.jpg", "2.jpg"], "holds images but no folders"),
        (["manx/1.jpg", "pug/1.jpg", "beagle/.x.jpg"], "beagle has no images in it"),
        (["manx/1.jpg", "pug/1.jpg", "beagle/1.jpg", "wolf/1.jpg"], r"1 class .*\('wolf'\)"),
        (["manx/1.jpg"], r"lacks 2 of the 3 classes of pets \('beagle', 'pug'\)"),
        (["a/manx/1.jpg", "b/manx/1.jpg", "a/pug/1.jpg", "a/beagle/1.jpg"], "'manx' is in .*a and in"),
        (["cats/manx/1.jpg", "pug/1.jpg", "beagle/1.jpg"], "'cats' has folders in it and"),
    ],
)
def test_folders_that_do_not_fit(files, words, tmp_path):
    make(tmp_path, *files)
    with pytest.raises(ValueError, match=words):
        list_images(tmp_path, THREE_PETS)


def test_missing_path_and_file(tmp_path):
    with pytest.raises(ValueError, match="no image folder .*nowhere"):
        list_images(tmp_path / "nowhere", THREE_PETS)
    make(tmp_path, "1.jpg", "list.txt")
    for name in ("1.jpg", "list.txt"):
        with pytest.raises(ValueError, match="is a file; expected a folder"):
            list_images(tmp_path / name, THREE_PETS)


def test_check_counts():
    check_counts(THREE_PETS, 3, 2)
    check_counts(THREE_PETS, None, None)
    with pytest.raises(ValueError, match="--num-classes is 1000, but pets has 3"):
        check_counts(THREE_PETS, 1000, 2)
    with pytest.raises(ValueError, match="--num-super-classes is 11, but pets has 2"):
        check_counts(THREE_PETS, 3, 11)


# ---- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, expected", load_file(GOLDEN / "center_crop.safetensors").items())
def test_center_crop_is_adms(key, expected):
    """Golden: DiT's own crop of `picture(w, h)`; keys are {w}x{h}_{size}."""
    shape, size = key.split("_")
    cropped = center_crop(picture(*map(int, shape.split("x"))), int(size))
    assert cropped.size == (int(size), int(size))
    assert np.array_equal(np.asarray(cropped), expected.numpy())


@pytest.mark.parametrize("width, height", [(1, 1), (1, 9), (255, 257), (511, 2), (1023, 400)])
@pytest.mark.parametrize("size", [1, 8, 17])
def test_center_crop_has_its_size_whatever_comes(width, height, size):
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


def images(root):
    for i, name in enumerate(("manx/1.png", "pug/1.png", "beagle/1.png", "beagle/2.png", "beagle/3.png")):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (20 + i, 30), (255, 51 * i, 0)).save(root / name)
    return root


def test_image_data_items_depend_on_the_index_alone(tmp_path):
    data = ImageData(images(tmp_path), THREE_PETS, 8)
    assert len(data) == 5 and data.labels.tolist() == [0, 0, 0, 1, 2]
    image, label, shown = data[1]
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and label == 0 and shown == 1
    assert torch.equal(image[0], torch.ones(8, 8)) and torch.equal(image[2], -torch.ones(8, 8))
    torch.testing.assert_close(image[1], torch.full((8, 8), 3 * 51 / 127.5 - 1))
    assert all(torch.equal(data[1][0], image) for _ in range(3))
    names = ["beagle/1.png", "beagle/2.png", "beagle/3.png", "manx/1.png", "pug/1.png"]
    assert [data.name(i) for i in range(5)] == names
    with pytest.raises(ValueError, match="--image-size is 0"):
        ImageData(tmp_path, THREE_PETS, 0)


def test_loader_with_workers_gives_the_batches(tmp_path):
    data = ImageData(images(tmp_path), THREE_PETS, 8)
    batches = StepBatches(5, 2, seed=0, max_steps=3)
    loader = torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=1, collate_fn=collate)
    found = [(y.tolist(), shown.tolist()) for _, y, shown in loader]
    assert found == [([int(data.labels[i]) for i in rows], rows) for rows in batches]


def test_the_fingerprint_is_of_names_and_labels(tmp_path):
    here, there = images(tmp_path / "here"), images(tmp_path / "there")
    before = ImageData(here, THREE_PETS, 8).fingerprint
    assert before == ImageData(there, THREE_PETS, 16).fingerprint
    assert (
        before
        != ImageData(here, Hierarchy(THREE_PETS.classes[::-1], THREE_PETS.superclasses, [1, 0, 1]), 8).fingerprint
    )
    (there / "pug/1.png").rename(there / "pug/2.png")
    assert before != ImageData(there, THREE_PETS, 8).fingerprint


def test_what_is_passed_over_is_told(tmp_path):
    make(images(tmp_path), ".DS_Store", "pug/._1.jpg", "pug/.ipynb_checkpoints/1.jpg", "manx/notes.txt", "manx.jpg")
    (tmp_path / "manx/gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "manx/circle.jpg").symlink_to("circle.jpg")
    (tmp_path / "circle").symlink_to("circle")
    data = ImageData(tmp_path, THREE_PETS, 8)
    ignored = [".DS_Store", "manx.jpg", "manx/circle.jpg", "manx/gone.jpg", "manx/notes.txt"]
    assert data.ignored == [*ignored, "pug/._1.jpg", "pug/.ipynb_checkpoints"]
    assert data.warnings == ["Passed over as no images: 7 ('.DS_Store', 'manx.jpg', 'manx/circle.jpg' and 4 more)."]
    assert ImageData(images(tmp_path / "pets"), THREE_PETS, 8).warnings == []


@pytest.mark.parametrize("link", ["loop", "manx/loop"])
def test_a_link_to_a_folder_above_ends_in_a_sentence(link, tmp_path):
    (images(tmp_path) / link).symlink_to(tmp_path)
    with pytest.raises(ValueError, match="has folders in it and"):
        list_images(tmp_path, THREE_PETS)


@pytest.mark.parametrize(
    "names, count",
    [("1 10 2", 1), ("1 2 10", 0), ("01 02 10", 0), ("1cat 10cow 9dog", 1), ("b1 b10 b2", 0), ("10 2 x", 0)],
)
def test_numbers_without_padding_are_warned_of(names, count, tmp_path):
    names = names.split()
    make(tmp_path, *(f"{name}/1.jpg" for name in names))
    warnings = ImageData(tmp_path, Hierarchy(names, ("a",), [0] * len(names)), 8).warnings
    assert len(warnings) == count and all("('1" not in w and "sorted as text" in w for w in warnings)


def test_a_line_break_in_a_name_is_refused(tmp_path):
    make(images(tmp_path), "pug/a\nb.jpg")
    with pytest.raises(ValueError, match=r"line break in the path of 1 of its images \('pug/a\\nb.jpg'\)"):
        ImageData(tmp_path, THREE_PETS, 8)


def encoded(kind):
    stream = io.BytesIO()
    picture(64, 48).save(stream, kind)
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
            loader._shutdown_workers()  # left to the garbage collector after an error, it takes 5 seconds


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_of_its_class_stands_for_a_bad_image(workers, tmp_path):
    whole = ImageData(images(tmp_path), THREE_PETS, 8)
    expected = [whole[i] for i in range(5)]
    for bad, shown in (({0}, [1, 1, 2, 3, 4]), ({1, 2}, [0, 0, 0, 3, 4]), ({0, 2}, [1, 1, 1, 3, 4])):
        for i in bad:
            (tmp_path / whole.name(i)).write_bytes(b"")
        data = ImageData(tmp_path, THREE_PETS, 8)
        x, y, indices = first_batch(data, workers)
        assert indices.tolist() == shown and y.tolist() == [0, 0, 0, 1, 2]
        assert torch.equal(x, torch.stack([expected[j][0] for j in shown]))
        assert data.fingerprint == whole.fingerprint
        images(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_without_a_readable_image_is_named(workers, tmp_path):
    images(tmp_path)
    for i in (1, 2, 3):
        (tmp_path / f"beagle/{i}.png").write_bytes(b"no image")
    data = ImageData(tmp_path, THREE_PETS, 8)
    words = (
        r"^None of the 3 images of class folder .*/beagle can be read \(Cannot read .*\), expected at least one: .*\.$"
    )
    with pytest.raises(UnreadableImage, match=words):
        first_batch(data, workers)


# ---- large images --------------------------------------------------------------------------------


def photograph(width, height):
    """Smooth areas, edges and a little noise, deterministic."""
    noise = np.random.default_rng(0)
    coarse = Image.fromarray(noise.integers(0, 256, (24, 32, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((smooth + noise.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "width, height, size, bias",
    [(500, 375, 256, 0), (500, 500, 126, 0), (504, 504, 126, 0.5), (500, 376, 64, 0.5), (2096, 1104, 64, 1.5)],
)
def test_a_large_jpeg_is_shrunk_in_decoding_and_others_are_as_ever(width, height, size, bias, tmp_path):
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
def test_large_jpegs_of_other_modes(mode, mean, tmp_path):
    Image.new("RGB", (403, 301), (100, 100, 100)).convert(mode).save(tmp_path / "image.jpg")
    assert abs(np.asarray(read_crop(tmp_path / "image.jpg", 16)).astype(int) - mean).max() <= 2


def test_a_large_png_is_not_shrunk_in_decoding(tmp_path):
    picture = photograph(600, 500)
    picture.save(tmp_path / "image.png")
    assert np.array_equal(np.asarray(read_crop(tmp_path / "image.png", 64)), np.asarray(center_crop(picture, 64)))
