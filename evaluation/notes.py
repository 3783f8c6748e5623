"""The notes of a report: sentences about possible problems with the images, their labels and the networks."""

import numpy as np

from evaluation.class_names import same_members
from evaluation.comparison import LEAST_EQUAL, ComparedSet, MeasuredSet
from evaluation.image_sets import Folder, ImageSet
from evaluation.networks import Networks
from evaluation.npz_sets import Arrays
from evaluation.options import LEAST_OF_NODE
from hierarchy import Hierarchy
from runtime.text import shorten

UNEQUAL = 0.1  # total variation distance of two sets' classes that is noted

# ---- images --------------------------------------------------------------------------------------


def image_notes(sets: list[ImageSet], hierarchy: Hierarchy | None, compared: list[ComparedSet]) -> list[str]:
    """Return sentences about possible problems with the images: layout, reading, compression, copies, classes.

    compared: the sets after their passes
    """
    notes = [note for each in sets if isinstance(each, Folder) for note in each.notes]
    with_images = [(each, measured) for each, measured in zip(sets, compared) if isinstance(measured, MeasuredSet)]
    lossy = [each for each, _ in with_images if each.count_lossy()]
    if len(with_images) == 2 and len(lossy) == 1:
        notes.append(
            f"{lossy[0].count_lossy():,} files of {lossy[0].path} have lossy compression, and none of the other set: FID is "
            "sensitive to it."
        )
    for each, measured in with_images:
        unreadable, enlarged = measured.result.unreadable, measured.result.enlarged
        if unreadable:
            notes.append(
                f"{len(unreadable):,} images of {each.path} cannot be read and are left out ({shorten(unreadable, str)})."
            )
        if enlarged:
            notes.append(
                f"{enlarged:,} images of {each.path} are smaller than {measured.size} pixels and were enlarged, which blurs them."
            )
        copies = len(measured.digests) - len(np.unique(measured.digests))
        if copies:
            notes.append(f"{copies:,} images of {each.path} are exact copies of other images in it.")
        single = int((np.bincount(measured.plan.labels) == 1).sum())
        if hierarchy and single:
            notes.append(f"{single:,} classes of {each.path} have one image: LPIPS within a class leaves them out.")
    if len(with_images) == 2:
        notes += pair_notes(*with_images, hierarchy)
    return notes


def pair_notes(
    real: tuple[ImageSet, MeasuredSet], fake: tuple[ImageSet, MeasuredSet], hierarchy: Hierarchy | None
) -> list[str]:
    """Return sentences about differences between two sets of images: copies, missing classes, shares of classes."""
    notes, labels = [], [measured.plan.labels for _, measured in (real, fake)]
    copies = int(np.isin(fake[1].digests, real[1].digests).sum())
    if copies:
        notes.append(f"{copies:,} images of {fake[0].path} are exact copies of images of {real[0].path}.")
    for (each, _), (other, _), here, there in ((real, fake, *labels), (fake, real, *labels[::-1])):
        missing = sorted(set(there.tolist()) - set(here.tolist()))
        if missing:
            names = shorten(hierarchy.classes[c] for c in missing)
            notes.append(f"{each.path} has no images of {len(missing):,} classes of {other.path} ({names}).")
    classes = max(map(max, labels)) + 1
    shares = [np.bincount(each, minlength=classes) / len(each) for each in labels]
    moved = abs(shares[0] - shares[1]).sum() / 2
    if hierarchy and moved > UNEQUAL:
        notes.append(
            f"The classes have other shares in {fake[0].path} than in {real[0].path}: {moved:.0%} of the images would have to "
            "change their class, and overall metrics compare the shares too."
        )
    return notes


def copy_notes(overall: dict, real: ImageSet, fake: ImageSet) -> list[str]:
    """Return a sentence if generated images are near copies of real ones; overall: the metrics of all images."""
    found = overall.get("near_copies")
    if not found:
        return []
    return [
        f"{found:,} images of {fake.path} are as close to an image of {real.path} as a changed copy: closer than a tenth of the "
        "distance that 99% of its images keep from each other, so FAKE may not be generated."
    ]


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
        if digest in [digest for other in known for digest in (other.digest(), other.keep().digest())]:
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


def bias_notes(rows: dict[str, dict], compared: list[ComparedSet], networks: Networks) -> list[str]:
    """Return a sentence for each network with more features than some row has images.

    rows: {"overall" or superclass: metrics}
    """
    notes = []
    for network in networks.features:
        width = compared[0].width(network.name)
        counts = {name: (row["n_real"], row["n_fake"]) for name, row in rows.items()}
        few = [name for name, both in counts.items() if any(n is not None and n < width for n in both)]
        if few:
            has_kid = all(isinstance(each, MeasuredSet) for each in compared)
            notes.append(
                f"{len(few)} {'row has' if len(few) == 1 else 'rows have'} fewer than {width:,} images, the features of "
                f"{network.name} ({shorten(few)}): the covariance is singular and much of the Frechet distance is bias"
                f"{', read KID instead' if has_kid else ''}."
            )
    return notes


def size_notes(rows: dict[str, dict], groups: Hierarchy | None, rank: str | None) -> list[str]:
    """Return sentences about superclasses that are too small for a row, or for metrics at equal n.

    rows: {"overall" or superclass: metrics}; groups: the hierarchy of the rows; rank: of --rank
    """
    names = list(groups.superclasses) if groups else []
    absent, notes = [name for name in names if name not in rows], []
    if rank and absent:
        notes.append(
            f"{len(absent):,} of {len(names):,} nodes of the rank {rank} have fewer than {LEAST_OF_NODE} images in a set and no "
            f"row ({shorten(absent)})."
        )
    given = [name for name in names if "at_equal_n" in rows.get(name, {})]
    small = [name for name in names if name in rows and name not in given]
    if given and small:
        notes.append(
            f"{len(small):,} rows have no recall, density and coverage at equal n, as a set has fewer than {LEAST_EQUAL} images "
            f"with features there ({shorten(small)})."
        )
    return notes


def floor_notes(
    second: MeasuredSet | None, images: ImageSet, real: ComparedSet, fake: ComparedSet, path: str
) -> list[str]:
    """Return sentences about the second set of real images, at `path`: too few images, copies of REAL.

    images, real: REAL before and after its pass
    """
    if second is None:
        return []
    notes, copies = [], 0 if real.digests is None else int(np.isin(second.digests, real.digests).sum())
    if second.n(None) < fake.n(None):
        notes.append(
            f"The floor is of {second.n(None):,} images of {path}, which has fewer than FAKE in some classes: with as many it "
            "would be lower."
        )
    if copies:
        notes.append(f"{copies:,} images of {path} are exact copies of images of {images.path}: the floor is too low.")
    return notes
