"""Classes are matched by name: of .npz files, of saved statistics, and of iNaturalist's two kinds of names."""

import json

import numpy as np
import pytest
import torch
from helpers.species import SPECIES
from helpers.tiny_models import PETS, THREE_PETS, refusal

from evaluation.class_names import match_names, same_members
from evaluation.image_sets import open_set
from evaluation.metrics import Gaussian
from evaluation.notes import label_notes
from evaluation.saved_statistics import save_statistics
from hierarchy import Hierarchy
from hierarchy.checks import numbered_names

OWN = Hierarchy.from_class_names(SPECIES)
NUMBERED = Hierarchy(numbered_names(len(SPECIES)), OWN.superclasses, OWN.parents, "numbered")
PART = Hierarchy.from_class_names(SPECIES[5:8])  # 00005, 00006, 00007


def npz(path, labels, hierarchy=None):
    """Write images of 2 pixels with these labels, and with the names of the hierarchy's classes."""
    names = {} if hierarchy is None else {"classes": np.array(hierarchy.classes)}
    np.savez(path, arr_0=np.zeros((len(labels), 2, 2, 3), np.uint8), arr_1=np.array(labels), **names)
    return open_set(path)


@pytest.mark.parametrize(
    "own, hierarchy, labels, by_name",
    [
        (PETS, PETS, range(5), True),
        (THREE_PETS, Hierarchy(("pug", "beagle"), ("x",), [0, 0]), [1, -1, 0], True),
        (OWN, NUMBERED, range(12), True),
        (NUMBERED, OWN, range(12), True),
        (PART, NUMBERED, [5, 6, 7], True),  # some of iNaturalist's folders
        (NUMBERED, PART, [-1] * 5 + [0, 1, 2] + [-1] * 4, True),
        (Hierarchy(numbered_names(3), ("x",), [0] * 3), PART, range(3), False),  # the numbers may be labels
        (Hierarchy(numbered_names(5), ("x",), [0] * 5), PETS, range(5), False),
        (Hierarchy(numbered_names(4), ("x",), [0] * 4), PETS, [-1] * 4, False),
        (Hierarchy(numbered_names(4), ("x",), [0] * 4), NUMBERED, [-1] * 4, False),
    ],
)
def test_classes_are_matched_by_name(own, hierarchy, labels, by_name):
    found = match_names(own.classes, hierarchy)
    assert found.labels.tolist() == list(labels) and found.by_name is by_name


def test_labels_of_an_npz_follow_the_names_in_it(tmp_path):
    turned = Hierarchy(PETS.classes[::-1], PETS.superclasses, PETS.parents.flip(0), "turned")
    images = npz(tmp_path / "x.npz", [0, 4, 4, 1], turned)
    images.label(PETS)
    assert images.labels.tolist() == [4, 0, 0, 3] and not label_notes([images], PETS, None)
    images = npz(tmp_path / "x.npz", [0, 2], turned)  # puma, pug
    with refusal("x.npz has images of 1 classes that .* lacks \\('puma'\\)", "expected|pass the --hierarchy"):
        images.label(THREE_PETS)
    # the names of the classes are checked
    for names in (["a", "a", "b"], ["a", "b"], [["a"], ["b"], ["c"]]):
        np.savez(tmp_path / "y.npz", arr_0=np.zeros((3, 2, 2, 3), np.uint8), arr_1=[0, 1, 2], classes=names)
        with refusal("y.npz has classes of the shape", "labels up to 2", "write it again"):
            open_set(tmp_path / "y.npz")


def test_labels_without_names_give_a_note_unless_the_settings_confirm_them(tmp_path):
    images = npz(tmp_path / "x.npz", [0, 5, 11])
    images.label(NUMBERED)
    (note,) = label_notes([images], NUMBERED, None)
    assert "has numbers for classes" in note and "label k means class k" in note
    # sampled from an adapter that was trained on iNaturalist's own folders, REAL is such a folder
    for name in SPECIES:
        (tmp_path / "real" / name).mkdir(parents=True)
    real, settings = open_set(tmp_path / "real"), {"hierarchy": OWN.digest()}
    assert not label_notes([real, images], NUMBERED, settings)
    assert not label_notes([real, images], OWN, settings)
    (note,) = label_notes([real, images], NUMBERED, {"hierarchy": "0" * 64})
    assert "was sampled with another hierarchy than numbered" in note
    # and an npz with numbers for names
    images = npz(tmp_path / "y.npz", [0, 1], Hierarchy(numbered_names(5), ("x",), [0] * 5))
    images.label(PETS)
    assert len(label_notes([images], PETS, None)) == 1


def test_statistics_are_matched_by_the_members_of_superclasses(tmp_path):
    gaussian = Gaussian(9, torch.zeros(4), torch.eye(4))
    gaussians = {None: gaussian, **dict.fromkeys(OWN.superclasses, gaussian)}
    save_statistics(tmp_path / "stats.npz", gaussians, {"network": {}, "crop": 8}, OWN)
    statistics = open_set(tmp_path / "stats.npz")
    statistics.label(OWN)
    statistics.label(NUMBERED)  # the same classes, as the built-in hierarchy calls them
    shuffled = Hierarchy(OWN.classes, OWN.superclasses, OWN.parents.roll(1), "shuffled")
    for other in (shuffled, PART):
        assert not same_members(OWN, other)
        with refusal(
            "stats.npz has other superclasses than", "or other classes in them", "--hierarchy it was made with"
        ):
            statistics.label(other)
    with np.load(tmp_path / "stats.npz") as file:
        assert json.loads(str(file["record"]))["hierarchy"]["classes"] == SPECIES
