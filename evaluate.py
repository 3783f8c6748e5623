"""Compare generated images with real ones: FID, KID, LPIPS and accuracy, also by superclass; precision and recall.

    python evaluate.py inat/val samples --output evaluation
    torchrun --nproc_per_node=8 evaluate.py inat/val samples.npz --hierarchy inat2021 --output evaluation

REAL and FAKE are folders of images, .npz files of images and labels, or saved statistics. docs/protocol.md describes
the protocol and its reasons.
"""

import runtime.quick_help  # noqa: F401, I001 - first: --help does not wait for the imports below
import argparse
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from evaluation.comparison import (
    NEIGHBOURS,
    ComparedSet,
    Floor,
    MeasuredSet,
    SavedSet,
    group_metrics,
    overall_metrics,
)
from evaluation.features import Network, why_not_comparable
from evaluation.image_pass import float64_device, moments_name, run_pass
from evaluation.image_sets import ImageSet, Pixels, check_sets, choose_hierarchy, open_pixels, open_second, open_set
from evaluation.metrics import KID_SUBSETS
from evaluation.networks import Networks, check_networks, load_networks, recorded_networks
from evaluation.notes import bias_notes, classifier_notes, floor_notes, image_notes, label_notes
from evaluation.options import HALVES, check_settings, parse_args
from evaluation.plan import SAMPLE, Plan, make_plan
from evaluation.reports import OVERALL, text_table, write_report
from evaluation.samples import check_complete, read_sample_settings
from evaluation.saved_statistics import Statistics, save_adm, save_statistics
from hierarchy import Hierarchy
from runtime.cli import run_command
from runtime.processes import agree, agree_in_turns, keep_process_group, start_processes
from runtime.progress import progress_bar

FORMAT = "finediffusion-metrics-1"
PACKAGES = ("torch", "torchvision", "torch-fidelity", "lpips", "timm", "numpy", "pillow")


# ---- sets ----------------------------------------------------------------------------------------


@dataclass
class OpenedSets:
    """The sets of the command line, labelled.

    sets       REAL and FAKE, or REAL alone
    hierarchy  None if all images are one class
    present    superclasses that the sets have
    settings   of the sampling of FAKE, None if unknown
    size       pixels per side of the images, None if there are none
    pixels     of each set, None for statistics
    second     images of --floor DIR, chosen to match FAKE
    """

    sets: list[ImageSet]
    hierarchy: Hierarchy | None
    present: list[int]
    settings: dict | None
    size: int | None
    pixels: list[Pixels | None]
    second: Pixels | None = None


def open_sets(args: argparse.Namespace) -> OpenedSets:
    """Check the flags, open the sets, label their images, and decide how to crop them."""
    check_settings(args)
    sets = [open_set(path, args.trust_stats) for path in (args.real, args.fake) if path]
    hierarchy = choose_hierarchy(args.hierarchy, sets)
    for each in sets:
        each.label(hierarchy)
    present = check_sets(sets, hierarchy)
    if isinstance(sets[0], Statistics) and (args.save_stats or args.save_adm):
        raise ValueError(f"{args.real} holds statistics, expected images to make statistics of: drop the flag.")
    if isinstance(sets[0], Statistics) and args.floor == HALVES:
        raise ValueError(
            f"{args.real} holds statistics, expected images to halve for --floor: name a second folder with --floor DIR, or "
            "drop the flag."
        )
    settings = read_sample_settings(args.fake) if args.fake else None
    if settings:
        check_complete(sets[1], settings)
    opened = OpenedSets(sets, hierarchy, present, settings, *open_pixels(sets, args.image_size))
    if args.floor not in (None, HALVES):
        opened.second = Pixels(open_second(args.floor, sets[1], hierarchy, args.seed), opened.size, crop=True)
    return opened


# ---- pass ----------------------------------------------------------------------------------------


