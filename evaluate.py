"""Compare generated images with real ones: FID, KID, LPIPS, precision, recall, accuracy; overall and by superclass.

    python evaluate.py inat/val samples --output evaluation
    torchrun --nproc_per_node=8 evaluate.py inat/val samples.npz --hierarchy inat2021 --output evaluation

REAL and FAKE are folders of images, .npz files of images and labels, or saved statistics. docs/protocol.md describes
the protocol and its reasons.
"""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from evaluation.comparison import (
    FEW_IMAGES,
    NEIGHBOURS,
    ComparedSet,
    MeasuredSet,
    SavedSet,
    group_metrics,
    overall_metrics,
)
from evaluation.features import Network, why_not_comparable
from evaluation.image_pass import float64_device, moments_name, run_pass
from evaluation.image_sets import (
    Folder,
    ImageSet,
    Pixels,
    check_sets,
    choose_hierarchy,
    open_pixels,
    open_set,
)
from evaluation.metrics import KID_SUBSETS
from evaluation.networks import Networks, check_networks, load_networks, recorded_networks
from evaluation.notes import classifier_notes, image_notes, label_notes
from evaluation.options import check_settings, parse_args
from evaluation.plan import SAMPLE, make_plan
from evaluation.reports import text_table, write_report
from evaluation.saved_statistics import Statistics, save_adm, save_statistics
from hierarchy import Hierarchy
from runtime.cli import run_command
from runtime.processes import keep_process_group, start_processes
from runtime.text import one_line, shorten

FORMAT = "finediffusion-metrics-1"
PACKAGES = ("torch", "torchvision", "torch-fidelity", "lpips", "timm", "numpy", "pillow")


# ---- pass ----------------------------------------------------------------------------------------


def measure_set(
    args: argparse.Namespace,
    sets: list[ImageSet],
    i: int,
    images: Pixels | None,
    networks: Networks,
    dims: dict[Network, dict[str, int]],
    hierarchy: Hierarchy | None,
    device: torch.device,
) -> ComparedSet | None:
    """Run the pass over set i; saved statistics need none. Return None on all processes but the main one.

    images: its `Pixels`, None for statistics
    dims: of `Networks.output_dims`
    """
    if images is None:
        superclasses, lpips = hierarchy and hierarchy.superclasses, networks.lpips and networks.lpips.record
        return SavedSet(sets[i], superclasses, networks.features[0].name, lpips)
    labels = sets[i].labels
    parents = hierarchy.parents.numpy() if hierarchy else np.zeros(1, dtype=np.int64)
    half_sizes = None
    if args.floor and i == 0:  # halves of the real set, each with at most as many images as FAKE
        fake_labels = sets[-1].labels if sets[-1].labels is not None else labels
        half_sizes = np.bincount(parents[fake_labels], minlength=parents.max() + 1)
    total_dims = sum(dims[network]["features"] for network in networks.features)
    plan = make_plan(labels, parents, args.keep_features, total_dims, half_sizes, args.seed)
    result = run_pass(images, plan, networks, device, args.batch_size, args.num_workers, sets[i].path.name)
    return result and MeasuredSet(result, float64_device(device))


def print_times(compared: list[ComparedSet]):
    """Print how long each pass took, and how long outside the networks."""
    for name, each in zip(("real", "fake"), compared):
        if each.seconds:
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
        rows, spatial = np.flatnonzero(real.plan.sampled), real.gaussian(moments_name(network.name, "spatial"), None)
        save_adm(args.save_adm, images, real.gaussian(network.name, None), spatial, rows, size)


# ---- report --------------------------------------------------------------------------------------


def read_sample_settings(path: str | os.PathLike) -> dict | None:
    """Read settings.json of a folder of samples, or of the folder that an .npz was made from; None if there is none."""
    path = Path(path)
    path = (path if path.is_dir() else path.with_suffix("")) / "settings.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({one_line(error)}), expected the settings that sample_ddp.py writes: restore or remove it."
        ) from None


def check_complete(images: ImageSet, settings: dict):
    """Raise ValueError if a folder of samples has another number of images than its settings say.

    images: an opened set, see `evaluation.image_sets.open_set`
    """
    expected = settings.get("num_fid_samples")
    if isinstance(images, Folder) and expected not in (None, len(images)):
        raise ValueError(
            f"{images.path} has {len(images):,} images, but sample_ddp.py was to make {expected:,}: run the same "
            "sample_ddp.py command again, which completes it, or remove what is not of that run."
        )


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
        "batch_size": args.batch_size,
    }


