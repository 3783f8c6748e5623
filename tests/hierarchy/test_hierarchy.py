"""Hierarchies: the built-in ones, iNaturalist's rule, JSON files, and the object itself."""

import copy
import csv
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.species import SPECIES
from helpers.tiny_models import THREE_PETS, make

from hierarchy import Hierarchy
from hierarchy.hierarchy import check_counts

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("FINEDIFFUSION_SHARED", ROOT / "../shared"))

INAT_RANGES = {  # of labels, inclusive, as published
    "Plants": [(5729, 9999)],
    "Insects": [(175, 2700)],
    "Birds": [(3111, 4596)],
    "Fungi": [(5388, 5728)],
    "Reptiles": [(4859, 5171)],
    "Mammals": [(4613, 4858)],
    "Ray-finned Fishes": [(2756, 2938)],
    "Amphibians": [(2939, 3108)],
    "Mollusks": [(5219, 5387)],
    "Arachnids": [(4, 156)],
    "Animalia": [(0, 3), (157, 174), (2701, 2755), (3109, 3110), (4597, 4612), (5172, 5218)],
}
PETS = {"name": "pets", "superclasses": ["cats", "dogs"], "classes": ["beagle", "manx", "pug"], "parents": [1, 0, 1]}


def pets(**changes):
    return {**PETS, **changes}


# ---- built-in hierarchies and the rule of iNaturalist --------------------------------------------


def test_inat2021_has_the_published_ranges_in_the_official_order():
    h = Hierarchy.load("inat2021")
    assert h.superclasses == tuple(INAT_RANGES)
    assert (h.num_classes, h.num_super_classes) == (10000, 11)
    assert h.parents.dtype == torch.int64 and h.parents.shape == (10000,)
    expected = torch.full((10000,), -1)
    for i, ranges in enumerate(INAT_RANGES.values()):
        for first, last in ranges:
            expected[first : last + 1] = i
    assert torch.equal(h.parents, expected)
    counts = [4271, 2526, 1486, 341, 313, 246, 183, 170, 169, 153, 142]
    assert h.parents.bincount().tolist() == counts
    assert h.classes[7] == "00007" and h.numbered


def test_the_rule_agrees_with_the_ranges_on_all_published_names():
    path = SHARED / "data/inat2021_categories.csv"
    if not path.is_file():
        pytest.skip("the list of the 10,000 directory names is third-party data, not in the tree")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    by_rule = Hierarchy.from_class_names([row["image_dir_name"] for row in rows])
    built_in = Hierarchy.load("inat2021", counted=True)
    assert by_rule.superclasses == built_in.superclasses
    assert torch.equal(by_rule.parents, built_in.parents)
    assert {row["supercategory"] for row in rows} == set(built_in.superclasses)
    assert [row["supercategory"] for row in rows] == [by_rule.superclasses[p] for p in by_rule.parents]
    assert by_rule.classes[by_rule.find("Vulpes vulpes")].endswith("_Canidae_Vulpes_vulpes")
    assert [len(tier.nodes) for tier in by_rule.tiers] == [len(tier.nodes) for tier in built_in.tiers]
    assert len({node.split(" (")[0] for node in by_rule.ranks[-1].nodes}) == 4900 - 16  # homonyms


def test_the_rule_gives_every_superclass():
    h = Hierarchy.from_class_names(SPECIES)
    assert h.superclasses == tuple(INAT_RANGES)
    assert [h.superclasses[p] for p in h.parents] == [
        "Animalia",
        "Arachnids",
        "Insects",
        "Ray-finned Fishes",
        "Amphibians",
        "Birds",
        "Mammals",
        "Mammals",
        "Reptiles",
        "Mollusks",
        "Fungi",
        "Plants",
    ]


def test_superclasses_without_a_class_are_left_out_in_the_official_order():
    h = Hierarchy.from_class_names([SPECIES[5], SPECIES[11]])
    assert h.superclasses == ("Plants", "Birds") and h.parents.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["Vulpes_vulpes", SPECIES[0] + "_minor", "fox", ""])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=f"{name!r} is not an iNaturalist"):
        Hierarchy.from_class_names([SPECIES[0], name])


def test_unknown_kingdom_is_refused():
    with pytest.raises(ValueError, match="'Chromista'"):
        Hierarchy.from_class_names([SPECIES[0].replace("Animalia", "Chromista")])


def test_vegfru_has_names_and_no_parents():
    h = Hierarchy.load("vegfru")
    assert (h.num_classes, h.num_super_classes, h.has_parents) == (292, 25, False)
    assert h.superclasses[0] == "alliaceous" and h.superclasses[15] == "berry_fruit"
    assert h.classes[h.find("carrot")] == "carrot"
    with pytest.raises(ValueError, match="folder of the VegFru release as --hierarchy"):
        _ = h.parents
    assert Hierarchy.from_dict(json.loads(json.dumps(h.to_dict()))) == h
    for again in (pickle.loads(pickle.dumps(h)), copy.deepcopy(h)):
        assert again == h and not again.has_parents


@pytest.mark.parametrize("spec", ["inat2021", "vegfru"])
def test_built_in_names_are_the_files(spec):
    assert (ROOT / f"hierarchy/{spec}.json").is_file()
    assert len(Hierarchy.load(spec).digest()) == 64


