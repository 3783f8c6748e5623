"""Adapters and training states: safetensors files with a description and a digest."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpoint.description import ADAPTER, ModelDescription
from checkpoint.torch_files import RETRY_HINT, check_file, check_finite, read_tensors
from hierarchy import Hierarchy, archive
from runtime.files import atomic_write
from runtime.text import one_line

PACKED = "hierarchy"  # the tensor of bytes with the hierarchy
LONGEST_TEXT = 1 << 20  # characters of a description
NOT_WEIGHTS = ("row/", "exp_avg")  # tensors of a training state that are no weights: losses, the optimizer's moments


# ---- reading -------------------------------------------------------------------------------------


def read_safetensors(path, contents=True):
    """({name: tensor}, description) of a safetensors file, or ({}, description) without its `contents`.

    ValueError where it is damaged: a file with a description has a digest too, which is checked with the contents.
    """
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            ours = PACKED in names or "json" in metadata or "sha256" in metadata  # whichever was damaged
            if not ours:
                return {name: file.get_tensor(name) for name in names if contents}, None
            text = metadata.get("json", "")
            if len(text) > LONGEST_TEXT:
                raise ValueError(f"its description is longer than {LONGEST_TEXT} characters")
            tensors = {name: file.get_tensor(name) for name in names if contents or name == PACKED}
            if contents and metadata != file_metadata(tensors, text):
                raise ValueError("its contents are not those that were written")
            hierarchy, packed = None, tensors.pop(PACKED, None)
            if packed is not None:
                packed = packed.reshape(-1).view(torch.uint8).numpy().tobytes()
                hierarchy = Hierarchy.from_dict(archive.unpack_hierarchy(packed))
            return tensors, ModelDescription.from_record(json.loads(text), hierarchy)
    except (SafetensorError, ValueError, RecursionError) as error:  # of JSON and of the packed hierarchy too
        raise ValueError(f"{path} is damaged ({one_line(error)}), expected a safetensors file: {RETRY_HINT}.") from None


def file_metadata(tensors, text):
    """The metadata of a file with a description, JSON `text`: the SHA-256 is that of the text and of all tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return {"format": "pt", "json": text, "sha256": digest.hexdigest()}


def read_description(path):
    """The description alone of a safetensors file."""
    return read_safetensors(path, contents=False)[1]


def read_weights(path):
    """({name: tensor}, description) of any file of weights; the description is {} for those of others.

    Of {"model", "ema", "opt", "args"} the EMA is taken. ValueError where the file is absent, damaged or something else, or
    has weights that are not finite.
    """
    path = Path(path)
    ours = path.suffix == ".safetensors"
    tensors, description = read_safetensors(path) if ours else (read_tensors(path, ("ema", "model")), None)
    check_finite({name: t for name, t in tensors.items() if not name.startswith(NOT_WEIGHTS)}, path)
    return tensors, description


def is_adapter(path):
    """True if `path` names a safetensors file whose metadata say so."""
    if not path or not Path(path).is_file() or Path(path).suffix != ".safetensors":
        return False
    description = read_description(path)
    return description is not None and description.format == ADAPTER


# ---- writing -------------------------------------------------------------------------------------


def save_safetensors(path, tensors, description):
    """Write tensors and a description, whose "hierarchy" is a `Hierarchy`; the file appears whole or not at all."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    packed = archive.pack_hierarchy(description.hierarchy.to_dict())
    tensors[PACKED] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    write_tensors(path, tensors, file_metadata(tensors, json.dumps(description.to_record())))


def write_tensors(path, tensors, metadata):
    """A safetensors file, whole or not at all; ValueError where the disk is full."""

    def write(part):
        try:
            save_file(tensors, part, metadata=metadata)
        except SafetensorError as error:  # "I/O error: No space left on device (os error 28)"
            raise ValueError(f"{path} could not be written ({error}): make room or choose another folder.") from None

    atomic_write(path, write)


def save_adapter(path, averages, model, description, dtype=torch.float32):
    """`averages`: {name: EMA of a trained parameter}. Without a base the model's other tensors are written too."""
    tensors = dict(averages) if description.base else model.state_dict() | averages
    save_safetensors(path, {name: t.to(dtype) for name, t in tensors.items()}, replace(description, format=ADAPTER))
