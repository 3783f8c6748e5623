"""Tensors by name out of what others pickled with `torch.save`, without running the file or believing it.

`torch.load(weights_only=True)` runs no code, but it fills memory on a file's word (a pickled `bytearray(10**10)`, a
deflated member, a tensor of 10^12 numbers over one) and checks no checksum: those are looked at here first. What
remains is mapped, not read.
"""

import argparse
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path

import torch

from runtime.text import shorten

RETRY_HINT = "download it again, or name another file"
LEGACY_PICKLES = (
    5  # pickles at the start of a file that is no zip: magic number, protocol, system, the record, keys of the storages
)
KNOWN_NAMES = re.compile(  # all that tensors, plain values and the flags of a training are made of
    r"torch._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)|torch (\w+Storage|Size|device)|"
    r"torch.storage UntypedStorage|torch (b?float|u?int|complex|bool)\d*\w*|"
    r"collections OrderedDict|argparse Namespace|(builtins|__builtin__) set"
)


def check_file(path):
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}, expected weights: check the path.")
    with open(path, "rb"):  # what may not be read is absent to safetensors
        pass


def check_finite(tensors, path):
    """ValueError where weights are NaN or infinite.

    Sums tell: one of finite numbers is finite too, unless it overflows. Those of DiT-XL/2's 675M numbers take 0.2 s, where
    a look at each of them takes 2.1 s.
    """
    weights = {name: t for name, t in tensors.items() if t.is_floating_point()}
    weights = {name: t.float() if t.element_size() == 1 else t for name, t in weights.items()}  # float8 has no sum
    bad = [name for name, t in weights.items() if not t.sum().isfinite() and not t.isfinite().all()]
    if bad:
        raise ValueError(
            f"{path} has numbers that are not finite in {shorten(bad, str)}, expected finite weights: {RETRY_HINT}."
        )


def read_tensors(path, keys):
    """{name: tensor} of what `torch.save` wrote: a dict of tensors, or one that has such a dict under one of `keys`, the
    first that is there.

    A prefix `module.` is dropped. ValueError where the file is absent, damaged, something else, or made to harm.
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


def read_pickle(path):
    """What `torch.save` wrote, if it holds only tensors, plain values and argparse.Namespace; no code in it is run."""
    check_file(path)
    try:
        zipped = check_zip(path) if is_zip(path) else check_legacy(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about files that are then refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except PickledCode as error:
        raise ValueError(
            f"{path} holds pickled code, which is not run ({error}), expected tensors only: convert it to safetensors where "
            "you trust it."
        ) from None
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is no checkpoint that torch can read, expected DiT's form: {RETRY_HINT}.") from None
    except Exception as error:  # a damaged pickle raises anything: struct.error, AssertionError, TypeError, ...
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(f"{path} is truncated or no checkpoint ({reason}): {RETRY_HINT}.") from None


class PickledCode(Exception):
    """What a pickle wants to call."""


def is_zip(path):
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def check_zip(path):
    """True for a zip as torch writes it: nothing compressed, every checksum right, and a harmless pickle."""
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
    """False, since it is no zip, for a harmless pickle, or several in a row."""
    with open(path, "rb") as stream:
        for _ in range(LEGACY_PICKLES):
            check_names(stream)
    return False


def check_names(stream):
    """Read a pickle without building anything; `Code` if it names what no tensor is made of."""
    try:
        for operation, argument, _ in pickletools.genops(stream):
            if operation.name in ("GLOBAL", "INST") and not KNOWN_NAMES.fullmatch(argument):
                raise PickledCode(argument.replace(" ", "."))
            if operation.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):  # torch.save writes protocol 2
                raise PickledCode(operation.name)
    except ValueError as error:
        raise pickle.UnpicklingError(str(error)) from None
