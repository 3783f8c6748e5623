"""Merge patches, adapters with rows for further classes (train.py --extend), into the adapter that they extend.

    python -m tools.merge runs/a/adapters/0002000.safetensors runs/b/adapters/0002000.safetensors --out all.safetensors

The patches may extend the same adapter, or each other. The result is one adapter on the adapter's own base. The new classes
are sorted by name, so that the order of the patches does not matter.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint.description import ModelDescription
from checkpoint.format import read_description, read_weights, save_safetensors
from checkpoint.loading import TABLE, find_base
from checkpoint.rows import match_rows, row_keys
from hierarchy import Hierarchy
from hierarchy.ranks import Rank
from runtime.cli import Parser, run_command
from runtime.files import sha256

EXAMPLES = """
    python -m tools.merge runs/a/adapters/0002000.safetensors runs/b/adapters/0002000.safetensors --out all.safetensors
"""

Rows = dict[tuple[str, str], tuple[torch.Tensor, tuple[str, ...]]]  # by kind and name: the row, and a class's ancestors


def read_patches(path: str | Path) -> tuple[Path, Rows]:
    """Return the adapter below a chain of patches, and the rows of the chain.

    Raises ValueError if the file is not a patch, or a file of the chain has changed.
    """
    tensors, description = read_weights(path)
    if not description or not description.patch_rows:
        raise ValueError(
            f"{path} is not a patch, expected an adapter of train.py --extend --train rows: name another file."
        )
    base = find_base(description.base, path)
    keys, hierarchy, rows = row_keys(description), description.hierarchy, {}
    for row, values in zip(description.patch_rows, tensors[TABLE]):
        kind, name = keys[row]
        path = [tier.nodes[tier.of_class[row]] for tier in hierarchy.tiers] if kind == "class" else ()
        rows[kind, name] = values.float(), tuple(path)
    if read_description(base).patch_rows:
        base, below = read_patches(base)
        rows = merge_rows(below, rows, path)
    return base, rows


def merge_rows(first: Rows, second: Rows, path: str | Path) -> Rows:
    """Return the rows of both. Raises ValueError if they differ in a row; path: of the second."""
    for key in first.keys() & second.keys():
        if first[key][1] != second[key][1] or not first[key][0].equal(second[key][0]):
            raise ValueError(
                f"{path} has another {key[0]} {key[1]} than a patch before it, expected each to be in one patch: leave one out."
            )
    return first | second


def extend_description(description: ModelDescription, rows: Rows) -> ModelDescription:
    """Return the description of an adapter with further classes and nodes, which follow its own by name."""
    own = description.hierarchy
    new = sorted((name, path) for (kind, name), (_, path) in rows.items() if kind == "class")
    found = {path[0] for _, path in new}
    superclasses = [*own.superclasses, *sorted(found - set(own.superclasses))]
    parents = own.parents.tolist() + [superclasses.index(path[0]) for _, path in new]
    ranks = [
        Rank.of_names(rank.name, rank.names() + [path[tier] for _, path in new])
        for tier, rank in enumerate(own.ranks, start=1)
    ]
    hierarchy = Hierarchy([*own.classes, *(name for name, _ in new)], superclasses, parents, own.name, ranks, own.top)
    return replace(description, hierarchy=hierarchy, original_classes=description.original_classes or own.num_classes)


def merge(args: argparse.Namespace):
    """Write the adapter below the patches with all their rows."""
    if Path(args.out).suffix != ".safetensors":
        raise ValueError(f"--out is {args.out}, expected a name that ends in .safetensors.")
    if Path(args.out).exists():
        raise ValueError(f"{args.out} exists and is not overwritten: remove it or choose another --out.")
    base, rows, digest = None, {}, None
    for path in args.patches:
        below, more = read_patches(path)
        found = sha256(below)
        if digest not in (None, found):
            raise ValueError(f"{path} extends {below}, expected {base} as the patches before it: merge them apart.")
        base, digest, rows = below, found, merge_rows(rows, more, path)
    tensors, before = read_weights(base)
    after = extend_description(before, rows)
    table = tensors[TABLE].float()
    keys, matches = row_keys(after), match_rows(after, before)
    tensors[TABLE] = torch.stack([rows[key][0] if row is None else table[row] for key, row in zip(keys, matches)])
    save_safetensors(args.out, tensors, after)
    print(f"{args.out}: {after.hierarchy!r}, {len(rows)} rows added to {base}")


def main():
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    parser.add_argument("patches", nargs="+", metavar="PATCH", help="adapters of train.py --extend --train rows")
    parser.add_argument("--out", required=True, help="adapter to write; it must not exist")
    merge(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
