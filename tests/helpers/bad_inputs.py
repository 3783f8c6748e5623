"""Bad inputs of the programs: MAKE[name](path, file) writes one; `file(name)` is the path of another."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from helpers.tiny_files import random_dit, save_record
from PIL import Image

from checkpoint.format import read_weights, save_safetensors
from checkpoint.loading import TABLE
from dataset.latents import sealed
from hierarchy import Hierarchy
from runtime.files import sha256


def hierarchy(**changes):
    pets = {"superclasses": ["cats", "dogs"], "classes": ["lynx", "manx", "beagle", "pug", "pug_dog"]}
    return text(json.dumps(pets | {"parents": [0, 0, 1, 1, 1]} | changes))


def text(content):
    return lambda path, file: path.write_text(content)


def cut(name, count):
    return lambda path, file: path.write_bytes(file(name).read_bytes()[:-count])


def dit(**sizes):
    return lambda path, file: torch.save(random_dit(**dict(input_size=8, in_channels=3, num_classes=9) | sizes), path)


def described(**changes):
    """Change the description of the adapter, or that of its base."""

    def make(path, file):
        tensors, description = read_weights(file("adapter"))
        if "base" in changes:
            base = replace(description.base, path=str(file(changes["base"])))
            description = replace(description, base=base)
        more = {name: value for name, value in changes.items() if name != "base"}
        save_record(path, tensors, description.to_record() | more, description.hierarchy)

    return make


def hollow(path, file):
    shutil.copytree(file("images"), path)
    for image in (path / "cats/manx").iterdir():
        image.unlink()
    (path / "cats/manx/readme.txt").touch()


def looped(path, file):
    shutil.copytree(file("images"), path)
    (path / "cats/loop").symlink_to(path)


def renamed(path, file):
    shutil.copytree(file("images"), path)
    (path / "cats/manx/0.png").rename(path / "cats/manx/9.png")


def vegfru_list(path, file):
    for folder in (path.parent, path.parent.parent / "veg200_images/carrot"):
        folder.mkdir(parents=True)
    (folder / "v_13_01_0001.jpg").touch()
    path.write_text("veg200_images/carrot/v_13_01_0001.jpg 12\nchive: none\n")


def nan(source, name):
    """Write weights with one NaN in the tensor `name`."""

    def make(path, file):
        tensors, description = read_weights(file(source))
        tensors[name].view(-1)[7] = torch.nan
        if description:
            save_safetensors(path, tensors, description)
        else:
            torch.save(tensors, path)

    return make


def ruined(path, file):
    (path / "states").mkdir(parents=True)
    for step in (1, 2):
        (path / f"states/000000{step}.safetensors").write_bytes(file("state").read_bytes()[:-step])


def vegfru(path, file):
    for name in Hierarchy.load("vegfru").classes:
        (path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path / name / "1.png")


def latents(**changes):
    def make(path, file):
        shutil.copytree(file("latents"), path)
        info = json.loads((path / "latents.json").read_text())
        del info["sha256"]
        (path / "latents.json").write_text(sealed(info | changes))

    return make


def mislabelled(path, file):
    shutil.copytree(file("latents"), path)
    labels = np.load(path / "labels.npy")
    labels[3] = 5
    np.save(path / "labels.npy", labels)
    info = json.loads((path / "latents.json").read_text())
    info["hashes"]["labels.npy"] = sha256(path / "labels.npy")
    del info["sha256"]
    (path / "latents.json").write_text(sealed(info))


def unlabelled(path, file):
    shutil.copytree(file("latents"), path)
    (path / "labels.npy").unlink()


MAKE = {
    "file.jpg": text(""),
    "empty": lambda path, file: path.mkdir(),
    "flat": lambda path, file: shutil.copytree(file("images") / "cats/manx", path),
    "hollow": hollow,
    "vegfru": vegfru,
    "looped": looped,
    "renamed": renamed,
    "vegfru/vegfru_list/vegfru_train.txt": vegfru_list,
    "pets.json": hierarchy(),
    "text.json": text("cats, dogs"),
    "fish.json": hierarchy(superclasses=["cats", "dogs", "fish"]),
    "short.json": hierarchy(parents=[0, 0, 1, 1]),
    "range.json": hierarchy(parents=[0, 0, 1, 1, 2]),
    "twice.json": hierarchy(classes=["lynx", "manx", "pug", "pug", "pug_dog"]),
    "wolves.json": hierarchy(parents=["cats", "cats", "dogs", "dogs", "wolves"]),
    "null.json": hierarchy(parents=[0, 0, 1, 1, None]),
    "cats.json": hierarchy(superclasses=["cats", "cats"]),
    "list.json": text('["cats", "dogs"]'),
    "other.json": hierarchy(parents=[0, 1, 1, 1, 1]),
    "empty.pt": text(""),
    "html.pt": text("<!DOCTYPE html><html>403</html>\n"),
    "html.safetensors": text("<!DOCTYPE html><html>403</html>\n"),
    "pointer.pt": text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 2700611775\n"),
    "pointer.safetensors": text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 48614528\n"),
    "nan.pt": nan("base", "blocks.1.attn.qkv.bias"),
    "nan.safetensors": nan("adapter", TABLE),
    "states/nan.safetensors": nan("state", f"average/{TABLE}"),
    "ruined": ruined,
    "cut.pt": cut("base", 5000),
    "cut.safetensors": cut("adapter", 50),
    "pickle.pt": lambda path, file: path.write_bytes(pickle.dumps({"model": Path("x")}, protocol=2)),
    "module.pt": lambda path, file: torch.save(torch.nn.Linear(2, 2), path),
    "list.pt": lambda path, file: torch.save([1, 2], path),
    "larger.pt": dit(input_size=16),  # as one of 512 pixels beside 256
    "deeper.pt": dit(depth=5),
    "wider.pt": dit(hidden_size=128),  # as a DiT-B beside an XL
    "latent.pt": dit(in_channels=4),
    "rebased.safetensors": described(base="deeper.pt"),
    "lost.safetensors": described(base="lost.pt"),
    "lost.pt": lambda path, file: None,
    "states/absent.safetensors": lambda path, file: None,
    "states/adapter.safetensors": lambda path, file: shutil.copy(file("adapter"), path),
    "scaled": latents(scale=0.5),
    "relabelled": latents(hierarchy=json.loads('{"superclasses": ["a"], "parents": [0, 0, 0, 0, 0]}')),
    "reformatted": latents(format="other"),
    "unlabelled": unlabelled,
    "mislabelled": mislabelled,
}
