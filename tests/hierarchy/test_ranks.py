"""Ranks between superclasses and classes: JSON files, deep folders, iNaturalist's names, and invalid trees."""

import json

import pytest
import torch
from helpers.species import SPECIES
from helpers.tiny_models import make, refusal

from dataset.listing import list_files
from hierarchy import Hierarchy
from hierarchy.archive import pack_hierarchy, unpack_hierarchy

NAMES = {
    "classes": ["lion", "fox", "wolf"],
    "ranks": {"order": ["A", "A", "A"], "genus": ["Panthera", "Vulpes", "Canis"]},
}
PARENTS = {
    "classes": {"lion": "Panthera", "fox": "Vulpes", "wolf": "Canis"},
    "ranks": {"order": ["A"], "genus": {"Panthera": "A", "Canis": "A", "Vulpes": "A"}},
}
SHOP = ["food/fruit/apple/1.jpg", "food/fruit/pear/1.jpg", "food/root/beet/1.jpg", "tools/root/spade/1.jpg"]


def load(tmp_path, record):
    path = tmp_path / "ranks.json"
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return Hierarchy.load(path)


# ---- forms ---------------------------------------------------------------------------------------


def test_ranks_are_names_per_class_or_parents(tmp_path):
    one, two = (load(tmp_path, record) for record in (NAMES, PARENTS))
    assert one == two and [tier.name for tier in one.tiers] == ["order", "genus"]
    assert one.superclasses == ("A",) and one.ranks[0].nodes == ("Panthera", "Vulpes", "Canis")
    assert one.ancestors.tolist() == [[0, 0, 0], [0, 1, 2]] and repr(one) == "Hierarchy(ranks: 3 / 3 / 1)"
    further = load(tmp_path, {"superclasses": ["x"], "parents": [0, 0, 0], **NAMES})
    assert [tier.name for tier in further.tiers] == ["superclass", "order", "genus"]


@pytest.mark.parametrize(
    "wanted, tiers", [((), ["order"]), (("genus",), ["genus"]), (("genus", "superclass"), ["order", "genus"])]
)
def test_kept_ranks_survive_the_file_of_weights(tmp_path, wanted, tiers):
    kept = load(tmp_path, NAMES).keep(*wanted)
    assert [tier.name for tier in kept.tiers] == tiers and kept.superclasses == kept.tiers[0].nodes
    assert Hierarchy.from_dict(unpack_hierarchy(pack_hierarchy(kept.to_dict()))) == kept
    with refusal("ranks has no rank 'tribe', expected one of order, genus"):
        load(tmp_path, NAMES).keep("tribe")


def test_deep_folders_have_a_rank_per_level(tmp_path):
    make(tmp_path / "shop", *SHOP)
    h = Hierarchy.load(tmp_path / "shop")
    assert [(tier.name, tier.nodes) for tier in h.tiers] == [
        ("superclass", ("food", "tools")),
        ("level2", ("fruit", "root (food)", "root (tools)")),  # homonyms are two nodes
    ]
    assert h.classes == ("apple", "pear", "beet", "spade") and h.ancestors.tolist() == [[0, 0, 0, 1], [0, 0, 1, 2]]
    assert h.keep() == Hierarchy(h.classes, ("food", "tools"), [0, 0, 0, 1])
    make(tmp_path / "shop", "food/fruit/apple/old/1.jpg")  # folders beside images are ignored, as they were
    assert Hierarchy.load(tmp_path / "shop") == h


def test_inaturalists_ranks():
    h = Hierarchy.from_class_names(SPECIES)
    assert [tier.name for tier in h.tiers] == [
        "superclass",
        "class",
        "order",
        "family",
        "genus",
    ] and h.leaf == "species"
    assert [h.tiers[tier].nodes[h.ancestors[tier, 7]] for tier in range(5)] == [
        *("Mammals", "Mammalia", "Carnivora", "Canidae", "Vulpes")
    ]
    built_in = Hierarchy.load("inat2021", counted=True)
    assert [len(tier.nodes) for tier in built_in.tiers] == [11, 51, 273, 1103, 4900] and built_in.has_parents
    with refusal("inat2021 has the number of nodes of rank class, but not the node of each class"):
        _ = built_in.ancestors
    assert built_in.keep().ancestors[0].equal(built_in.parents)


# ---- invalid trees -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record, words",
    [
        (
            {"classes": ["a", "b"], "ranks": {"order": ["X", "Y"], "genus": ["G", "G"]}},
            "genus 'G' is in order 'X' and, with class 'b', in 'Y', expected one parent",
        ),
        (
            '{"classes": {"a": "G", "b": "G"}, "ranks": {"order": ["X", "Y"], "genus": {"G": "X", "G": "Y"}}}',
            "genus has 'G' twice, expected one parent",
        ),
        (
            {"classes": {"a": "G"}, "ranks": {"order": ["X"], "genus": {"G": "G"}}},  # a cycle
            "genus 'G' has parent 'G', expected a name in order, the rank above",
        ),
        (
            {"classes": {"a": "X"}, "ranks": {"order": ["X"], "genus": {"G": "X"}}},  # skips a rank
            "class 'a' has parent 'X', expected a name in genus",
        ),
        (
            {"classes": {"a": "G"}, "ranks": {"order": ["X", "Y"], "genus": {"G": "X"}}},
            "order 'Y' has no genus, expected at least one",
        ),
        ({"classes": ["a", "b"], "ranks": {"order": ["X", ""]}}, "class 1 has order '', expected a name: no rank"),
        ({"classes": ["a", "b"], "ranks": {"order": ["X"]}}, "rank order is \\['X'\\], expected a list of 2 names"),
        ({"classes": ["a"], "ranks": {"my order": ["X"]}}, "the ranks are \\['my order'\\], expected different names"),
        ({"classes": ["a"], "ranks": {"null": ["X"]}}, "the ranks are \\['null'\\]"),
        ({"classes": ["a"], "ranks": []}, "'ranks' is \\[\\] and 'classes' \\['a'\\], expected an object"),
        (
            {"classes": {"a": "X"}, "ranks": {"order": {"X": "Y"}}},
            "rank order is .*, expected a list of names, as it is",
        ),
        ({"classes": {"a": ["X"]}, "ranks": {"order": ["X"]}}, "class 'a' has parent \\['X'\\], expected a name"),
        ({"superclasses": ["x"], "parents": [0], "ranks": {"superclass": ["y"]}}, "expected different names"),
    ],
)
def test_invalid_trees_are_refused(tmp_path, record, words):
    with refusal(words):
        load(tmp_path, record)


def test_folders_of_unequal_depth_are_refused(tmp_path):
    make(tmp_path, *SHOP[:2], "tools/hammer/1.jpg")
    with refusal("food/fruit has no images"):  # its level has images elsewhere
        list_files(tmp_path, Hierarchy.load(tmp_path))
    make(tmp_path / "other", "food/fruit/apple/1.jpg", "food/root/1.txt")
    with refusal("'food/fruit' has folders in it and 'food/root' has none"):
        Hierarchy.load(tmp_path / "other")


def test_a_rank_with_a_single_node_and_a_million_classes_are_handled():
    million = Hierarchy.from_dict(
        {
            "classes": [str(i) for i in range(10**6)],
            "ranks": {"order": ["one"] * 10**6, "genus": [str(i // 10) for i in range(10**6)]},
        }
    )
    assert [len(tier.nodes) for tier in million.tiers] == [1, 100_000]
    assert million.ancestors[1].equal(torch.arange(10**6) // 10)
