"""The sets of evaluate.py's command line: opened, labelled, and cropped to one size."""

import argparse
from dataclasses import dataclass

from evaluation.image_sets import ImageSet, Pixels, check_sets, choose_hierarchy, open_pixels, open_second, open_set
from evaluation.options import HALVES, check_settings
from evaluation.ranks import choose_nodes
from evaluation.samples import check_complete, read_sample_settings
from evaluation.saved_statistics import Statistics
from evaluation.training_set import open_training
from hierarchy import Hierarchy


@dataclass
class OpenedSets:
    """The sets of the command line, labelled.

    sets       REAL and FAKE, or REAL alone
    hierarchy  None if all images are one class
    groups     the hierarchy whose superclasses have a row each: `hierarchy`, or with --rank its nodes of that rank
    present    superclasses of `groups` that have a row
    settings   of the sampling of FAKE, None if unknown
    size       pixels per side of the images, None if there are none
    pixels     of each set, None for statistics
    second     images of --floor DIR, chosen to match FAKE
    train      images of --train
    """

    sets: list[ImageSet]
    hierarchy: Hierarchy | None
    groups: Hierarchy | None
    present: list[int]
    settings: dict | None
    size: int | None
    pixels: list[Pixels | None]
    second: Pixels | None = None
    train: Pixels | None = None


def open_sets(args: argparse.Namespace) -> OpenedSets:
    """Check the flags, open the sets, label their images, and decide how to crop them."""
    check_settings(args)
    sets = [open_set(path, args.trust_stats) for path in (args.real, args.fake) if path]
    hierarchy = choose_hierarchy(args.hierarchy, sets)
    if args.rank and hierarchy is None:
        raise ValueError(
            f"--rank is {args.rank}, but the images have no classes, expected class folders: drop the flag."
        )
    groups = hierarchy.keep(args.rank) if args.rank else hierarchy
    for each in sets:
        each.label(groups if isinstance(each, Statistics) else hierarchy)
    present = check_sets(sets, hierarchy) if groups is hierarchy else choose_nodes(sets, groups, args.rank)
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
    train = open_training(args.train, sets, hierarchy) if args.train else None
    opened = OpenedSets(sets, hierarchy, groups, present, settings, *open_pixels(sets, args.image_size))
    if args.floor not in (None, HALVES):
        opened.second = Pixels(open_second(args.floor, sets[1], hierarchy, args.seed), opened.size, crop=True)
    if train:
        opened.train = Pixels(train, opened.size, crop=True)
    return opened
