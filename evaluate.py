"""Compare generated images with real ones: FID, KID, LPIPS, precision, recall, accuracy; overall and by superclass.

    python evaluate.py inat/val samples --output evaluation
    torchrun --nproc_per_node=8 evaluate.py inat/val samples.npz --hierarchy inat2021 --output evaluation

REAL and FAKE are folders of images, .npz files of images and labels, or saved statistics. docs/protocol.md says what is
computed and why.
"""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from evaluation import features
from evaluation.comparison import FEW_IMAGES, NEIGHBOURS, MeasuredSet, Saved, metrics_of, overall_metrics
from evaluation.image_sets import check_sides, choose_hierarchy, doubts, open_set, pixels_of
from evaluation.measure import SAMPLE, Networks, float64_device, make_plan, moments_name, run_pass
from evaluation.metrics import KID_SUBSETS
from evaluation.npz_sets import Statistics, save_adm, save_statistics
from evaluation.reports import text_table, write_report
from runtime.cli import Parser, check_range, run_command
from runtime.processes import keep_process_group, start_processes
from runtime.text import shorten

FORMAT = "finediffusion-metrics-1"
PACKAGES = ("torch", "torchvision", "torch-fidelity", "lpips", "timm", "numpy", "pillow")
INCEPTION, TRUNK = "inception", "lpips-trunk"


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("real", metavar="REAL", help="folder of images, .npz of images, or .npz of statistics")
    add("fake", metavar="FAKE", nargs="?", help="the same; may be left out with --save-stats or --save-adm")
    add("--hierarchy", help="inat2021, a .json file, a folder, or none: one class (default: that of REAL or FAKE)")
    add("--image-size", type=int, help="centre-crop both sides to it (default: REAL alone, to the size of FAKE)")
    add("--inception", help="file of the FID Inception's weights (default: in TORCH_HOME, or downloaded), or none")
    add("--resize", choices=list(features.RESIZES), default="tf1", help="to Inception's 299 pixels: of TensorFlow 1, "
        "pytorch-fid or clean-fid")  # fmt: skip
    add("--lpips-trunk", help="file of torchvision's AlexNet (default: in TORCH_HOME, or downloaded), or none")
    add("--features", nargs="+", default=[], metavar="MODEL[@SIZE]=FILE", help="distances on the features of a timm model "
        "with its weights, or of a TorchScript FILE that takes uint8 images: a program, so name one that you trust")  # fmt: skip
    add(
        "--classifier",
        metavar="MODEL[@SIZE]=FILE",
        help="accuracy by a timm model or a TorchScript FILE of the classes",
    )
    add(
        "--random-weights", action="store_true", help="for networks without a file: to try the program, not for figures"
    )
    add("--floor", action="store_true", help="the distances of two halves of the real images as well")
    add(
        "--keep-features",
        choices=["auto", "all", "sample"],
        default="auto",
        help="in memory (auto: all, up to 0.5 GiB)",
    )
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=64, help="images per process")
    add("--num-workers", type=int, default=4, help="that decode and crop, per process")
    add("--output", help="folder for metrics.json, metrics.md, metrics.csv and superclasses.png")
    add("--save-stats", metavar="FILE.npz", help="save the statistics of REAL, to name them as REAL later")
    add("--save-adm", metavar="FILE.npz", help="save REAL as a reference batch of ADM's evaluator")
    add("--trust-stats", action="store_true", help="take statistics that do not say how they were made")
    return parser.parse_args()


def check_settings(args):
    check_range(args, image_size=(1, 2**14), seed=(0, 2**32 - 1), batch_size=(1, 10**6), num_workers=(0, 10**3))
    saved = list(filter(None, (args.save_stats, args.save_adm)))
    for path in saved:
        if Path(path).suffix != ".npz":
            raise ValueError(f"{path} is to hold arrays, expected a name that ends in .npz: change it.")
    for path in (args.output and Path(args.output), *(Path(path).parent for path in saved)):
        there = path and next(each for each in (path, *path.absolute().parents) if each.exists())
        if path and not (there.is_dir() and os.access(there, os.W_OK)):
            raise ValueError(f"{there} cannot be written, expected a folder for the results: choose another.")
    if not args.fake and not saved:
        raise ValueError("There is no FAKE, expected two sets of images: name it, or save REAL with --save-stats.")
    if saved and args.inception == "none" and (args.save_adm or not args.features):
        raise ValueError("There are no features to save statistics of, expected Inception's: drop --inception none.")


# ---- networks ------------------------------------------------------------------------------------


