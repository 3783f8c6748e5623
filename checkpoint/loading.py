"""Build a model from a description, and load weights into it: DiT's and FineDiffusion's checkpoints, and adapters."""

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint.description import STATE, Base, ModelDescription
from checkpoint.download import find_weights
from checkpoint.format import Tensors, is_adapter, read_weights
from checkpoint.rows import initial_rows, insert_rows, match_rows
from finetune import METHODS, add_gammas, add_lora, fold_lora, kind_of
from models import DiT, DiT_models
from runtime.files import sha256
from runtime.text import shorten

TABLE = "y_embedder.embedding_table.weight"


def build_model(description: ModelDescription, class_dropout_prob: float = 0.1, counts_only: bool = False) -> DiT:
    """Build the model of a description, with DiT's initial weights.

    counts_only: accept a hierarchy without the superclass of each class; the model cannot train then.
    Raises ValueError if a tiered model's hierarchy lacks them otherwise.
    """
    hierarchy, tiered = description.hierarchy, description.tiered
    mapped = tiered and (hierarchy.has_ancestors or not counts_only)
    model = DiT_models[description.model](
        input_size=description.latent_size,
        in_channels=description.channels,
        num_classes=hierarchy.num_classes,
        num_super_classes=hierarchy.num_super_classes if tiered else 1,
        parents=hierarchy.ancestors if mapped else None,
        class_dropout_prob=class_dropout_prob,
        null_row=description.null_row,
        ranks=[len(rank.nodes) for rank in hierarchy.ranks] if tiered else (),
        path=description.embedder == "path",
    )
    add_gammas(model, METHODS[description.method].gammas)
    if description.lora_rank:
        add_lora(model, description.lora_rank, description.lora_targets.split())
    return model


def load_weights(model: DiT, tensors: Tensors, source: str | os.PathLike, new_table: bool = False) -> list[str]:
    """Load tensors into a model, and return the names of the parameters that were left as they are.

    LayerNorm affines and DiffFit's gammas may be absent: a plain DiT lacks all norms, an adapter of difffit-orig on it
    the final one. With `new_table`, a class table of another shape is ignored and low-rank updates may be absent. Raises
    ValueError, which names `source`, if anything else is missing, unexpected or of another shape.
    """
    tensors, absent = match_state_dict(model, tensors, source, new_table)
    model.load_state_dict(tensors, strict=False)
    return absent


