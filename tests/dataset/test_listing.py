"""Listing the images of a data set: layouts, labels, ignored entries, invalid folders."""

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import THREE_PETS, make

from dataset.listing import label_warnings, list_files, list_images, sorted_as_text
from hierarchy import Hierarchy

PETS = ["manx/1.jpg", "pug/1.jpg", "beagle/1.jpg"]
VEGFRU = [
    "veg200_images/carrot/v_13_01_0001.jpg",
    "veg200_images/carrot/v_13_01_0002.jpg",
    "veg200_images/chive/v_01_02_0001.jpg",
    "fru92_images/apple/f_09_01_0001.jpg",
]


def relative(paths, root):
    return [str(Path(path).relative_to(root)) for path in paths]


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


def test_hidden_and_other_files_are_ignored(tmp_path):
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
        (["manx/1.jpg", "pug/1.jpg", "beagle/.x.jpg"], "beagle has no images"),
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
        with pytest.raises(ValueError, match="is a file, expected a folder"):
            list_images(tmp_path / name, THREE_PETS)


@pytest.mark.parametrize("link", ["loop", "manx/loop"])
def test_a_link_to_a_folder_above_is_refused(link, tmp_path):
    (make(tmp_path, *PETS) / link).symlink_to(tmp_path)
    with pytest.raises(ValueError, match="has folders in it and"):
        list_images(tmp_path, THREE_PETS)


@pytest.mark.parametrize(
    "names, count",
    [("1 10 2", 1), ("1 2 10", 0), ("01 02 10", 0), ("1cat 10cow 9dog", 1), ("b1 b10 b2", 0), ("10 2 x", 0)],
)
def test_numbers_without_padding_give_a_warning(names, count):
    names = names.split()
    warnings = label_warnings(Hierarchy(names, ("a",), [0] * len(names)))
    assert len(warnings) == count and all("('1" not in w and "sorted as text" in w for w in warnings)


def test_a_line_break_in_a_name_is_refused(tmp_path):
    make(tmp_path, *PETS, "pug/a\nb.jpg")
    with pytest.raises(ValueError, match=r"line break in the path of 1 of its images \('pug/a\\nb.jpg'\)"):
        list_files(tmp_path, THREE_PETS)


def test_code_points_are_no_labels_without_padding():
    assert sorted_as_text(["1", "10", "2"]) and sorted_as_text(["1_lynx", "10_pug", "2_manx"])
    assert not sorted_as_text(["0041_A", "056A_ZHE", "0531_AYB"]) and not sorted_as_text(["01", "02", "10"])
