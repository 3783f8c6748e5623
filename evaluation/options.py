"""The flags of evaluate.py, their defaults and their checks."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from evaluation.features import RESIZES
from runtime.cli import Parser, check_range
from runtime.files import nearest_existing

EXAMPLES = """
torchrun --nproc_per_node=8 evaluate.py inat/val samples/NAME --hierarchy inat2021 --output evaluation
python evaluate.py pets/val samples.npz --hierarchy pets/train --inception inception.pth --floor pets/test --output evaluation
"""


HALVES = "halves"  # --floor without a folder
LEAST_OF_NODE = 50  # images of a node of --rank in both sets


def parse_args(description: str) -> argparse.Namespace:
    """Parse the command line. Raises ValueError for an unknown or malformed flag."""
    parser = Parser(description=description, examples=EXAMPLES)
    for title, add_flags in (
        ("data", add_data_flags),
        ("networks", add_network_flags),
        ("protocol", add_protocol_flags),
        ("output", add_output_flags),
    ):
        add_flags(parser.add_argument_group(title).add_argument)
    args = parser.parse_args()
    if args.floor not in (None, HALVES) and not args.fake:  # "--floor REAL FAKE" is "REAL FAKE --floor"
        args.real, args.fake, args.floor = args.floor, args.real, HALVES
    return args


# ---- flags; `add` is the `add_argument` of a group -----------------------------------------------


def add_data_flags(add: Callable):
    add("real", metavar="REAL", help="real set: folder of images, .npz of images, or .npz of statistics")
    add(
        "fake",
        metavar="FAKE",
        nargs="?",
        help="generated set, in the same forms; optional with --save-stats or --save-adm",
    )
    add(
        "--hierarchy",
        help="inat2021, vegfru, a .json file, a folder, or none to treat all images as one class; if not given, that of REAL "
        "or FAKE",
    )
    add(
        "--train",
        metavar="DIR",
        help="folder of the images that the model was trained on: also compute the distance of every image of REAL and FAKE to "
        "its nearest training image, in the features of the first network, which are all kept",
    )
    add(
        "--train-cache",
        metavar="DIR",
        help="folder for the features of --train, where the same command resumes and others find them; if not given, "
        "training-features in --output",
    )
    add("--trust-stats", action="store_true", help="accept statistics that do not say how they were made")
    add("--batch-size", type=int, default=64, help="images per forward pass, for each process")
    add("--num-workers", type=int, default=4, help="workers that decode and crop images, for each process")
    add(
        "--max-bad-images",
        type=int,
        help="unreadable images of a set that may be left out; if not given, 1 in 100, and at least 1",
    )


def add_network_flags(add: Callable):
    add(
        "--inception",
        help="weights of the FID Inception, or none; if not given, the published file (from TORCH_HOME or downloaded)",
    )
    add(
        "--lpips-trunk",
        help="weights of torchvision's AlexNet for LPIPS, or none; if not given, the published file (from TORCH_HOME or "
        "downloaded)",
    )
    add(
        "--features",
        nargs="+",
        metavar="[NAME:]MODEL[@SIZE]=FILE",
        help="more networks to compare features by: a timm model with its weights, called NAME in the report, or a TorchScript "
        "FILE that takes uint8 images (it is a program, so only name one that you trust); dinov2, or dinov2=FILE, is DINOv2's "
        "ViT-L/14 (from TORCH_HOME or downloaded); if not given, none",
    )
    add(
        "--classifier",
        metavar="[NAME:]MODEL[@SIZE]=FILE",
        help="classifier of the data's classes, in the same forms, for the accuracy; its outputs are in the order of the "
        "classes, or of the names in a file STEM.classes.txt beside FILE, one per line; if not given, none",
    )
    add(
        "--class-embeddings",
        metavar="FILE",
        help="embeddings of the class names by a vision-language model, from tools.class_embeddings; --classifier is then its "
        "image tower; if not given, --classifier has an output for each class",
    )
    add(
        "--random-weights",
        action="store_true",
        help="use random weights for networks without a file, to try the program: the metrics mean nothing",
    )


def add_protocol_flags(add: Callable):
    add(
        "--image-size",
        type=int,
        help="centre-crop both sets to this many pixels per side; if not given, only REAL is cropped, to the size of FAKE",
    )
    add(
        "--resize",
        choices=list(RESIZES),
        default="tf1",
        help="resize to Inception's 299 pixels, as in TensorFlow 1, pytorch-fid or clean-fid",
    )
    add(
        "--floor",
        nargs="?",
        const=HALVES,
        metavar="DIR",
        help="also compute the Frechet distance between real images: REAL and as many images of DIR, a second folder of real "
        "images, as FAKE has; or, without DIR, two halves of REAL, and of FAKE at their size",
    )
    add(
        "--keep-features",
        choices=["auto", "all", "sample"],
        default="auto",
        help="features to keep in memory: all, a random sample, or auto (all if they fit in 0.5 GiB)",
    )
    add(
        "--rank",
        metavar="NAME",
        help="rank of the hierarchy, such as order, whose nodes get a row each, instead of the superclasses; nodes with fewer "
        f"than {LEAST_OF_NODE} images in a set get none",
    )
    add("--seed", type=int, default=0, help="seed of all random subsets, splits, halves and resamples")


def add_output_flags(add: Callable):
    add(
        "--output",
        help="folder for metrics.json, metrics.md, metrics.csv, classes.csv and superclasses.png, with --train also pairs.png "
        "and pairs.csv; if not given, only the table is printed",
    )
    add(
        "--save-stats",
        metavar="FILE.npz",
        help="save the statistics of REAL, to use as REAL later; if not given, not saved",
    )
    add(
        "--save-adm",
        metavar="FILE.npz",
        help="save REAL as a reference batch for ADM's evaluator; if not given, not saved",
    )


# ---- checks --------------------------------------------------------------------------------------


def check_settings(args: argparse.Namespace):
    """Raise ValueError if a flag is out of range, flags contradict each other, or an output cannot be written."""
    check_range(
        args,
        image_size=(1, 2**14),
        seed=(0, 2**32 - 1),
        batch_size=(1, 10**6),
        num_workers=(0, 10**3),
        max_bad_images=(0, 10**9),
    )
    files = list(filter(None, (args.save_stats, args.save_adm)))
    for path in files:
        if Path(path).suffix != ".npz":
            raise ValueError(f"The file to save is {path}, expected a name that ends in .npz: choose another.")
    folders = [Path(path).parent for path in files]
    if args.train_cache:
        folders.insert(0, Path(args.train_cache))
    if args.output:
        folders.insert(0, Path(args.output))
    for folder in folders:
        existing = nearest_existing(folder)
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            raise ValueError(f"{existing} cannot be written, expected a folder for the results: choose another.")
    if not args.fake and not files:
        raise ValueError("There is no FAKE, expected two sets of images: name it, or save REAL with --save-stats.")
    if files and args.inception == "none" and (args.save_adm or not args.features):
        raise ValueError("There are no features to save, expected Inception's: drop --inception none.")
    if args.class_embeddings and not args.classifier:
        raise ValueError("--class-embeddings needs an image tower, expected --classifier: name it.")
    if args.train and not args.fake:
        raise ValueError("--train has no generated images to compare, expected FAKE: name it.")
    if args.train_cache and not args.train:
        raise ValueError("--train-cache is set without --train, expected the training images: name their folder.")
    if args.train and not (args.train_cache or args.output):
        raise ValueError("--train has no folder for its features, expected --train-cache or --output: pass one.")
    if args.train and args.inception == "none" and not args.features:
        raise ValueError("--train needs features, expected Inception's or --features: drop --inception none.")