def load_networks(args, device):
    """The `Networks` of the flags."""
    random, paths = args.random_weights, {}
    for what, given in (("inception", args.inception), ("lpips-trunk", args.lpips_trunk)):
        if given != "none":
            paths[what] = None if random and not given else features.find_weights(what, given)
    networks = Networks([features.named_network(spec, "features", random, device) for spec in args.features])
    names = ["inception", *(network.name for network in networks.features)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"--features names a network {twice[0]!r}, as another is called, expected another name: rename it."
        )
    if "inception" in paths:
        network = features.inception(paths["inception"], args.resize, bool(args.save_adm), device)
        networks.features.insert(0, network)
    if "lpips-trunk" in paths:
        networks.lpips = features.lpips_features(paths["lpips-trunk"], device)
    if args.classifier:
        networks.classifier = features.named_network(args.classifier, "logits", random, device)
    if not networks.every():
        raise ValueError("No network was named, expected Inception, LPIPS, --features or --classifier: name one.")
    return networks


def recorded_networks(statistics):
    """The same where there are only statistics: the network that they say they are of, without its weights."""
    record = statistics.record.get("network", {"name": "inception", "weights": "unknown"})
    return Networks([features.Network(record["name"], None, record)])


def check_networks(networks, sets, sizes, size, hierarchy):
    """ValueError where saved statistics are of others, or the classifier knows other classes."""
    for each in sets:
        if isinstance(each, Statistics):
            if not networks.features:
                raise ValueError(
                    f"{each.path} holds statistics, expected the network they are of: name it, or the images."
                )
            first = networks.features[0]
            each.check(first.record, size)
            found = len(each.gaussians[None].mean)
            if sizes and found != sizes[first]["features"]:
                raise ValueError(
                    f"{each.path} has statistics of {found} numbers an image, expected the {sizes[first]['features']} of "
                    f"{first.name}: name the network they were made with."
                )
    if networks.classifier and hierarchy is None:
        raise ValueError(
            "--classifier was named, but the images have no classes, expected class folders: drop the flag."
        )
    if networks.classifier and sizes and sizes[networks.classifier]["logits"] != hierarchy.num_classes:
        raise ValueError(
            f"The classifier knows {sizes[networks.classifier]['logits']} classes, expected the {hierarchy.num_classes} of "
            f"{hierarchy.name}: name another."
        )


# ---- the result ----------------------------------------------------------------------------------


def read_sample_settings(path):
    """settings.json of a folder of samples, or of the folder that an .npz was made from; None without."""
    path = Path(path)
    path = (path if path.is_dir() else path.with_suffix("")) / "settings.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON ({error}), expected the settings of a sampling: restore or remove it."
        ) from None


def list_choices(args, networks, size, sides):
    """Every choice that the figures depend on."""
    return {
        "seed": args.seed,
        "image_size": size,
        "crop": f"ADM's centre crop, {'both sides' if args.image_size else 'REAL alone'}",
        "networks": [network.record for network in networks.features],
        "lpips": networks.lpips and networks.lpips.record,
        "classifier": networks.classifier and networks.classifier.record,
        "features_kept": [side.kept for side in sides],
        "lpips_pairs": "all",
        "sample": SAMPLE,
        "kid_subsets": KID_SUBSETS,
        "neighbours": NEIGHBOURS,
        "batch_size": args.batch_size,
    }


