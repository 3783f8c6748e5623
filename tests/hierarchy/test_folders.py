"""Hierarchies of image folders: two levels, one level, iNaturalist, VegFru."""

import json

import pytest
from helpers.species import SPECIES
from helpers.tiny_models import THREE_PETS, make

from hierarchy import Hierarchy

PETS = THREE_PETS.to_dict()
VEGFRU = {
    "veg200_images/carrot/v_13_01_0001.jpg": 12,
    "veg200_images/chive/v_01_02_0001.jpg": 0,
    "veg200_images/chive/v_01_02_0002.jpg": 0,
    "fru92_images/apple/f_09_01_0001.jpg": 23,
}


def test_two_levels_are_the_hierarchy(tmp_path):
    make(
        tmp_path,
        "dogs/pug/1.jpg",
        "cats/manx/1.jpg",
        "cats/.DS_Store",
        ".cache/x/1.jpg",
        "cats/.ipynb_checkpoints/1.jpg",
        "dogs/akita/1.jpg",
        "readme.txt",
    )
    h = Hierarchy.load(tmp_path)
    assert h.superclasses == ("cats", "dogs") and h.classes == ("manx", "akita", "pug")
    assert h.parents.tolist() == [0, 1, 1] and h.name == tmp_path.name


@pytest.mark.parametrize("above", [".", "train_mini", "val"])
def test_an_inaturalist_folder_follows_the_rule(above, tmp_path):
    make(tmp_path, *(f"{above}/{name}/1.jpg" for name in SPECIES[::-1]))
    h = Hierarchy.load(tmp_path)
    assert h.classes == tuple(SPECIES) and h.num_super_classes == 11


def test_inaturalist_names_under_superclass_folders_are_two_levels(tmp_path):
    make(tmp_path, f"mine/{SPECIES[1]}/1.jpg", f"yours/{SPECIES[0]}/1.jpg")
    assert Hierarchy.load(tmp_path).superclasses == ("mine", "yours")


def test_one_level_has_a_hierarchy_in_it_or_beside_it_or_a_null_class(tmp_path):
    root = make(tmp_path / "images", "manx/1.jpg", "pug/1.jpg", "beagle/1.jpg")
    with pytest.raises(ValueError, match="hierarchy.json in or beside it"):
        Hierarchy.load(root)
    flat = Hierarchy.from_folder(root, allow_flat=True)
    assert flat.to_dict() == dict(
        name="images", superclasses=["null"], classes=["beagle", "manx", "pug"], parents=[0, 0, 0]
    )
    assert flat.is_plain
    (tmp_path / "hierarchy.json").write_text(json.dumps(PETS))
    assert Hierarchy.load(root).to_dict() == PETS
    (root / "hierarchy.json").write_text(json.dumps(PETS | {"parents": [0, 1, 1]}))
    assert Hierarchy.load(root).parents.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "files, words",
    [
        (["train/pug/1.jpg", "val/pug/1.jpg"], "'pug' is in .*train and in .*val"),
        (["cats/manx/1.jpg", "pug/1.jpg"], "'cats' has folders in it and 'pug' has none"),
        (["1.jpg", "2.jpg"], "holds images but no folders"),
        ([".DS_Store"], "has no class folders"),
        ([f"train_mini/{SPECIES[0]}/1.jpg", f"val/{SPECIES[0]}/1.jpg"], "several image folders"),
    ],
)
def test_folders_without_a_valid_hierarchy(files, words, tmp_path):
    make(tmp_path, *files)
    with pytest.raises(ValueError, match=words):
        Hierarchy.load(tmp_path)


@pytest.mark.parametrize("base", [0, 1])
def test_a_vegfru_folder_has_the_order_of_the_release(base, tmp_path):
    make(tmp_path, *VEGFRU)
    (tmp_path / "vegfru_list").mkdir()
    lines = [f"{path} {label + base}\n" for path, label in VEGFRU.items()]
    (tmp_path / "vegfru_list/supvegfru_train.txt").write_text("".join(lines))
    h = Hierarchy.load(tmp_path)
    assert Hierarchy.load(tmp_path / "vegfru_list/supvegfru_train.txt") == h
    assert h.classes == ("carrot", "chive", "apple")
    assert [h.superclasses[p] for p in h.parents] == ["root_vegetable", "alliaceous", "pome"]
    assert h.superclasses == ("alliaceous", "root_vegetable", "pome")


def test_the_complete_vegfru_has_the_built_in_names(tmp_path):
    known = Hierarchy.load("vegfru")
    prefixes = [f"v_{i:02d}" for i in range(1, 16)] + [f"f_{i:02d}" for i in range(1, 11)]
    for i, name in enumerate(known.classes):
        prefix = prefixes[i % 15] if i < 200 else prefixes[15 + i % 10]
        folder = "veg200_images" if i < 200 else "fru92_images"
        make(tmp_path, f"{folder}/{name}/{prefix}_01_0001.jpg")
    h = Hierarchy.load(tmp_path)
    assert (h.classes, h.superclasses) == (known.classes, known.superclasses)
    assert h.parents.tolist() == [i % 15 if i < 200 else 15 + i % 10 for i in range(292)]


def test_vegfru_files_that_contradict_each_other(tmp_path):
    make(tmp_path, *VEGFRU)
    (tmp_path / "vegfru_list").mkdir()
    lists = tmp_path / "vegfru_list/supvegfru_val.txt"
    swapped = {"carrot": 0, "chive": 12, "apple": 23}
    lists.write_text("".join(f"{p} {swapped[p.split('/')[1]]}\n" for p in VEGFRU))
    with pytest.raises(ValueError, match="'carrot' the superclass label 0.*prefix v_13"):
        Hierarchy.load(tmp_path)
    lists.unlink()
    make(tmp_path, "veg200_images/chive/v_02_02_0003.jpg")
    with pytest.raises(ValueError, match=r"chive has files with the prefixes \['v_01', 'v_02'\]"):
        Hierarchy.load(tmp_path)
