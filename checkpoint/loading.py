"""Files of weights: DiT's and FineDiffusion's checkpoints, our adapters and training states.

An adapter is one safetensors file: the averages (EMA) of the trained parameters and, as JSON in its metadata, a
description: model, image size, method, step, and the SHA-256 of the base file they belong to. The hierarchy with its
class names is a tensor of bytes (packing.py). Without a base it holds the whole model. Training states (runs.py) are
files of the same form. Each has a SHA-256 of its contents, since safetensors has none; nothing here is ever pickled.
"""

from dataclasses import replace
from pathlib import Path

import torch

from checkpoint.description import STATE, Base
from checkpoint.download import find_weights
from checkpoint.format import is_adapter, read_weights
from finetune import METHODS, add_gammas, kind_of
from models import DiT_models
from runtime.files import sha256
from runtime.text import shorten

TABLE = "y_embedder.embedding_table.weight"


# ---- building and loading ------------------------------------------------------------------------


def build_model(description, class_dropout_prob=0.1, counts_only=False):
    """The model of a description: its "model", "latent_size", "channels", "hierarchy", "embedder", "null_row" and "method".

    "hierarchy" is a `Hierarchy`; "null_row" may be absent. ValueError where a tiered one's hierarchy does not know its
    parents, unless `counts_only`: the model cannot train then.
    """
    hierarchy, tiered = description.hierarchy, description.embedder == "tiered"
    mapped = tiered and (hierarchy.has_parents or not counts_only)
    model = DiT_models[description.model](
        input_size=description.latent_size,
        in_channels=description.channels,
        num_classes=hierarchy.num_classes,
        num_super_classes=hierarchy.num_super_classes if tiered else 1,
        parents=hierarchy.parents if mapped else None,
        class_dropout_prob=class_dropout_prob,
        null_row=description.null_row,
    )
    add_gammas(model, METHODS[description.method].gammas)
    return model


def load_weights(model, tensors, source, new_table=False):
    """Put `tensors` into `model`; norms and gammas may be absent.

    A plain DiT lacks all norms, an adapter of difffit-orig on it the last one. With `new_table` a class table of
    another shape is left out: the model keeps its own. Returns the names left as they were. ValueError where anything
    else is missing, unexpected or of another shape, and `source` is named.
    """
    tensors, absent = match_state_dict(model, tensors, source, new_table)
    model.load_state_dict(tensors, strict=False)
    return absent


def match_state_dict(model, tensors, source, new_table=False):
    """(those of `tensors` that are to be loaded, names left as they are), see `load`; the model is only looked at."""
    own = model.state_dict()
    tensors = dict(tensors)
    if new_table and TABLE in tensors and tensors[TABLE].shape != own[TABLE].shape:
        del tensors[TABLE]
    absent = [name for name in own if name not in tensors]
    free = {name for name in own if kind_of(name) == "gamma"} | ({TABLE} if new_table else set())
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
            ("no floats", kinds),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit this model ({'; '.join(problems)}): choose its --model, --image-size, --num-classes and "
            "--num-super-classes, or another file."
        )
    return tensors, absent


def load_base_weights(base, needed_by, path=None):
    """Tensors of the base {"path", "sha256"} that `needed_by` names, found at `path` or where it was; SHA-256 checked."""
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
    return load_full_weights(path)[0]


def load_full_weights(path, base=None):
    """({name: tensor}, description) of all weights that the file stands for: an adapter's are put on its base's.

    `base`: where the base is, if not where it was. ValueError where the file is a training state or no whole adapter.
    """
    tensors, description = read_weights(path)
    if description and description.format == STATE:
        raise ValueError(f"{path} is a training state, expected weights or an adapter: name the adapter of that step.")
    if description and description.base:
        description = replace(description, trained=frozenset(tensors))
        tensors = load_base_weights(description.base, path, base) | tensors
    elif base:
        raise ValueError(f"{path} holds a whole model, expected no --base: leave it out.")
    return tensors, description


def load_adapted(path, base=None):
    """(model, description) of an adapter and its base: the EMA model of the run, bit for bit."""
    if not is_adapter(path):
        raise ValueError(f"{path} is no adapter, expected one that train.py wrote: name another file.")
    tensors, description = load_full_weights(path, base)
    with torch.device("meta"):  # no memory is taken on the word of the description
        match_state_dict(build_model(description), tensors, path)
    model = build_model(description)
    load_weights(model, tensors, path)
    return model.eval(), description


@torch.no_grad()
def init_from(model, trained, path, hierarchy=None, table_init="normal", table_std=0.02, seed=0):
    """Fill the model of a new fine-tune from the weights or the adapter at `path`, or from nothing (None).

    A class table of another shape, or of an adapter of another `hierarchy`, is drawn anew, normal with `table_std`,
    around 0 or ("mean") around the mean of the file's rows. `trained`: names of the parameters that will be trained.
    Returns the model's base: {"path", "sha256"}, or None.
    """
    table = model.y_embedder.embedding_table.weight
    fresh = torch.randn(table.shape, generator=torch.Generator().manual_seed(seed)) * table_std
    if path is None:
        table.copy_(fresh)
        return None
    tensors, description = load_full_weights(path)
    rows = tensors.get(TABLE)
    if hierarchy and description and description.hierarchy != hierarchy:
        tensors.pop(TABLE)
    if TABLE in load_weights(model, tensors, path, new_table=True):
        table.copy_(fresh + (rows.float().mean(0) if table_init == "mean" and rows is not None else 0))
    if description and description.base and description.trained <= set(trained):
        return description.base  # what the adapter changed is written again: its own base does
    return Base(str(path), sha256(path))
