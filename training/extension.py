"""Add classes to an adapter: train.py --extend.

The new classes get rows of their own at the end of the adapter's, so that the labels of the old classes stay. With
`--train rows` nothing but these rows is trained, and the result is a patch: an adapter that holds them alone and has the
adapter before it as its base.
"""

import argparse
from dataclasses import replace

import torch

from checkpoint.description import ModelDescription
from checkpoint.format import is_adapter, read_description
from checkpoint.rows import new_rows
from hierarchy import Hierarchy
from hierarchy.ranks import Rank

ADOPTED = (
    "model",
    "image_size",
    "vae",
    "method",
    "embedder",
    "tiers",
    "lora_rank",
    "lora_targets",
)  # the adapter decides


def adopt_settings(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Set the flags that the adapter of --resume decides, in place.

    defaults: of all flags. Raises ValueError if --resume is not an adapter, or a flag was given another value.
    """
    if not is_adapter(args.resume):
        raise ValueError(f"--resume is {args.resume}, expected the adapter that --extend adds classes to: name it.")
    description = read_description(args.resume)
    for name in ADOPTED:
        own, given = getattr(description, name), getattr(args, name)
        own = own.split() if name == "lora_targets" and own else own
        if given not in (own, getattr(defaults, name)):
            if name == "vae":
                continue  # it may have moved; its encoder is compared
            raise ValueError(
                f"--{name.replace('_', '-')} is {given}, expected {own}, with which {args.resume} was trained: drop the flag."
            )
        setattr(args, name, getattr(defaults, name) if own is None else own)


def extend(description: ModelDescription, args: argparse.Namespace) -> tuple[ModelDescription, torch.Tensor]:
    """Return the description of the extended model, and the model's label of each label of the data.

    description: of the run, with the hierarchy of the data. Raises ValueError if the data does not fit the adapter.
    """
    source, data = read_description(args.resume), description.hierarchy
    if source.encoder and description.encoder and source.encoder != description.encoder:
        raise ValueError(
            f"{args.resume} was trained on latents of encoder {source.encoder:.8}, found {description.encoder:.8}: pass the "
            "--vae it was trained with."
        )
    old = set(source.hierarchy.classes)
    known = [name for name in data.classes if name in old]
    if args.train == "rows" and known or len(known) == data.num_classes:
        raise ValueError(
            f"The data has {len(known)} classes that {args.resume} has already ({known[0]}), expected new ones: remove them, "
            "or pass --train all to train on them too."
            if len(known) < data.num_classes
            else f"The data has no class that {args.resume} lacks, expected new ones: drop --extend to train it further."
        )
    hierarchy = extend_hierarchy(source.hierarchy, data)
    extended = replace(
        description,
        hierarchy=hierarchy,
        null_row=source.null_row,
        original_classes=source.original_classes or source.hierarchy.num_classes,
    )
    if args.train == "rows":
        extended = replace(extended, patch_rows=new_rows(extended, source))
    return extended, torch.tensor([hierarchy.classes.index(name) for name in data.classes])


def extend_hierarchy(own: Hierarchy, other: Hierarchy) -> Hierarchy:
    """Return `own` with the classes, superclasses and further nodes of `other` that it lacks, each at the end.

    Raises ValueError if a class has different superclasses or other nodes in them.
    """
    superclasses = [*own.superclasses, *(name for name in other.superclasses if name not in own.superclasses)]
    parent_of = dict(zip(own.classes, own.parents.tolist()))
    for name, parent in zip(other.classes, other.parents.tolist()):
        parent = superclasses.index(other.superclasses[parent])
        if parent_of.setdefault(name, parent) != parent:
            raise ValueError(
                f"Class {name} is in superclass {superclasses[parent]} here, expected {superclasses[parent_of[name]]} as in "
                f"{own.name}: move its folder or rename the class."
            )
    ranks = []
    for rank, same in zip(own.ranks, other.ranks):
        node_of = dict(zip(own.classes, rank.names()))
        for name, node in zip(other.classes, same.names()):
            if node_of.setdefault(name, node) != node:
                raise ValueError(
                    f"Class {name} is in {rank.name} {node} here, expected {node_of[name]} as in {own.name}: move its folder "
                    "or rename the class."
                )
        ranks.append(Rank.of_names(rank.name, [*node_of.values()]))
    return Hierarchy([*parent_of], superclasses, [*parent_of.values()], own.name, ranks, own.top)
