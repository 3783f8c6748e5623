"""The files of adapters and training states: safetensors with a description and a digest.

An adapter is one safetensors file: the averages (EMA) of the trained parameters and, as JSON in its metadata, a
`ModelDescription`. Without a base it holds the complete model. A training state (training/state.py) has the same form.
The hierarchy with its class names is a tensor of bytes (hierarchy/archive.py). Each file has a SHA-256 of its contents,
since safetensors has none. Nothing is ever pickled.
"""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpoint.description import ADAPTER, ModelDescription
from checkpoint.torch_files import RETRY_HINT, check_file, check_finite, read_tensors
from hierarchy import Hierarchy, archive
from models import DiT
from runtime.files import atomic_write
from runtime.text import one_line

PACKED = "hierarchy"  # the tensor of bytes with the hierarchy
LONGEST_TEXT = 1 << 20  # characters of a description
NOT_WEIGHTS = ("row/", "exp_avg")  # tensors of a training state that are losses or moments

Tensors = dict[str, torch.Tensor]

# ---- reading -------------------------------------------------------------------------------------


def read_safetensors(path: str | os.PathLike, contents: bool = True) -> tuple[Tensors, ModelDescription | None]:
    """Read a safetensors file, or its description alone (no tensors) without its `contents`.

    The description is None if the file has none. A file with a description has a digest too, which is checked with the
    contents. Raises ValueError if the file is damaged.
    """
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            ours = PACKED in names or "json" in metadata or "sha256" in metadata  # one of them may be damaged
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
    except (
        SafetensorError,
        ValueError,
        RecursionError,
    ) as error:  # the last two also from JSON and the packed hierarchy
        raise ValueError(f"{path} is damaged ({one_line(error)}), expected a safetensors file: {RETRY_HINT}.") from None


def file_metadata(tensors: Tensors, text: str) -> dict[str, str]:
    """Return the metadata of a file with the description `text` (JSON): the text and a SHA-256 of text and tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return {"format": "pt", "json": text, "sha256": digest.hexdigest()}


def read_description(path: str | os.PathLike) -> ModelDescription | None:
    """Read the description of a safetensors file; None if it has none."""
    return read_safetensors(path, contents=False)[1]


def read_digest(path: str | os.PathLike) -> str | None:
    """Read the SHA-256 that a safetensors file says its contents have; None if it says none."""
    check_file(path)
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("sha256")


def read_weights(path: str | os.PathLike) -> tuple[Tensors, ModelDescription | None]:
    """Read any file of weights; the description of a third-party file is None.

    Of a checkpoint {"model", "ema", "opt", "args"} the EMA is taken. Raises ValueError if the file is absent, damaged,
    something else, or has non-finite weights.
    """
    path = Path(path)
    ours = path.suffix == ".safetensors"
    tensors, description = read_safetensors(path) if ours else (read_tensors(path, ("ema", "model")), None)
    check_finite({name: t for name, t in tensors.items() if not name.startswith(NOT_WEIGHTS)}, path)
    return tensors, description


def is_adapter(path: str | os.PathLike | None) -> bool:
    """Return whether `path` is a safetensors file whose description says that it is an adapter."""
    if not path or not Path(path).is_file() or Path(path).suffix != ".safetensors":
        return False
    description = read_description(path)
    return description is not None and description.format == ADAPTER


# ---- writing -------------------------------------------------------------------------------------


def save_safetensors(path: str | os.PathLike, tensors: Tensors, description: ModelDescription):
    """Write tensors with a description; the file appears complete or not at all."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    packed = archive.pack_hierarchy(description.hierarchy.to_dict())
    tensors[PACKED] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    write_tensors(path, tensors, file_metadata(tensors, json.dumps(description.to_record())))


def write_tensors(path: str | os.PathLike, tensors: Tensors, metadata: dict[str, str]):
    """Write a safetensors file, complete or not at all. Raises ValueError if the disk is full."""

    def write(part):
        try:
            save_file(tensors, part, metadata=metadata)
        except SafetensorError as error:  # "I/O error: No space left on device (os error 28)"
            raise ValueError(f"{path} could not be written ({error}): make room or choose another folder.") from None

    atomic_write(path, write)


def save_adapter(
    path: str | os.PathLike,
    averages: Tensors,
    model: DiT,
    description: ModelDescription,
    dtype: torch.dtype = torch.float32,
):
    """Write an adapter: the EMA of the trained parameters, and without a base the model's other tensors too.

    A patch (`patch_rows`) holds these rows of the class table alone.
    """
    tensors = dict(averages) if description.base else model.state_dict() | averages
    if description.patch_rows:
        tensors = {name: table[description.patch_rows] for name, table in tensors.items()}
    save_safetensors(path, {name: t.to(dtype) for name, t in tensors.items()}, replace(description, format=ADAPTER))