def match_state_dict(
    model: DiT, tensors: Tensors, source: str | os.PathLike, new_table: bool = False
) -> tuple[Tensors, list[str]]:
    """Return the tensors to load and the names that are absent, see `load_weights`; the model is not changed."""
    own = model.state_dict()
    tensors = dict(tensors)
    if new_table and TABLE in tensors and tensors[TABLE].shape != own[TABLE].shape:
        del tensors[TABLE]
    absent = [name for name in own if name not in tensors]
    free = {name for name in own if kind_of(name) == "gamma" or new_table and kind_of(name) in ("table", "lora")}
    for part in ("blocks.", "final_layer."):
        norms = {name for name in own if kind_of(name) == "norm" and name.startswith(part)}
        free |= norms if norms.isdisjoint(tensors) else set()
    missing = [name for name in absent if name not in free]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, here {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    kinds = [
        f"{name} {tensors[name].dtype}" for name in own if name in tensors and not tensors[name].is_floating_point()
    ]
    problems = [
        f"{label} {shorten(names, str)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("not floating-point", kinds),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit this model ({'; '.join(problems)}): choose its --model, --image-size, --num-classes and "
            "--num-super-classes, or another file."
        )
    return tensors, absent


def find_base(base: Base, needed_by: str | os.PathLike, path: str | os.PathLike | None = None) -> Path:
    """Return the file of the base that the file `needed_by` names: `path`, or the place where it was.

    Raises ValueError if it is not there or its SHA-256 is another.
    """
    path = find_weights(path or base.path)
    if not path.is_file():
        raise ValueError(
            f"{needed_by} needs its base {Path(base.path).name}, but there is no {path}: put it there, or pass it "
            "as --base (train.py: --resume)."
        )
    found = sha256(path)
    if found != base.sha256:
        raise ValueError(
            f"{path} is not the base of {needed_by} (SHA-256 {found[:12]}…, expected {base.sha256[:12]}…): pass the "
            "file it was trained from as --base (train.py: --resume)."
        )
    return path


def load_base_weights(
    base: Base, needed_by: str | os.PathLike, path: str | os.PathLike | None = None
) -> tuple[Tensors, ModelDescription | None]:
    """Load the base that the file `needed_by` names, see `find_base`, with its description."""
    return load_full_weights(find_base(base, needed_by, path))


def load_full_weights(
    path: str | os.PathLike, base: str | os.PathLike | None = None
) -> tuple[Tensors, ModelDescription | None]:
    """Load the full state dict; an adapter is merged onto its base.

    base: where the adapter's base is, if it is not where it was. Raises ValueError for a training state, and for a
    `base` that the file does not need.
    """
    tensors, description = read_weights(path)
    if description and description.format == STATE:
        raise ValueError(f"{path} is a training state, expected weights or an adapter: name the adapter of that step.")
    if description and description.base:
        description = replace(description, trained=frozenset(tensors))
        below, about = load_base_weights(description.base, path, base)
        if description.patch_rows:
            tensors = {TABLE: insert_rows(tensors[TABLE], description, below[TABLE], about, path)}
        else:
            below = fold_lora(below, keep=tensors)
        tensors = below | tensors
    elif base:
        raise ValueError(f"{path} holds a complete model, expected no --base: leave it out.")
    return tensors, description


def load_adapted(path: str | os.PathLike, base: str | os.PathLike | None = None) -> tuple[DiT, ModelDescription]:
    """Load an adapter with its base: the run's EMA model, bit for bit, in evaluation mode.

    Raises ValueError if the file is not an adapter, is damaged, or does not fit its own description.
    """
    if not is_adapter(path):
        raise ValueError(f"{path} is not an adapter, expected one that train.py wrote: name another file.")
    tensors, description = load_full_weights(path, base)
    with torch.device("meta"):  # checks the shapes before a description can make us allocate memory
        match_state_dict(build_model(description), tensors, path)
    model = build_model(description)
    load_weights(model, tensors, path)
    return model.eval(), description


@torch.no_grad()
def init_from(
    model: DiT,
    trained: Collection[str],
    path: str | os.PathLike | None,
    description: ModelDescription,
    table_init: str = "normal",
    table_std: float = 0.02,
    seed: int = 0,
) -> tuple[Base | None, str]:
    """Fill the model of a new fine-tune from the weights or the adapter at `path`, or from nothing (None).

    Class rows are carried over from an adapter by what they mean, see `match_rows`. All other rows are drawn, normal with
    `table_std`, around 0 or (table_init "mean") around the mean of the file's rows; those of an extension are not drawn, see
    `initial_rows`. A checkpoint of DiT or FineDiffusion does not say what its rows mean, so none is carried over unless
    table_init is "keep": then all are.

    description: of the new model
    trained: names of the parameters that will be trained
    Returns the base that the new run's adapters belong to (None without weights), and a sentence about the rows.
    Raises ValueError if the weights do not fit the model, or "keep" meets a table of another shape.
    """
    table = model.y_embedder.embedding_table.weight
    fresh = torch.randn(table.shape, generator=torch.Generator().manual_seed(seed)) * table_std
    if path is None:
        table.copy_(fresh)
        return None, f"class table: {len(table):,} rows drawn"
    tensors, source = load_full_weights(path)
    tensors = fold_lora(tensors, keep=model.state_dict())
    load_weights(model, tensors, path, new_table=True)
    rows = tensors.get(TABLE)
    if table_init == "keep" and (rows is None or rows.shape != table.shape):
        found = "none" if rows is None else tuple(rows.shape)
        raise ValueError(
            f"--table-init is keep, but the class table of {path} is {found}, expected {tuple(table.shape)}: pass the "
            "--hierarchy and --embedder that it was trained with, or another --table-init."
        )
    matches = [None] * len(table)
    if rows is not None and table_init == "keep":
        matches = range(len(table))
    elif rows is not None and source:
        matches = match_rows(description, source)
    carried = [row for row, match in enumerate(matches) if match is not None]
    text = f"class table: {len(carried):,} rows carried over from {path}, {len(table) - len(carried):,} "
    if description.original_classes:
        table.copy_(initial_rows(description, source, rows))
        text += "start at the mean of their superclass"
    else:
        table.copy_(fresh + (rows.float().mean(0) if table_init == "mean" and rows is not None else 0))
        text += "drawn"
    if carried:
        table[carried] = rows[[matches[row] for row in carried]].to(table.dtype)
    if description.patch_rows:
        return Base(str(path), sha256(path)), text
    if source and source.base and source.trained <= set(trained) & tensors.keys():
        return source.base, text  # all that the adapter changed will be trained again: its base is enough
    return Base(str(path), sha256(path)), text
