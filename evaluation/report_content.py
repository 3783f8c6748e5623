"""The content of a report: all metrics, the choices that they depend on, and notes about possible problems."""

import argparse
import platform
from dataclasses import dataclass
from importlib.metadata import version

from evaluation.comparison import (
    LEAST_EQUAL,
    ComparedSet,
    Floor,
    MeasuredSet,
    equal_size_metrics,
    group_metrics,
    overall_metrics,
)
from evaluation.features import why_not_comparable
from evaluation.image_sets import ImageSet
from evaluation.inputs import OpenedSets
from evaluation.memorisation import Memorisation, count_near_copies, memorisation_notes
from evaluation.metrics import KID_SUBSETS
from evaluation.neighbours import DENSITY_K, PRECISION_K
from evaluation.networks import Networks
from evaluation.notes import bias_notes, classifier_notes, copy_notes, floor_notes, image_notes, label_notes, size_notes
from evaluation.plan import SAMPLE
from evaluation.ranks import list_ranks
from evaluation.reports import OVERALL
from evaluation.saved_statistics import Statistics
from runtime.progress import progress_bar

FORMAT = "finediffusion-metrics-1"
PACKAGES = ("torch", "torchvision", "torch-fidelity", "lpips", "timm", "numpy", "pillow")


@dataclass
class Compared:
    """The sets of a comparison after their passes.

    real, fake     the two sets
    second         the second real set of --floor, if there is one
    memorisation   with --train
    """

    real: ComparedSet
    fake: ComparedSet
    second: MeasuredSet | None = None
    memorisation: Memorisation | None = None


def compute_rows(
    args: argparse.Namespace, opened: OpenedSets, compared: Compared, networks: Networks
) -> dict[str, dict]:
    """Return the metrics of every superclass, and of all images under OVERALL, which come last."""
    real, fake, second, groups = compared.real, compared.fake, compared.second, opened.groups
    names = {s: groups.superclasses[s] for s in opened.present} if groups else {}
    options = dict(seed=args.seed, floor=Floor(second) if args.floor else None)
    options["ranks"] = list_ranks(opened.hierarchy) if opened.hierarchy and networks.classifier else []
    rows = {}
    for s in progress_bar([*names, None], desc="distances", unit="row", leave=False):
        rows[names.get(s, OVERALL)] = group_metrics(real, fake, networks, s, **options)
    rows[OVERALL] |= overall_metrics(real, fake, networks)
    if networks.features:
        name = networks.features[0].name
        if isinstance(real, MeasuredSet) and isinstance(fake, MeasuredSet):
            rows[OVERALL]["near_copies"] = count_near_copies(real, fake, name)
        for s, row in equal_size_metrics(real, fake, name, opened.present, args.seed, second).items():
            rows[names[s]]["at_equal_n"] = row
    return rows


def list_choices(args: argparse.Namespace, compared: Compared, networks: Networks, size: int | None) -> dict:
    """Return every choice that the metrics depend on."""
    return {
        "seed": args.seed,
        "image_size": size,
        "crop": f"ADM's centre crop, {'both sides' if args.image_size else 'REAL alone'}",
        "networks": [network.record for network in networks.features],
        "lpips": networks.lpips and networks.lpips.record,
        "classifier": networks.classifier and networks.classifier.record,
        "features_kept": [each.kept for each in (compared.real, compared.fake)],
        "lpips_pairs": "all",
        "sample": SAMPLE,
        "kid_subsets": KID_SUBSETS,
        "neighbours": PRECISION_K,
        "density_neighbours": DENSITY_K,
        "least_at_equal_n": LEAST_EQUAL,
        "floor": args.floor,
        "rank": args.rank,
        "batch_size": args.batch_size,
    }


def describe_set(images: ImageSet, measured: ComparedSet) -> dict:
    """Return the record of a set for the report."""
    return {
        "path": str(images.path),
        "kind": images.kind,
        "n": measured.n(None),
        "pixels": measured.pixels(),
        "seconds": measured.seconds,
        "unreadable": measured.result.unreadable if isinstance(measured, MeasuredSet) else [],
    }


def build_report(args: argparse.Namespace, opened: OpenedSets, compared: Compared, networks: Networks) -> dict:
    """Compute all metrics and return the content of metrics.json."""
    both, second, sets = (compared.real, compared.fake), compared.second, opened.sets
    hierarchy, settings = opened.hierarchy, opened.settings
    rows = compute_rows(args, opened, compared, networks)
    memorisation = None
    if compared.memorisation:
        superclasses = {opened.groups.superclasses[s]: s for s in opened.present}
        labels = opened.train.images.labels if hierarchy else None
        memorisation = compared.memorisation.metrics(superclasses, labels)
    # Reasons not to compare them with published ones:
    reasons = list(filter(None, map(why_not_comparable, networks.all())))
    reasons += [
        f"{each.path} has no record of how it was made"
        for each in sets
        if isinstance(each, Statistics) and not each.record
    ]
    # Possible problems:
    notes = image_notes(sets, hierarchy, both)
    notes += copy_notes(rows[OVERALL], *sets)
    notes += label_notes(sets, hierarchy, settings) if hierarchy else []
    notes += classifier_notes(rows[OVERALL], hierarchy)
    notes += floor_notes(second, sets[0], *both, args.floor)
    notes += bias_notes(rows, both, networks)
    notes += size_notes(rows, opened.groups, args.rank)
    notes += memorisation_notes(memorisation, args.real, args.fake) if memorisation else []
    return {
        "format": FORMAT,
        "comparable": not reasons,
        "not_comparable": reasons,
        "overall": rows[OVERALL],
        "superclasses": {name: row for name, row in rows.items() if name != OVERALL},
        "notes": notes,
        **{name: describe_set(*each) for name, *each in zip(("real", "fake"), sets, both)},
        "floor": second and describe_set(opened.second.images, second),
        "memorisation": memorisation,
        "hierarchy": hierarchy and {"name": hierarchy.name, "sha256": hierarchy.keep().digest()},
        "choices": list_choices(args, compared, networks, opened.size),
        "sampling": settings,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
