"""The folder of --train: opened and checked."""

import numpy as np

from evaluation.image_sets import Folder, ImageSet, open_set
from evaluation.saved_statistics import Statistics
from hierarchy import Hierarchy
from runtime.text import shorten


def open_training(path: str, sets: list[ImageSet], hierarchy: Hierarchy | None) -> Folder:
    """Open the folder of training images and label them.

    sets: REAL and FAKE, labelled

    Raises ValueError if it is not a folder, if it is REAL or FAKE, if one of these holds statistics, or if it lacks classes
    that FAKE has.
    """
    for each in sets:
        if isinstance(each, Statistics):
            raise ValueError(f"{each.path} holds statistics, expected images to compare with --train: name the images.")
    train = open_set(path)
    if not isinstance(train, Folder):
        raise ValueError(f"--train is {path}, expected a folder of training images: name a folder.")
    for name, each in zip(("REAL", "FAKE"), sets):
        if train.path.resolve() == each.path.resolve():
            raise ValueError(
                f"--train is {path}, which is {name} too, expected the images that the model was trained on: name their folder."
            )
    train.label(hierarchy)
    missing = np.setdiff1d(sets[1].labels, train.labels)
    if len(missing):
        raise ValueError(
            f"{path} has no images of {len(missing)} classes of {sets[1].path} "
            f"({shorten(hierarchy.classes[c] for c in missing)}), expected the images that the model was trained on: name their "
            "folder."
        )
    if len(train) < 2:
        raise ValueError(f"{path} has 1 image, expected the images that the model was trained on: name their folder.")
    return train