def build_report(args, sets, hierarchy, present, sides, networks, size, settings):
    """The content of metrics.json."""
    real, fake = sides
    reasons = list(filter(None, map(features.not_comparable, networks.every())))
    reasons += [
        f"nothing says how {each.path} was made" for each in sets if isinstance(each, Statistics) and not each.record
    ]
    options = dict(seed=args.seed, floor=args.floor and isinstance(real, MeasuredSet))
    overall = metrics_of(real, fake, networks, None, **options) | overall_metrics(real, fake, networks)
    rows = {hierarchy.superclasses[s]: metrics_of(real, fake, networks, s, **options) for s in present}
    notes = doubts(sets, hierarchy, [side.digests for side in sides])
    if (
        settings
        and hierarchy
        and sets[1].kind == "npz"
        and settings.get("hierarchy", hierarchy.digest()) != hierarchy.digest()
    ):
        notes.append(
            f"{sets[1].path} was sampled with another hierarchy than {hierarchy.name}: see that labels mean the same."
        )
    counts = {name: (row["n_real"], row["n_fake"]) for name, row in {**rows, "overall": overall}.items()}
    low = [name for name, both in counts.items() if any(n is not None and n < FEW_IMAGES for n in both)]
    if low and networks.features:
        notes.append(
            f"Below {FEW_IMAGES:,} images a Frechet distance is mostly its own bias, read KID: so in {len(low)} rows "
            f"({shorten(low)})."
        )
    return {
        "format": FORMAT,
        "comparable": not reasons,
        "not_comparable": reasons,
        "overall": overall,
        "superclasses": rows,
        "notes": notes,
        **{
            name: {"path": str(each.path), "kind": each.kind, "n": side.n(None), "seconds": side.seconds}
            for name, each, side in zip(("real", "fake"), sets, sides)
        },
        "hierarchy": hierarchy and {"name": hierarchy.name, "sha256": hierarchy.digest()},
        "choices": list_choices(args, networks, size, sides),
        "sampling": settings,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def save_real(args, side, images, networks, hierarchy, size):
    """--save-stats and --save-adm."""
    network = networks.features[0]
    groups = {None: None} | ({name: s for s, name in enumerate(hierarchy.superclasses)} if hierarchy else {})
    if args.save_stats:
        gaussians = {name: side.gaussian(network.name, s) for name, s in groups.items()}
        lpips = networks.lpips and {
            "network": networks.lpips.record,
            "overall": side.diversity(None, args.seed),
            "superclasses": {name: side.diversity(s, args.seed) for name, s in groups.items() if name and side.n(s)},
        }
        save_statistics(
            args.save_stats, gaussians, {"network": network.record, "crop": size, "lpips": lpips}, hierarchy
        )
    if args.save_adm:
        rows, spatial = np.flatnonzero(side.plan.sampled), side.gaussian(moments_name(network.name, "spatial"), None)
        save_adm(args.save_adm, images, side.gaussian(network.name, None), spatial, rows, size)


def print_times(sides):
    for name, side in zip(("real", "fake"), sides):
        if side.seconds:
            total, outside = side.seconds["total"], side.seconds["total"] - side.seconds["network"]
            print(
                f"{name}: {side.n(None):,} images in {total:.1f} s, {outside:.1f} s outside the networks",
                file=sys.stderr,
            )


def evaluate(args):
    check_settings(args)
    state = start_processes()
    device = state.device
    torch.backends.cudnn.allow_tf32 = False  # features are the same on every GPU but for rounding
    sets = [open_set(path, args.trust_stats) for path in (args.real, args.fake) if path]
    hierarchy = choose_hierarchy(args.hierarchy, sets)
    for each in sets:
        each.label(hierarchy)
    present = check_sides(sets, hierarchy)
    if isinstance(sets[0], Statistics) and (args.save_stats or args.save_adm):
        raise ValueError(f"{args.real} holds statistics, expected images to make statistics of: drop the flag.")
    settings = read_sample_settings(args.fake) if args.fake else None
    size, images = pixels_of(sets, args.image_size)
    if any(images):
        with state.local_main_process_first():  # one process a node downloads
            networks = load_networks(args, device)
    else:
        networks = recorded_networks(sets[0])
    sizes = networks.sizes(size, device) if any(images) else {}
    check_networks(networks, sets, sizes, size, hierarchy)
    sides = [measure_side(args, *each, networks, sizes, hierarchy, sets, device) for each in zip(sets, images)]
    keep_process_group()
    state.destroy_process_group()
    if not state.is_main_process:
        return
    print_times(sides)
    if args.save_stats or args.save_adm:
        save_real(args, sides[0], images[0], networks, hierarchy, size)
    if args.fake:
        report = build_report(args, sets, hierarchy, present, sides, networks, size, settings)
        print(text_table(report))
        if args.output:
            write_report(Path(args.output), report)


def measure_side(args, each, images, networks, sizes, hierarchy, sets, device):
    """The `Measure` or `Saved` of a set; None on other processes than the main one."""
    if images is None:
        network = networks.features[0].name
        return Saved(each, hierarchy and hierarchy.superclasses, network, networks.lpips and networks.lpips.record)
    parents = hierarchy.parents.numpy() if hierarchy else np.zeros(1, dtype=np.int64)
    halves = None
    if args.floor and each is sets[0]:  # halves of as many images as FAKE has, where REAL has so many
        labels = sets[-1].labels if sets[-1].labels is not None else each.labels
        halves = np.bincount(parents[labels], minlength=parents.max() + 1)
    numbers = sum(sizes[network]["features"] for network in networks.features)
    plan = make_plan(each.labels, parents, args.keep_features, numbers, halves, args.seed)
    measured = run_pass(images, plan, networks, device, args.batch_size, args.num_workers, each.path.name)
    return measured and MeasuredSet(measured, float64_device(device))


def main():
    evaluate(parse_args())


if __name__ == "__main__":
    run_command(main)