def make_plans(
    args: argparse.Namespace, opened: OpenedSets, networks: Networks, dims: dict[Network, dict[str, int]]
) -> list[Plan | None]:
    """Return the plan of the pass over each set, and of the second real set; None for those without images.

    dims: of `Networks.output_dims`
    """
    parents = opened.hierarchy.parents.numpy() if opened.hierarchy else np.zeros(1, dtype=np.int64)
    options = dict(keep=args.keep_features, seed=args.seed)
    options["dims"] = sum(dims[network]["features"] for network in networks.features)
    options["lpips_dims"] = dims[networks.lpips]["features"] if networks.lpips else 0

    def plan(images, **more):
        return None if images.labels is None else make_plan(images.labels, parents, **options, **more)

    def count(superclass):
        return np.bincount(superclass, minlength=parents.max() + 1)

    real, *fake = opened.sets
    if args.floor == HALVES and fake:
        # halves of REAL with at most as many images as FAKE, then as many images of FAKE as a half has
        most = real.labels if fake[0].labels is None else fake[0].labels
        plans = [plan(real, half_sizes=count(parents[most]))]
        plans.append(plan(fake[0], half_sizes=count(plans[0].superclass[plans[0].half == 0]), one_half=True))
    else:
        plans = [plan(each) for each in opened.sets]
    return [*plans, opened.second and plan(opened.second.images)]