# ---- JSON files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parents",
    [
        [1, 0, 1],
        ["dogs", "cats", "dogs"],
        {"cats": [[1, 1]], "dogs": [[2, 2], [0, 0]]},
    ],
)
def test_forms_of_parents(parents, tmp_path):
    path = tmp_path / "some.json"
    path.write_text(json.dumps(pets(parents=parents)))
    h = Hierarchy.load(path)
    assert h.parents.tolist() == [1, 0, 1] and h.classes == ("beagle", "manx", "pug")
    assert Hierarchy.from_dict(json.loads(json.dumps(h.to_dict()))).to_dict() == PETS


def test_classes_without_names_are_numbered():
    record = {"superclasses": ["a", "b"], "parents": [0, 1]}
    h = Hierarchy.from_dict(record, "mine")
    assert h.classes == ("00000", "00001") and h.to_dict() == {"name": "mine", **record}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"superclasses": ["cats", "dogs", "fish"]}, r"superclass 2 \(fish\) has no class"),
        ({"parents": [1, 0, 2]}, r"class 2 \(pug\) has parent 2, expected an index 0\.\.1"),
        ({"parents": [1, -1, 0]}, r"class 1 \(manx\) has parent -1"),
        ({"parents": [1, 0, True]}, r"class 2 \(pug\) has parent True"),
        ({"parents": [1, 0, 0.5]}, r"class 2 \(pug\) has parent 0.5"),
        ({"parents": [1, 0, None]}, r"class 2 \(pug\) has parent None"),
        ({"parents": [1, 0]}, "2 parents for 3 classes"),
        ({"parents": ["dogs", "cats", "wolves"]}, "parent 'wolves' is not among"),
        ({"parents": {"cats": [[0, 0]], "dogs": [[2, 2]]}}, r"\[2, 2\] of 'dogs' leaves a gap"),
        ({"parents": {"cats": [[0, 1]], "dogs": [[1, 2]]}}, r"\[1, 2\] of 'dogs' leaves a gap or an"),
        ({"parents": {"cats": [0, 1]}}, r"expected \[\[first, last\]"),
        ({"parents": 3}, "got .* and 3"),
        ({"classes": ["pug", "manx", "pug"]}, "'pug' is at 0 and 2"),
        ({"superclasses": ["cats", "cats"]}, "'cats' is at 0 and 1"),
        ({"classes": ["pug", "manx", 3]}, "classes must be a list of names"),
        ({"classes": "abc"}, "classes must be a list of names"),
        ({"superclasses": None}, "'superclasses' must be a list"),
        ({"classes": [], "parents": []}, "classes is empty"),
    ],
)
def test_an_error_names_the_file_and_the_invalid_entry(change, words, tmp_path):
    path = tmp_path / "some.json"
    path.write_text(json.dumps(pets(**change)))
    with pytest.raises(ValueError, match=words) as error:
        Hierarchy.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not JSON"),
        ("[]", "'superclasses' and 'parents'"),
        ('{"classes": []}', "'parents'"),
        ('{"categories": [{"name": "a"}]}', "lack 'id'"),
        ("\xff", "is not JSON"),
    ],
)
def test_other_files_are_refused(text, words, tmp_path):
    path = tmp_path / "some.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=words):
        Hierarchy.load(path)


def test_from_folder_reads_a_folder_with_a_built_in_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "vegfru/cats/manx/1.jpg")
    assert Hierarchy.load("vegfru").num_classes == 292
    assert Hierarchy.from_folder("vegfru").classes == ("manx",)
    with pytest.raises(ValueError, match="no image folder 'inat2021'"):
        Hierarchy.from_folder("inat2021")


def test_a_missing_path_lists_the_built_in_hierarchies():
    with pytest.raises(ValueError, match="no hierarchy or path 'inat2020'.*inat2021, vegfru"):
        Hierarchy.load("inat2020")


def test_an_annotation_file_is_sorted_by_id(tmp_path):
    keys = ("kingdom", "phylum", "class", "order", "family", "genus", "specific_epithet")
    ranks = dict(zip(keys, SPECIES[0].split("_")[1:]))
    categories = [{"id": 1, "image_dir_name": SPECIES[1]}, {"id": 0, **ranks}]
    path = tmp_path / "val.json"
    path.write_text(json.dumps({"images": [], "categories": categories}))
    h = Hierarchy.load(path)
    assert h.classes == tuple(SPECIES[:2]) and h.superclasses == ("Arachnids", "Animalia")


# ---- the object ----------------------------------------------------------------------------------


def test_frozen_equal_by_content_and_copied():
    h = Hierarchy.from_dict(PETS)
    for field in ("classes", "superclasses", "parents", "name"):
        with pytest.raises(AttributeError):
            setattr(h, field, getattr(h, field))
    with pytest.raises(TypeError, match="parents"):
        Hierarchy(h.classes, h.superclasses)
    other = Hierarchy(h.classes, h.superclasses, h.parents.clone(), "another name")
    assert h == other and hash(h) == hash(other)
    assert h != Hierarchy.from_dict(pets(parents=[0, 1, 1])) and h != "pets"
    assert pickle.loads(pickle.dumps(h)) == copy.deepcopy(h) == h
    renamed = replace(h, name="other")
    assert renamed == h and renamed.name == "other" and replace(h, parents=[0, 1, 1]) != h
    assert repr(h) == "Hierarchy(pets: 3 / 2)"


def test_check_counts():
    check_counts(THREE_PETS, 3, 2)
    check_counts(THREE_PETS, None, None)
    with pytest.raises(ValueError, match="--num-classes is 1000, but pets has 3"):
        check_counts(THREE_PETS, 1000, 2)
    with pytest.raises(ValueError, match="--num-super-classes is 11, but pets has 2"):
        check_counts(THREE_PETS, 3, 11)
