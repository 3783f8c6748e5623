import copy
import csv
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make

from hierarchy import Hierarchy

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("FINEDIFFUSION_SHARED", ROOT / "../shared"))

INAT_RANGES = {  # as published, inclusive
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
SPECIES = [
    "00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris",
    "00001_Animalia_Arthropoda_Arachnida_Araneae_Araneidae_Araneus_diadematus",
    "00002_Animalia_Arthropoda_Insecta_Coleoptera_Coccinellidae_Adalia_bipunctata",
    "00003_Animalia_Chordata_Actinopterygii_Esociformes_Esocidae_Esox_lucius",
    "00004_Animalia_Chordata_Amphibia_Anura_Bufonidae_Bufo_bufo",
    "00005_Animalia_Chordata_Aves_Passeriformes_Corvidae_Corvus_corax",
    "00006_Animalia_Chordata_Mammalia_Carnivora_Canidae_Vulpes_lagopus",
    "00007_Animalia_Chordata_Mammalia_Carnivora_Canidae_Vulpes_vulpes",
    "00008_Animalia_Chordata_Reptilia_Squamata_Lacertidae_Zootoca_vivipara",
    "00009_Animalia_Mollusca_Gastropoda_Stylommatophora_Helicidae_Helix_pomatia",
    "00010_Fungi_Basidiomycota_Agaricomycetes_Agaricales_Amanitaceae_Amanita_muscaria",
    "00011_Plantae_Tracheophyta_Magnoliopsida_Asterales_Asteraceae_Bellis_perennis",
]
PETS = {"name": "pets", "superclasses": ["cats", "dogs"], "classes": ["beagle", "manx", "pug"], "parents": [1, 0, 1]}


def pets(**change):
    return {**PETS, **change}


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
    built_in = Hierarchy.load("inat2021")
    assert by_rule.superclasses == built_in.superclasses
    assert torch.equal(by_rule.parents, built_in.parents)
    assert {row["supercategory"] for row in rows} == set(built_in.superclasses)
    assert [row["supercategory"] for row in rows] == [by_rule.superclasses[p] for p in by_rule.parents]
    assert by_rule.classes[by_rule.find("Vulpes vulpes")].endswith("_Canidae_Vulpes_vulpes")


def test_the_rule_knows_every_superclass():
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
def test_other_names_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name!r} is not an iNaturalist"):
        Hierarchy.from_class_names([SPECIES[0], name])


def test_unknown_kingdom_is_refused():
    with pytest.raises(ValueError, match="'Chromista'"):
        Hierarchy.from_class_names([SPECIES[0].replace("Animalia", "Chromista")])


def test_vegfru_knows_names_and_asks_for_the_folder_when_parents_are_read():
    h = Hierarchy.load("vegfru")
    assert (h.num_classes, h.num_super_classes, h.has_parents) == (292, 25, False)
    assert h.superclasses[0] == "alliaceous" and h.superclasses[15] == "berry_fruit"
    assert h.classes[h.find("carrot")] == "carrot"
    with pytest.raises(ValueError, match="folder of the VegFru release as --hierarchy"):
        _ = h.parents
    assert Hierarchy.from_dict(json.loads(json.dumps(h.to_dict()))) == h
    assert not pickle.loads(pickle.dumps(h)).has_parents


@pytest.mark.parametrize("spec", ["inat2021", "vegfru"])
def test_built_in_names_are_the_files(spec):
    assert (ROOT / f"hierarchy/{spec}.json").is_file()
    assert len(Hierarchy.load(spec).digest()) == 64


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


def test_classes_may_be_absent_and_are_numbers_then():
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
def test_errors_of_a_file_name_the_file_and_the_offender(change, words, tmp_path):
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


def test_from_folder_reads_a_folder_of_a_built_in_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "vegfru/cats/manx/1.jpg")
    assert Hierarchy.load("vegfru").num_classes == 292
    assert Hierarchy.from_folder("vegfru").classes == ("manx",)
    with pytest.raises(ValueError, match="no image folder 'inat2021'"):
        Hierarchy.from_folder("inat2021")


def test_missing_path_lists_what_there_is():
    with pytest.raises(ValueError, match="no hierarchy or path 'inat2020'.*inat2021, vegfru"):
        Hierarchy.load("inat2020")


def test_annotation_file_sorted_by_id(tmp_path):
    keys = ("kingdom", "phylum", "class", "order", "family", "genus", "specific_epithet")
    ranks = dict(zip(keys, SPECIES[0].split("_")[1:]))
    categories = [{"id": 1, "image_dir_name": SPECIES[1]}, {"id": 0, **ranks}]
    path = tmp_path / "val.json"
    path.write_text(json.dumps({"images": [], "categories": categories}))
    h = Hierarchy.load(path)
    assert h.classes == tuple(SPECIES[:2]) and h.superclasses == ("Arachnids", "Animalia")


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
def test_inaturalist_folder_by_the_rule(above, tmp_path):
    make(tmp_path, *(f"{above}/{name}/1.jpg" for name in SPECIES[::-1]))
    h = Hierarchy.load(tmp_path)
    assert h.classes == tuple(SPECIES) and h.num_super_classes == 11


def test_inaturalist_names_under_superclass_folders_are_two_levels(tmp_path):
    make(tmp_path, f"mine/{SPECIES[1]}/1.jpg", f"yours/{SPECIES[0]}/1.jpg")
    assert Hierarchy.load(tmp_path).superclasses == ("mine", "yours")


