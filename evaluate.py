"""Compare generated images with real ones: FID, KID, LPIPS and accuracy, also by superclass; precision and recall.

    python evaluate.py inat/val samples --output evaluation
    torchrun --nproc_per_node=8 evaluate.py inat/val samples.npz --hierarchy inat2021 --output evaluation

REAL and FAKE are folders of images, .npz files of images and labels, or saved statistics. docs/protocol.md describes
the protocol and its reasons.
"""

import runtime.quick_help  # noqa: F401, I001 - first: --help does not wait for the imports below
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from matplotlib.figure import Figure

from evaluation.closest_pairs import closest_pairs, pairs_csv, pairs_figure
from evaluation.comparison import ComparedSet, MeasuredSet, SavedSet
from evaluation.features import Network
from evaluation.image_pass import float64_device, moments_name, run_pass
from evaluation.image_sets import Pixels
from evaluation.inputs import OpenedSets, open_sets
from evaluation.memorisation import Memorisation
from evaluation.networks import Networks, check_networks, load_networks, recorded_networks
from evaluation.options import HALVES, parse_args
from evaluation.per_class import CLASSES_FILE, class_rows, classes_csv
from evaluation.plan import Plan, make_plan
from evaluation.report_content import Compared, build_report
from evaluation.reports import text_table, write_report
from evaluation.saved_statistics import save_adm, save_statistics
from evaluation.training_features import TrainingFeatures
from hierarchy import Hierarchy
from runtime.cli import run_command
from runtime.processes import agree, agree_in_turns, keep_process_group, start_processes

# ---- pass ----------------------------------------------------------------------------------------


def make_plans(
    args: argparse.Namespace, opened: OpenedSets, networks: Networks, dims: dict[Network, dict[str, int]]
) -> list[Plan | None]:
    """Return the plan of the pass over each set, and of the second real set; None for those without images.

    dims: of `Networks.output_dims`
    """
    parents = opened.groups.parents.numpy() if opened.groups else np.zeros(1, dtype=np.int64)
    options = dict(keep="all" if args.train else args.keep_features, seed=args.seed)
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
            superclasses = opened.groups and opened.groups.superclasses
            measured.append(SavedSet(opened.sets[i], superclasses, networks.features[0].name, lpips))
        else:
            measured.append(None)
    return measured


def measure_training(
    args: argparse.Namespace,
    opened: OpenedSets,
    networks: Networks,
    dims: dict[Network, dict[str, int]],
    state: PartialState,
) -> TrainingFeatures | None:
    """Compute the features of the training images that are not in their folder yet; None without --train."""
    if not opened.train:
        return None
    folder = Path(args.train_cache or Path(args.output) / "training-features")
    network = networks.features[0]
    training = TrainingFeatures(folder, opened.train, network, dims[network]["features"])
    training.compute(state, args.batch_size, args.num_workers, args.max_bad_images)
    return training


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


def more_files(
    opened: OpenedSets, compared: Compared, networks: Networks, device: torch.device
) -> tuple[dict[str, str], dict[str, Figure]]:
    """Return the texts and the figures of the report's other files, {name: content}: of classes and of closest pairs."""
    texts, figures, hierarchy = {}, {}, opened.hierarchy
    outputs = networks.classifier and networks.classifier.classes
    rows = class_rows(compared.real, compared.fake, hierarchy, outputs) if hierarchy else []
    if rows:
        texts[CLASSES_FILE] = classes_csv(rows)
    if compared.memorisation:
        pixels = dict(zip(("real", "fake"), opened.pixels))
        pairs = closest_pairs(compared.memorisation, pixels, hierarchy, networks.lpips, device)
        texts["pairs.csv"] = pairs_csv([pair for pair, _ in pairs])
        figures["pairs.png"] = pairs_figure(pairs)
    return texts, figures


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
    training = measure_training(args, opened, networks, dims, state)
    real, *fake, second = measure_sets(args, opened, networks, dims, state.device)
    keep_process_group()
    state.destroy_process_group()
    if not state.is_main_process:
        return
    print_times([real, *fake, second])

    # Save statistics, compute the metrics, write the report:
    if args.save_stats or args.save_adm:
        save_real(args, real, opened.pixels[0], networks, opened.groups, opened.size)
    if args.fake:
        memorisation = training and Memorisation(real, *fake, training)
        compared = Compared(real, *fake, second, memorisation)
        report = build_report(args, opened, compared, networks)
        print(text_table(report))
        if args.output:
            write_report(Path(args.output), report, *more_files(opened, compared, networks, state.device))


if __name__ == "__main__":
    run_command(main)