def measure_sets(
    args: argparse.Namespace,
    opened: OpenedSets,
    networks: Networks,
    dims: dict[Network, dict[str, int]],
    device: torch.device,
) -> list[ComparedSet | None]:
    """Run the passes over the sets and the second real set; saved statistics need none.

    Return None for each set of images on all processes but the main one, and for a second set that is not given.
    """
    plans = make_plans(args, opened, networks, dims) if dims else [None] * 3
    measured = []
    for i, (plan, images) in enumerate(zip(plans, [*opened.pixels, opened.second])):
        if images is not None:
            limit = max(1, len(images) // 100) if args.max_bad_images is None else args.max_bad_images
            used = networks if images is not opened.second else Networks(networks.features)
            options = dict(title=images.images.path.name, max_bad_images=limit)
            result = run_pass(images, plan, used, device, args.batch_size, args.num_workers, **options)
            measured.append(result and MeasuredSet(result, opened.size, float64_device(device)))
        elif i < len(opened.sets):
            lpips = networks.lpips and networks.lpips.record
            superclasses = opened.hierarchy and opened.hierarchy.superclasses
            measured.append(SavedSet(opened.sets[i], superclasses, networks.features[0].name, lpips))
        else:
            measured.append(None)
    return measured


def print_times(measured: list[ComparedSet | None]):
    """Print how long each pass took, and how long outside the networks."""
    for name, each in zip(("real", "fake", "floor"), measured):
        if each and each.seconds:
            total, outside = each.seconds["total"], each.seconds["total"] - each.seconds["network"]
            print(
                f"{name}: {each.n(None):,} images in {total:.1f} s, {outside:.1f} s outside the networks",
                file=sys.stderr,
            )


# ---- saved statistics ----------------------------------------------------------------------------


def save_real(
    args: argparse.Namespace,
    real: MeasuredSet,
    images: Pixels,
    networks: Networks,
    hierarchy: Hierarchy | None,
    size: int,
):
    """Write the files of --save-stats and --save-adm."""
    network = networks.features[0]
    groups = {None: None} | ({name: s for s, name in enumerate(hierarchy.superclasses)} if hierarchy else {})
    if args.save_stats:
        gaussians = {name: real.gaussian(network.name, s) for name, s in groups.items()}
        lpips = networks.lpips and {
            "network": networks.lpips.record,
            "overall": real.diversity(None, args.seed),
            "superclasses": {name: real.diversity(s, args.seed) for name, s in groups.items() if name and real.n(s)},
        }
        record = {"network": network.record, "crop": size, "pixels": real.pixels(), "lpips": lpips}
        save_statistics(args.save_stats, gaussians, record, hierarchy)
    if args.save_adm:
        rows, spatial = real.result.rows[real.plan.sampled], real.gaussian(moments_name(network.name, "spatial"), None)
        save_adm(args.save_adm, images, real.gaussian(network.name, None), spatial, rows, size)


# ---- report --------------------------------------------------------------------------------------


def list_choices(args: argparse.Namespace, compared: list[ComparedSet], networks: Networks, size: int | None) -> dict:
    """Return every choice that the metrics depend on."""
    return {
        "seed": args.seed,
        "image_size": size,
        "crop": f"ADM's centre crop, {'both sides' if args.image_size else 'REAL alone'}",
        "networks": [network.record for network in networks.features],
        "lpips": networks.lpips and networks.lpips.record,
        "classifier": networks.classifier and networks.classifier.record,
        "features_kept": [each.kept for each in compared],
        "lpips_pairs": "all",
        "sample": SAMPLE,
        "kid_subsets": KID_SUBSETS,
        "neighbours": NEIGHBOURS,
        "floor": args.floor,
        "batch_size": args.batch_size,
    }


def describe_set(images: ImageSet, measured: ComparedSet) -> dict:
    """Return what the report says about a set."""
    return {
        "path": str(images.path),
        "kind": images.kind,
        "n": measured.n(None),
        "pixels": measured.pixels(),
        "seconds": measured.seconds,
        "unreadable": measured.result.unreadable if isinstance(measured, MeasuredSet) else [],
    }


def build_report(
    args: argparse.Namespace,
    opened: OpenedSets,
    compared: list[ComparedSet],
    second: MeasuredSet | None,
    networks: Networks,
) -> dict:
    """Compute all metrics and return the content of metrics.json.

    second: the second real set of the floor
    """
    (real, fake), sets, hierarchy, settings = compared, opened.sets, opened.hierarchy, opened.settings
    # Metrics:
    floor = Floor(second) if args.floor else None
    options, rows = dict(seed=args.seed, floor=floor), {}
    groups = {**{hierarchy.superclasses[s]: s for s in opened.present}, OVERALL: None} if hierarchy else {OVERALL: None}
    for name, s in progress_bar(groups.items(), desc="distances", unit="row", leave=False):
        rows[name] = group_metrics(real, fake, networks, s, **options)
    rows[OVERALL] |= overall_metrics(real, fake, networks)
    # Reasons not to compare them with published ones:
    reasons = list(filter(None, map(why_not_comparable, networks.all())))
    reasons += [
        f"{each.path} has no record of how it was made"
        for each in sets
        if isinstance(each, Statistics) and not each.record
    ]
    # Possible problems:
    notes = image_notes(sets, hierarchy, compared)
    notes += label_notes(sets, hierarchy, settings) if hierarchy else []
    notes += classifier_notes(rows[OVERALL], hierarchy)
    notes += floor_notes(second, sets[0], real, fake, args.floor)
    notes += bias_notes(rows, compared, networks)
    return {
        "format": FORMAT,
        "comparable": not reasons,
        "not_comparable": reasons,
        "overall": rows[OVERALL],
        "superclasses": {name: row for name, row in rows.items() if name != OVERALL},
        "notes": notes,
        **{name: describe_set(*each) for name, *each in zip(("real", "fake"), sets, compared)},
        "floor": second and describe_set(opened.second.images, second),
        "hierarchy": hierarchy and {"name": hierarchy.name, "sha256": hierarchy.digest()},
        "choices": list_choices(args, compared, networks, opened.size),
        "sampling": settings,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


# ---- the command ---------------------------------------------------------------------------------


def load_and_check(
    args: argparse.Namespace, opened: OpenedSets, device: torch.device
) -> tuple[Networks, dict[Network, dict[str, int]]]:
    """Load the networks and return them with their `output_dims`, {} if there are no images to compare."""
    if any(opened.pixels):
        networks = load_networks(args, device)
        dims = networks.output_dims(opened.size, device)
    else:
        networks, dims = recorded_networks(opened.sets[0]), {}
    check_networks(networks, opened.sets, dims, opened.size, opened.hierarchy)
    return networks, dims


def main():
    """Compare the sets of the command line; print the table and write the report."""
    args = parse_args(__doc__.split("\n")[0])

    # Set up processes:
    state = start_processes()
    torch.backends.cudnn.allow_tf32 = False  # with it, features would differ between GPUs by more than rounding

    # Open the sets, load the networks:
    opened = agree(state, open_sets, args)
    networks, dims = agree_in_turns(state, load_and_check, args, opened, state.device)

    # Run the images through the networks:
    *compared, second = measure_sets(args, opened, networks, dims, state.device)
    keep_process_group()
    state.destroy_process_group()
    if not state.is_main_process:
        return
    print_times([*compared, second])

    # Save statistics, compute the metrics, write the report:
    if args.save_stats or args.save_adm:
        save_real(args, compared[0], opened.pixels[0], networks, opened.hierarchy, opened.size)
    if args.fake:
        report = build_report(args, opened, compared, second, networks)
        print(text_table(report))
        if args.output:
            write_report(Path(args.output), report)


if __name__ == "__main__":
    run_command(main)