def list_notes(
    sets: list[ImageSet],
    compared: list[ComparedSet],
    hierarchy: Hierarchy | None,
    networks: Networks,
    settings: dict | None,
    rows: dict[str, dict],
) -> list[str]:
    """Return sentences about possible problems with the images, and about groups with few of them.

    settings: of the sampling, see `read_sample_settings`
    rows: {"overall" or superclass: metrics}
    """
    notes = image_notes(sets, hierarchy, [each.digests for each in compared])
    notes += label_notes(sets, hierarchy, settings) if hierarchy else []
    notes += classifier_notes(rows["overall"], hierarchy)
    counts = {name: (row["n_real"], row["n_fake"]) for name, row in rows.items()}
    few = [name for name, both in counts.items() if any(n is not None and n < FEW_IMAGES for n in both)]
    if few and networks.features:
        notes.append(
            f"{len(few)} rows have fewer than {FEW_IMAGES:,} images ({shorten(few)}): their Frechet distance is mostly bias, "
            "read KID instead."
        )
    return notes


def build_report(
    args: argparse.Namespace,
    sets: list[ImageSet],
    compared: list[ComparedSet],
    hierarchy: Hierarchy | None,
    present: list[int],
    networks: Networks,
    size: int | None,
    settings: dict | None,
) -> dict:
    """Compute all metrics and return the content of metrics.json.

    present: superclasses that the sets have
    size: pixels per side of the images
    settings: of the sampling, see `read_sample_settings`
    """
    real, fake = compared
    # Metrics:
    options = dict(seed=args.seed, floor=args.floor and isinstance(real, MeasuredSet))
    overall = group_metrics(real, fake, networks, None, **options) | overall_metrics(real, fake, networks)
    rows = {hierarchy.superclasses[s]: group_metrics(real, fake, networks, s, **options) for s in present}
    # Reasons not to compare them with published ones:
    reasons = list(filter(None, map(why_not_comparable, networks.all())))
    reasons += [
        f"{each.path} has no record of how it was made"
        for each in sets
        if isinstance(each, Statistics) and not each.record
    ]
    return {
        "format": FORMAT,
        "comparable": not reasons,
        "not_comparable": reasons,
        "overall": overall,
        "superclasses": rows,
        "notes": list_notes(sets, compared, hierarchy, networks, settings, {**rows, "overall": overall}),
        **{
            name: {
                "path": str(each.path),
                "kind": each.kind,
                "n": measured.n(None),
                "pixels": measured.pixels(),
                "seconds": measured.seconds,
            }
            for name, each, measured in zip(("real", "fake"), sets, compared)
        },
        "hierarchy": hierarchy and {"name": hierarchy.name, "sha256": hierarchy.digest()},
        "choices": list_choices(args, compared, networks, size),
        "sampling": settings,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


# ---- the command ---------------------------------------------------------------------------------


def main():
    """Compare the sets of the command line; print the table and write the report."""
    args = parse_args(__doc__.split("\n")[0])
    check_settings(args)
    saves_real = bool(args.save_stats or args.save_adm)

    # Set up processes:
    state = start_processes()
    device = state.device
    torch.backends.cudnn.allow_tf32 = False  # with it, features would differ between GPUs by more than rounding

    # Open the sets, label their images, decide how to crop them:
    sets = [open_set(path, args.trust_stats) for path in (args.real, args.fake) if path]
    hierarchy = choose_hierarchy(args.hierarchy, sets)
    for each in sets:
        each.label(hierarchy)
    present = check_sets(sets, hierarchy)
    if isinstance(sets[0], Statistics) and saves_real:
        raise ValueError(f"{args.real} holds statistics, expected images to make statistics of: drop the flag.")
    settings = read_sample_settings(args.fake) if args.fake else None
    if settings:
        check_complete(sets[1], settings)
    size, pixels = open_pixels(sets, args.image_size)

    # Load the networks:
    if any(pixels):
        with state.local_main_process_first():  # one process per node downloads
            networks = load_networks(args, device)
        dims = networks.output_dims(size, device)
    else:
        networks, dims = recorded_networks(sets[0]), {}
    check_networks(networks, sets, dims, size, hierarchy)

    # Run the images through the networks:
    compared = [
        measure_set(args, sets, i, images, networks, dims, hierarchy, device) for i, images in enumerate(pixels)
    ]
    keep_process_group()
    state.destroy_process_group()
    if not state.is_main_process:
        return
    print_times(compared)

    # Save statistics, compute the metrics, write the report:
    if saves_real:
        save_real(args, compared[0], pixels[0], networks, hierarchy, size)
    if args.fake:
        report = build_report(args, sets, compared, hierarchy, present, networks, size, settings)
        print(text_table(report))
        if args.output:
            write_report(Path(args.output), report)


if __name__ == "__main__":
    run_command(main)
