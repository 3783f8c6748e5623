"""Malicious files and their readers: pickles that run code, archive bombs, descriptions with forbidden paths."""

import bz2
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import torch
from helpers.images import bomb
from helpers.tiny_files import random_dit, save_record
from helpers.tiny_latents import write_latents
from safetensors.torch import save_file

from checkpoint.description import ADAPTER
from checkpoint.format import file_metadata, is_adapter
from checkpoint.loading import load_adapted, load_full_weights, sha256
from dataset import latents
from dataset.images import read_crop
from dataset.latents import LatentData
from evaluation.image_sets import Folder, open_set
from evaluation.weights import read_network_weights
from hierarchy import Hierarchy
from tools import check_data

LARGE = 10**12


class Trap:
    """The code in a pickle: running it leaves a folder behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


# ---- pickles: name -> write(path, what is to be run) ----------------------------------------------


def wrapped(what):
    return {"ema": {"weight": torch.zeros(1)}, "args": {"deep": [{"deeper": what}]}}


def deflated(path, trap):
    """100 MB in 98 KB, which torch.load(weights_only=True) unpacks."""
    stored = path.with_suffix(".stored")
    torch.save({"weight": torch.zeros(25_000_000)}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    assert path.stat().st_size < 100_000


def object_array(path, trap):
    objects = np.array([trap], dtype=object)
    np.savez(path, mu=objects, sigma=np.eye(2), record=json.dumps({"format": "finediffusion-statistics-1"}))


def script(path, trap):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


PICKLES = {
    "zip.pt": lambda path, trap: torch.save({"ema": {"weight": trap}}, path),
    "legacy.pt": lambda path, trap: torch.save({"a": trap}, path, _use_new_zipfile_serialization=False),
    "nested.pt": lambda path, trap: torch.save(wrapped(trap), path),
    **{
        f"protocol{n}.pt": lambda path, trap, n=n: path.write_bytes(pickle.dumps({"args": trap}, protocol=n))
        for n in (0, 2, 5)
    },
    "eval.pt": lambda path, trap: torch.save(Call(eval, f"__import__('os').mkdir({trap.path!r})"), path),
    "getattr.pt": lambda path, trap: torch.save({"a": Call(getattr, "text", "upper")}, path),
    "module.pt": lambda path, trap: torch.save(torch.nn.Linear(2, 2), path),
    "script.pt": script,
    "memory.pt": lambda path, trap: torch.save({"a": Call(bytearray, 10**10)}, path),
    "expanded.pt": lambda path, trap: torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, path),
    "deflated.pt": deflated,
    "pickle.safetensors": lambda path, trap: torch.save({"a": trap}, path),
}


# ---- safetensors ---------------------------------------------------------------------------------


def header(text, size=None):
    return lambda path, trap: path.write_bytes(struct.pack("<Q", size or len(text)) + text.encode())


def tensor(shape, end, dtype="F32"):
    return header(json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}))


def described(**changes):
    """Write an intact adapter without a base that claims to be of another kind."""

    def write(path, trap):
        pets = Hierarchy(("lynx", "pug"), ("cats", "dogs"), [0, 1], "pets")
        about = dict(
            model="DiT-Ti/2", image_size=8, latent_size=8, channels=3, vae="none", method="full", embedder="null"
        )
        about |= dict(base=None, step=1, format=ADAPTER) | changes
        weights = random_dit(input_size=8, in_channels=3, num_classes=2)
        save_record(path, weights, about, pets)

    return write


def packed(*texts, times=1):
    """Write an intact adapter whose hierarchy unpacks to many repetitions of `texts`."""

    def write(path, trap):
        about = json.dumps({"format": ADAPTER})
        tensors = {
            "hierarchy": torch.frombuffer(bytearray(b"".join(map(bz2.compress, texts)) * times), dtype=torch.uint8)
        }
        save_file(tensors, path, file_metadata(tensors, about))

    return write


REST = json.dumps({"superclasses": ["a"], "parents": [0], "numbered": False}).encode()
SAFETENSORS = {
    "longer.safetensors": header("{}", size=LARGE),
    "huge.safetensors": tensor([LARGE], 4 * LARGE),
    "overflow.safetensors": tensor([2**62, 2**62], 4),
    "negative.safetensors": tensor([-4], 16),
    "deep.safetensors": header('{"__metadata__":' + "[" * 100_000),
    "model.safetensors": described(model="DiT-XXL/1"),
    "method.safetensors": described(method="__class__"),
    "latents.safetensors": described(latent_size=10**9),
    "latents2.safetensors": described(image_size=16384, latent_size=16384),
    "channels.safetensors": described(channels=1000),
    "numbers.safetensors": described(step="7"),
    "text.safetensors": described(more="x" * 10**7),
    "passwd.safetensors": described(base={"path": "../../../../../../etc/passwd", "sha256": "0" * 64}),
    "device.safetensors": described(base={"path": "/dev/zero", "sha256": "0" * 64}),
    "address.safetensors": described(base={"path": "https://example.org/dit.pt", "sha256": "0" * 64}),
    "list.safetensors": described(base=["dit.pt"]),
    "names.safetensors": packed(REST, b"0\n" * (1 << 21), b"\n" * (1 << 21)),
    "shared.safetensors": packed(REST, b"0" + b"x" * 4_000_000 + b"_\n" + b"1\n" * 10**6, b"\n" * (10**6 + 1)),
    "texts.safetensors": packed(b" " * 8_000_000, times=100),
    "spaces.safetensors": packed(b" " * 100_000_000),
    "brackets.safetensors": packed(b"[" * 8_000_000),
    "range.safetensors": packed(b'{"superclasses":["a"],"parents":{"a":[[0,1000000000]]}}'),
}


# ---- arrays and images ---------------------------------------------------------------------------


def deflated_array(path, trap):
    np.savez_compressed(path, mu=np.zeros(2**25), sigma=np.eye(2))


def shaped(name, text):
    """Write an .npz with one array that consists of its header alone."""

    def write(path, trap):
        with zipfile.ZipFile(path, "w") as archive:
            head = text.ljust(117).encode() + b"\n"
            archive.writestr(f"{name}.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head)

    return write


def latents_of_objects(path, trap):
    write_latents(path)
    objects = np.array([trap] * 4, dtype=object)
    np.save(path / "labels.npy", objects, allow_pickle=True)
    info = json.loads((path / "latents.json").read_text())
    info["hashes"]["labels.npy"] = sha256(path / "labels.npy")
    del info["sha256"]
    (path / "latents.json").write_text(latents.sealed(info))


def picture(path, trap):
    path.mkdir()
    (path / "1.png").write_bytes(bomb())


def examined(path):
    found = check_data.examine(path / "1.png", 8)
    assert "unreadable" in found
    raise ValueError(found["unreadable"])


def first_image(path):
    folder = Folder(path)
    folder.label(None)
    folder.open(0)


ARRAYS = {
    "objects.npz": object_array,
    "deflated.npz": deflated_array,
    "long.npz": shaped("arr_0", f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({LARGE}, 8, 8, 3)}}"),
    "statistics.npz": shaped("mu", f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({LARGE},)}}"),
    "header.npz": shaped("mu", "__import__('os').mkdir('sprung')"),
}


def read_checkpoint(path):
    """Read a file as sample.py --ckpt and train.py --resume do."""
    load_adapted(path) if is_adapter(path) else load_full_weights(path)


READERS = [  # reader, files
    (read_checkpoint, PICKLES | SAFETENSORS),
    (read_network_weights, PICKLES),
    (open_set, ARRAYS),
    (lambda path: LatentData(path), {"latents": latents_of_objects}),
    (lambda path: read_crop(path / "1.png", 8), {"trained on": picture}),
    (first_image, {"evaluated": picture}),
    (examined, {"examined": picture}),
    (
        Hierarchy.load,
        {"range.json": lambda path, trap: path.write_text('{"superclasses":["a"],"parents":{"a":[[0,1e9]]}}')},
    ),
]
