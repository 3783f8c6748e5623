"""Print the tree of a hierarchy: its ranks, their nodes, and the images below each node.

    python -m tools.taxonomy inat/train_mini --to order

A node with a single child has the same images as the child, so guidance between the two has nothing to add.
"""

import argparse
from pathlib import Path

import torch

from dataset.listing import list_files
from hierarchy import Hierarchy
from hierarchy.ranks import Rank
from runtime.cli import Parser, run_command
from runtime.text import markdown_table

EXAMPLES = """
    python -m tools.taxonomy inat/train_mini --to order
    python -m tools.taxonomy inat2021
"""


def count_single(coarse: Rank, fine: torch.Tensor) -> int:
    """Return the number of nodes of a rank with a single child. fine: the nodes of the classes in the rank below."""
    edges = torch.stack([coarse.of_class, fine]).unique(dim=1)  # (2, children)
    return int((edges[0].bincount() == 1).sum())


def spread(counts: torch.Tensor) -> str:
    """Return the smallest, the median and the largest of counts (n,)."""
    return f"{counts.min():,} / {counts.median():,} / {counts.max():,}"


def rank_lines(hierarchy: Hierarchy, images: torch.Tensor | None) -> list[str]:
    """Return a table of the ranks. images: the number of images of each class, int64 (num_classes,), if known."""
    tiers = [*hierarchy.tiers, Rank(hierarchy.leaf, hierarchy.classes, torch.arange(hierarchy.num_classes))]
    rows = []
    for tier, finer in zip(tiers, [*tiers[1:], None]):
        row = [tier.name, f"{len(tier.nodes):,}", "", "", ""]
        if finer and tier.of_class is not None:
            row[2] = spread(tier.of_class.bincount())
            row[3] = f"{count_single(tier, finer.of_class):,}" if finer.of_class is not None else ""
        if images is not None:
            row[4] = spread(torch.zeros(len(tier.nodes), dtype=torch.int64).index_add_(0, tier.of_class, images))
        rows.append(row)
    header = ["rank", "nodes", "classes of a node, min / median / max", "nodes with a single child", "images of a node"]
    columns = 5 if images is not None else 4
    return markdown_table(header[:columns], [row[:columns] for row in rows], align=("lrrrr")[:columns])


def tree_lines(hierarchy: Hierarchy, depth: int, images: torch.Tensor | None) -> list[str]:
    """Return the nodes of the first `depth` ranks, each indented below its parent, with its classes and images."""
    lines, ancestors = [], hierarchy.ancestors[:depth]
    classes = torch.ones(hierarchy.num_classes, dtype=torch.int64)

    def add(tier: int, inside: torch.Tensor):
        """Add the nodes of a tier that have classes `inside`, bool (num_classes,)."""
        for node in ancestors[tier][inside].unique().tolist():
            below = inside & (ancestors[tier] == node)
            text = f"{int(classes[below].sum()):,} classes"
            text += "" if images is None else f", {int(images[below].sum()):,} images"
            lines.append(f"{'  ' * tier}{hierarchy.tiers[tier].nodes[node]}  ({text})")
            if tier + 1 < depth:
                add(tier + 1, below)

    add(0, classes.bool())
    return lines


def main():
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument
    add("source", help="image folder, .json file, annotation file of iNaturalist, inat2021 or vegfru")
    add("--to", metavar="RANK", help="list the nodes down to this rank; if not given, the superclasses")
    print_tree(parser.parse_args())


def print_tree(args: argparse.Namespace):
    hierarchy = Hierarchy.load(args.source, counted=True)
    ranks = [tier.name for tier in hierarchy.tiers]
    if args.to and args.to not in ranks:
        raise ValueError(f"--to is {args.to}, expected a rank of {args.source}: {', '.join(ranks)}.")
    images = None
    if Path(args.source).is_dir():
        labels = torch.as_tensor(list_files(args.source, hierarchy).labels)
        images = labels.bincount(minlength=hierarchy.num_classes)
    depth = ranks.index(args.to) + 1 if args.to else int(hierarchy.has_parents)
    tree = tree_lines(hierarchy.keep(*ranks[:depth]), depth, images) if depth else []
    print("\n".join([*rank_lines(hierarchy, images), "", *tree]).strip())


if __name__ == "__main__":
    run_command(main)
