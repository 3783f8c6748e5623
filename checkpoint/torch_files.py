"""Load untrusted `torch.save` files without running their code.

`torch.load(weights_only=True)` runs no code, but it allocates what a file claims (a pickled `bytearray(10**10)`, a
deflated member, a tensor of 10^12 elements over one) and checks no checksum: these are checked here first. The rest is
memory-mapped, not read.
"""

import argparse
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint.download import where_to_get
from runtime.text import one_line, shorten

RETRY_HINT = "download it again, or name another file"
# pickles at the start of a file that is not a zip: magic number, protocol, system, record, keys of the storages
LEGACY_PICKLES = 5
KNOWN_NAMES = re.compile(  # the globals of tensors, plain values and the flags of a training
    r"torch._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)|torch (\w+Storage|Size|device)|"
    r"torch.storage UntypedStorage|torch (b?float|u?int|complex|bool)\d*\w*|"
    r"collections OrderedDict|argparse Namespace|(builtins|__builtin__) set"
)


def check_file(path: str | os.PathLike):
    """Raise ValueError if there is no such file, and OSError if it cannot be read."""
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}, expected weights: {where_to_get(path)}.")
    with open(path, "rb"):  # safetensors reports an unreadable file as absent
        pass


def check_finite(tensors: dict[str, torch.Tensor], path: str | os.PathLike):
    """Raise ValueError if weights are NaN or infinite.

    A sum of finite numbers is finite, unless it overflows, so only suspicious tensors are searched: 0.2 s instead of
    2.1 s for DiT-XL/2's 675M parameters.
    """
    weights = {name: t for name, t in tensors.items() if t.is_floating_point()}
    weights = {name: t.float() if t.element_size() == 1 else t for name, t in weights.items()}  # float8 has no sum
    bad = [name for name, t in weights.items() if not t.sum().isfinite() and not t.isfinite().all()]
    if bad:
        raise ValueError(f"{path} has non-finite weights in {shorten(bad, str)}, expected finite ones: {RETRY_HINT}.")


def read_tensors(path: str | os.PathLike, keys: Sequence[str]) -> dict[str, torch.Tensor]:
    """Read a `torch.save` file with a dict of tensors, or with such a dict under the first of `keys` that it has.

    A prefix `module.` is dropped. Raises ValueError if the file is absent, damaged, hostile or something else.
    """
    record = read_pickle(path)
    if isinstance(record, dict):
        record = next((record[key] for key in keys if isinstance(record.get(key), dict)), record)
    if not isinstance(record, dict) or not record or not all(map(torch.is_tensor, record.values())):
        among = " or ".join(f'"{key}"' for key in keys)
        raise ValueError(
            f"{path} holds {type(record).__name__}, expected tensors by name, or a dict with {among}: {RETRY_HINT}."
        )
    size = Path(path).stat().st_size
    for name, tensor in record.items():
        if tensor.numel() * tensor.element_size() > size:
            raise ValueError(
                f"{path} has {name} {tuple(tensor.shape)}, more than a file of {size:,} bytes holds: {RETRY_HINT}."
            )
    return {str(name).removeprefix("module."): tensor for name, tensor in record.items()}


def read_pickle(path: str | os.PathLike) -> object:
    """Read a `torch.save` file of tensors, plain values and argparse.Namespace; no code in it is run."""
    check_file(path)
    try:
        zipped = check_zip(path) if is_zip(path) else check_legacy(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about files that are then refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except PickledCode as error:
        raise ValueError(
            f"{path} holds pickled code, which is not run ({error}), expected tensors only: convert it to safetensors if "
            "you trust it."
        ) from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is not a checkpoint that torch can read, expected DiT's form: {RETRY_HINT}."
        ) from None
    except Exception as error:  # a damaged pickle raises anything: struct.error, AssertionError, TypeError, ...
        raise ValueError(f"{path} is truncated or not a checkpoint ({one_line(error)}): {RETRY_HINT}.") from None


class PickledCode(Exception):
    """A pickle names code that tensors do not need."""


def is_zip(path):
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def check_zip(path):
    """Return True for a zip as torch writes it: nothing compressed, every checksum right, a harmless pickle."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in members):
            raise zipfile.BadZipFile("it is compressed, which torch.save does not do")
        if sum(info.file_size for info in members) > Path(path).stat().st_size:
            raise zipfile.BadZipFile("its members overlap")
        if (bad := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{bad} is damaged")
        for info in members:
            if info.filename.lower().endswith(".pkl"):  # torch finds its data.pkl in any case
                with archive.open(info) as stream:
                    check_names(stream)
    return True


def check_legacy(path):
    """Return False, since it is not a zip, for harmless pickles."""
    with open(path, "rb") as stream:
        for _ in range(LEGACY_PICKLES):
            check_names(stream)
    return False


def check_names(stream):
    """Read a pickle without building anything; raise `PickledCode` if it names anything that tensors do not need."""
    try:
        for operation, argument, _ in pickletools.genops(stream):
            if operation.name in ("GLOBAL", "INST") and not KNOWN_NAMES.fullmatch(argument):
                raise PickledCode(argument.replace(" ", "."))
            if operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):  # torch.save writes protocol 2
                raise PickledCode(operation.name)
    except ValueError as error:
        raise pickle.UnpicklingError(str(error)) from None