def test_one_level_needs_a_hierarchy_in_it_or_beside_it(tmp_path):
    root = make(tmp_path / "images", "manx/1.jpg", "pug/1.jpg", "beagle/1.jpg")
    with pytest.raises(ValueError, match="hierarchy.json in or beside it"):
        Hierarchy.load(root)
    (tmp_path / "hierarchy.json").write_text(json.dumps(PETS))
    assert Hierarchy.load(root).to_dict() == PETS
    (root / "hierarchy.json").write_text(json.dumps(pets(parents=[0, 1, 1])))
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
def test_folders_that_are_no_hierarchy(files, words, tmp_path):
    make(tmp_path, *files)
    with pytest.raises(ValueError, match=words):
        Hierarchy.load(tmp_path)


VEGFRU = {
    "veg200_images/carrot/v_13_01_0001.jpg": 12,
    "veg200_images/chive/v_01_02_0001.jpg": 0,
    "veg200_images/chive/v_01_02_0002.jpg": 0,
    "fru92_images/apple/f_09_01_0001.jpg": 23,
}


@pytest.mark.parametrize("base", [0, 1])
def test_vegfru_folder_in_the_order_of_the_release(base, tmp_path):
    make(tmp_path, *VEGFRU)
    (tmp_path / "vegfru_list").mkdir()
    lines = [f"{path} {label + base}\n" for path, label in VEGFRU.items()]
    (tmp_path / "vegfru_list/supvegfru_train.txt").write_text("".join(lines))
    h = Hierarchy.load(tmp_path)
    assert Hierarchy.load(tmp_path / "vegfru_list/supvegfru_train.txt") == h
    assert h.classes == ("carrot", "chive", "apple")
    assert [h.superclasses[p] for p in h.parents] == ["root_vegetable", "alliaceous", "pome"]
    assert h.superclasses == ("alliaceous", "root_vegetable", "pome")


def test_whole_vegfru_has_the_built_in_names(tmp_path):
    known = Hierarchy.load("vegfru")
    prefixes = [f"v_{i:02d}" for i in range(1, 16)] + [f"f_{i:02d}" for i in range(1, 11)]
    for i, name in enumerate(known.classes):
        prefix = prefixes[i % 15] if i < 200 else prefixes[15 + i % 10]
        folder = "veg200_images" if i < 200 else "fru92_images"
        make(tmp_path, f"{folder}/{name}/{prefix}_01_0001.jpg")
    h = Hierarchy.load(tmp_path)
    assert (h.classes, h.superclasses) == (known.classes, known.superclasses)
    assert h.parents.tolist() == [i % 15 if i < 200 else 15 + i % 10 for i in range(292)]


def test_vegfru_files_that_disagree(tmp_path):
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


@pytest.mark.parametrize(
    "query, label",
    [
        (7, 7),
        ("7", 7),
        ("007", 7),
        (SPECIES[3], 3),
        ("Vulpes vulpes", 7),
        ("vulpes_VULPES", 7),
        ("corax", 5),
        ("Corvidae", 5),
        ("bufo", 4),
        ("bellis", 11),
        (" Esox  lucius ", 3),
    ],
)
def test_find(query, label):
    assert Hierarchy.from_class_names(SPECIES).find(query) == label


def test_find_prefers_the_whole_taxon_at_the_end():
    h = Hierarchy(("red_fox", "fox", "foxglove", "flying_fox_bat"), ("all",), [0, 0, 0, 0])
    assert h.find("fox") == 1 and h.find("FOX") == 1 and h.find("Red") == 0 and h.find("glove") == 2
    assert Hierarchy(h.classes[2:] + h.classes[:1], ("all",), [0] * 3).find("fox") == 2


@pytest.mark.parametrize(
    "query, words",
    [
        ("Vulpes", "fits 2 classes .*Vulpes_lagopus.*Vulpes_vulpes"),
        ("Vulpes vulpis", "the nearest are '00007_.*Vulpes_vulpes'"),
        ("12", r"Class 12 is out of range: .* has 0\.\.11"),
        ("-1", "Class -1 is out of range"),
        ("qqqqqqq", "No class of .* is called 'qqqqqqq': it has"),
        ("", "No class"),
    ],
)
def test_find_says_what_is_near(query, words):
    with pytest.raises(ValueError, match=words):
        Hierarchy.from_class_names(SPECIES).find(query)


def test_find_in_numbers_asks_for_names():
    h = Hierarchy.load("inat2021")
    assert h.find("4618") == h.find("04618") == 4618
    with pytest.raises(ValueError, match="has only numbers.*annotation file"):
        h.find("Vulpes vulpes")


def test_find_refuses_a_number_that_is_another_class_name():
    h = Hierarchy(("0", "1", "10", "2"), ("all",), [0] * 4)
    with pytest.raises(ValueError, match="'2' is the name of class 3 .* 03 or 02"):
        h.find("2")
    assert h.find("03") == 3 and h.find("02") == 2 and h.find("10") == 2


def test_frozen_equal_by_content_and_copied():
    h = Hierarchy.from_dict(PETS)
    with pytest.raises(AttributeError):
        h.name = "other"
    other = Hierarchy(h.classes, h.superclasses, h.parents.clone(), "another name")
    assert h == other and hash(h) == hash(other)
    assert h != Hierarchy.from_dict(pets(parents=[0, 1, 1])) and h != "pets"
    assert pickle.loads(pickle.dumps(h)) == copy.deepcopy(h) == h
    assert repr(h) == "Hierarchy(pets: 3 / 2)"
