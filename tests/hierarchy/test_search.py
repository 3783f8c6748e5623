"""Finding a class by its label, its name or a part of its name."""

import pytest
from helpers.species import SPECIES

from hierarchy import Hierarchy


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


def test_find_prefers_complete_words_at_the_end():
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
def test_find_names_the_nearest_classes(query, words):
    with pytest.raises(ValueError, match=words):
        Hierarchy.from_class_names(SPECIES).find(query)


def test_find_needs_names():
    h = Hierarchy.load("inat2021")
    assert h.find("4618") == h.find("04618") == 4618
    with pytest.raises(ValueError, match="has only numbers.*annotation file"):
        h.find("Vulpes vulpes")


def test_find_refuses_a_number_that_is_another_class_name():
    h = Hierarchy(("0", "1", "10", "2"), ("all",), [0] * 4)
    with pytest.raises(ValueError, match="'2' is the name of class 3 .* 03 or 02"):
        h.find("2")
    assert h.find("03") == 3 and h.find("02") == 2 and h.find("10") == 2
