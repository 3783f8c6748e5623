"""The notes of a report: sentences about possible problems with the images, their labels and the networks."""

import numpy as np

from evaluation.class_names import same_members
from evaluation.image_sets import Folder, ImageSet
from evaluation.npz_sets import Arrays
from hierarchy import Hierarchy
from runtime.text import shorten

# ---- images --------------------------------------------------------------------------------------


def image_notes(sets: list[ImageSet], hierarchy: Hierarchy | None, digests: list[np.ndarray | None]) -> list[str]:
    """Return sentences about possible problems with the images: compression, copies, missing classes.

    digests: (N,) of each set's pixels, None for statistics
    """
    notes = []
    with_images = [(each, digest) for each, digest in zip(sets, digests) if digest is not None]
    lossy = [each for each, _ in with_images if each.count_lossy()]
    if len(with_images) == 2 and len(lossy) == 1:
        notes.append(
            f"{lossy[0].count_lossy():,} files of {lossy[0].path} have lossy compression, and none of the other set: FID is "
            "sensitive to it."
        )
    for each, digest in with_images:
        copies = len(digest) - len(np.unique(digest))
        if copies:
            notes.append(f"{copies:,} images of {each.path} are exact copies of other images in it.")
        single = int((np.bincount(each.labels) == 1).sum())
        if hierarchy and single:
            notes.append(f"{single:,} classes of {each.path} have one image: LPIPS within a class leaves them out.")
    if len(with_images) == 2:
        (real, real_digest), (fake, fake_digest) = with_images
        copies = int(np.isin(fake_digest, real_digest).sum())
        if copies:
            notes.append(f"{copies:,} images of {fake.path} are exact copies of images of {real.path}.")
        for each, other in ((real, fake), (fake, real)):
            missing = sorted(set(other.labels.tolist()) - set(each.labels.tolist()))
            if missing:
                names = shorten(hierarchy.classes[c] for c in missing)
                notes.append(f"{each.path} has no images of {len(missing):,} classes of {other.path} ({names}).")
    return notes


# ---- labels --------------------------------------------------------------------------------------


def label_notes(sets: list[ImageSet], hierarchy: Hierarchy, settings: dict | None) -> list[str]:
    """Return a sentence for each .npz file whose labels no names of classes confirm.

    sets: REAL and FAKE
    settings: of the sampling of FAKE, None if unknown
    """
    notes = []
    for each, sampled in zip(sets, (None, settings)):
        if not isinstance(each, Arrays) or each.by_name:
            continue
        digest = (sampled or {}).get("hierarchy")
        known = [hierarchy, *(own for own in map(own_hierarchy, sets) if own and same_members(own, hierarchy))]
        if digest in [other.digest() for other in known]:
            continue
        if each.classes is None and digest:
            reason = f"was sampled with another hierarchy than {hierarchy.name}, and its labels have no names"
        else:
            reason = f"has numbers for classes, whose order is taken from {hierarchy.name}"
        notes.append(f"{each.path} {reason}: check that label k means class k there.")
    return notes


def own_hierarchy(images: ImageSet) -> Hierarchy | None:
    """Return the hierarchy of a folder, None if it defines none."""
    try:
        return images.own_hierarchy() if isinstance(images, Folder) and images.labelled else None
    except ValueError:
        return None


# ---- networks ------------------------------------------------------------------------------------

POOR_ACCURACY = 0.1  # top-1 accuracy on real images below which a classifier cannot judge generated ones


def classifier_notes(overall: dict, hierarchy: Hierarchy | None) -> list[str]:
    """Return a sentence if the classifier is near chance on the real images.

    overall: the metrics of all images
    """
    found = overall.get("top1_real")
    if found is None or found >= max(POOR_ACCURACY, 2 / hierarchy.num_classes):
        return []
    return [
        f"The classifier finds the class of {found:.1%} of the real images, and chance of {1 / hierarchy.num_classes:.1%}: its "
        "classes may be in another order, which a file of their names beside it would settle."
    ]
