"""A user's mistakes: one sentence on stderr, exit code 2, nothing written."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_dit, tree
from PIL import Image

import checkpoint
import sample
import train
from hierarchy import Hierarchy
from latents import sealed
from tools import encode_latents, read_glyphs

# ---- inputs: "@name" in a command is the file or folder that MAKE[name] writes -------------------


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
    """The adapter with other words in its description, or in that of its base."""

    def make(path, file):
        tensors, description = checkpoint.read(file("adapter"))
        base = description["base"] | {"path": str(file(changes["base"]))} if "base" in changes else description["base"]
        checkpoint.save_safetensors(path, tensors, description | changes | {"base": base})

    return make


def hollow(path, file):
    shutil.copytree(file("images"), path)
    for image in (path / "cats/manx").iterdir():
        image.unlink()
    (path / "cats/manx/readme.txt").touch()


def damaged_image(path, file):
    shutil.copytree(file("images"), path)
    (path / "cats/manx/0.png").write_bytes(b"\x89PNG no more")


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


def unlabelled(path, file):
    shutil.copytree(file("latents"), path)
    (path / "labels.npy").unlink()


MAKE = {
    "file.jpg": text(""),
    "empty": lambda path, file: path.mkdir(),
    "flat": lambda path, file: shutil.copytree(file("images") / "cats/manx", path),
    "one-level": lambda path, file: shutil.copytree(file("images") / "cats", path),
    "hollow": hollow,
    "vegfru": vegfru,
    "damaged": damaged_image,
    "pets.json": hierarchy(),
    "text.json": text("cats, dogs"),
    "fish.json": hierarchy(superclasses=["cats", "dogs", "fish"]),
    "short.json": hierarchy(parents=[0, 0, 1, 1]),
    "range.json": hierarchy(parents=[0, 0, 1, 1, 2]),
    "twice.json": hierarchy(classes=["lynx", "manx", "pug", "pug", "pug_dog"]),
    "other.json": hierarchy(parents=[0, 1, 1, 1, 1]),
    "empty.pt": text(""),
    "html.pt": text("<!DOCTYPE html><html>403</html>\n"),
    "html.safetensors": text("<!DOCTYPE html><html>403</html>\n"),
    "pointer.pt": text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 2700611775\n"),
    "cut.pt": cut("base", 5000),
    "cut.safetensors": cut("adapter", 50),
    "pickle.pt": lambda path, file: path.write_bytes(pickle.dumps({"model": Path("x")}, protocol=2)),
    "module.pt": lambda path, file: torch.save(torch.nn.Linear(2, 2), path),
    "list.pt": lambda path, file: torch.save([1, 2], path),
    "larger.pt": dit(input_size=16),  # as one of 512 pixels beside 256
    "deeper.pt": dit(depth=5),
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
}


@pytest.fixture(scope="module")
def whole(images, base, official, adapter, command, tmp_path_factory):
    """{name: path} of the inputs with nothing wrong in them."""
    root = tmp_path_factory.mktemp("whole")
    flags = [*PIXELS, "--data-path", images, "--num-workers", 0]
    assert command(encode_latents.main, *flags, "--out", root / "latents").code == 0
    start = ["--resume", base, "--results-dir", root, "--experiment", "run", "--global-batch-size", 4, "--max-steps", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PREVIEW, "steps", 1)
        assert command(train.main, *flags, *start, "--model", "DiT-Ti/2").code == 0
    state = root / "run/states/0000001.safetensors"
    latents, vae = root / "latents", Path(train.__file__).parent / "assets/vae"
    names = dict(images=images, base=base, official=official, adapter=adapter)
    return names | dict(state=state, latents=latents, vae=vae)


# ---- commands ------------------------------------------------------------------------------------

PIXELS = ["--vae", "none", "--image-size", "8"]
COMMANDS = {  # that work: a case changes flags, and "-" takes one away
    "train": (
        train.main,
        "--vae none --image-size 8 --model DiT-Ti/2 --data-path @images --resume @base --results-dir out "
        "--global-batch-size 4 --num-workers 0 --max-steps 1",
    ),
    "continue": (
        train.main,
        "--vae none --image-size 8 --model DiT-Ti/2 --data-path @images --resume @state "
        "--global-batch-size 4 --num-workers 0 --max-steps 2",
    ),
    "sample": (sample.main, "--ckpt @adapter --sample-dir out --num-sampling-steps 1"),
    "official": (
        sample.main,
        "--ckpt @official --sample-dir out --num-sampling-steps 1 --model DiT-Ti/2 --vae none --image-size 8 "
        "--num-classes 5 --num-super-classes 2 --hierarchy @pets.json",
    ),
    "encode": (encode_latents.main, "--vae none --image-size 8 --data-path @images --out out --num-workers 0"),
    "read": (read_glyphs.main, "--train @images --real @images --generated a=@images --out out.png"),
}
CASES = """
train --data-path nowhere                  | no image folder 'nowhere'
train --data-path @empty                   | no class folders
train --data-path @file.jpg                | is a file
train --data-path @hollow                  | cats/manx has no images
train --data-path @flat                    | images but no folders
train --data-path @one-level               | hierarchy.json
train --num-classes 6                      | --num-classes is 6, but pets has 5
train --num-super-classes 3                | --num-super-classes is 3, but pets has 2
train --hierarchy nowhere.json             | nowhere.json
train --hierarchy @text.json               | not JSON
train --hierarchy @fish.json               | superclass 2 (fish) has no class
train --hierarchy @short.json              | 4 parents for 5 classes
train --hierarchy @range.json              | class 4 (pug_dog) has parent 2, expected an index 0..1
train --hierarchy @twice.json              | 'pug' is at 2 and 3
train --hierarchy inat2021                 | class folders that inat2021 lacks
train --hierarchy vegfru --data-path @vegfru | not the superclass of each class
train --image-size 7                       | 7 pixels wide, expected a multiple of its patch size 2
train --vae @vae --image-size 60           | 60, expected a multiple of 8
train --vae nowhere/x                      | nowhere/x could not be loaded pass such a folder as --vae
train --vae @empty                         | could not be loaded
train --resume nowhere.pt                  | no file nowhere.pt
train --resume -                           | pass --resume FILE
train --resume @empty.pt                   | empty.pt
train --resume @html.pt                    | html.pt is no checkpoint
train --resume @html.safetensors           | html.safetensors is damaged
train --resume @pointer.pt                 | pointer.pt is no checkpoint
train --resume @cut.pt                     | cut.pt is truncated
train --resume @cut.safetensors            | cut.safetensors is damaged
train --resume @pickle.pt                  | pickled code, which is not run
train --resume @module.pt                  | pickled code, which is not run
train --resume @list.pt                    | holds list
train --resume @deeper.pt                  | does not fit this model unexpected blocks.4
train --resume @larger.pt                  | pos_embed (1, 64, 256), here (1, 16, 256)
train --resume @latent.pt                  | x_embedder.proj.weight (256, 4, 2, 2), here (256, 3, 2, 2)
train --resume @rebased.safetensors        | is not the base of SHA-256
train --resume @lost.safetensors           | needs its base
train --resume @adapter --model DiT-S/2    | does not fit this model
train --resume @empty                      | has no training state
train --resume @states/absent.safetensors  | no file
train --resume @states/adapter.safetensors | is no training state
train --lr nan                             | --lr is nan
train --lr -0.0001                          | --lr is -0.0001
train --lr inf                             | --lr is inf
train --table-lr 0                         | --table-lr is 0
train --table-std nan                      | --table-std is nan
train --table-std -1                       | --table-std is -1
train --clip-grad 0                        | --clip-grad is 0
train --global-batch-size 0                | --global-batch-size is 0
train --global-batch-size 21               | 20 images, fewer than --global-batch-size 21 pass at most 20
train --global-seed -1                     | --global-seed is -1
train --global-seed 18446744073709551616   | --global-seed is 18446744073709551616
train --grad-accum 0                       | --grad-accum is 0
train --num-workers -1                     | --num-workers is -1
train --ckpt-every 0                       | --ckpt-every is 0
train --log-every 0                        | --log-every is 0
train --max-steps 0                        | --max-steps is 0
train --epochs -1                          | --epochs is -1
train --null-prob -0.1                     | --null-prob is -0.1
train --null-prob 0.6 --class-dropout-prob 0.5 | at most 1
train --null-prob 0.1 --method bitfit      | has a null row already
train --micro-batch 2 --grad-accum 2       | both --micro-batch and --grad-accum
train --micro-batch 0                      | --micro-batch is 0
train --keep-states 0                      | --keep-states is 0
train --max-bad-images -1                  | --max-bad-images is -1
train --report-to wandb                    | --report-to is wandb, expected that package
train --ema-decay 1.5                      | --ema-decay is 1.5
train --ema-decay nan                      | --ema-decay is nan
train --mixed-precision fp16                | expected a GPU
train --class-dropout-prob 1.5             | label dropout is 1.5
train --results-dir @file.jpg              | file.jpg/000-DiT-Ti-2-finediffusion cannot be used
train --latents @latents                   | found both or neither
train --data-path -                        | found both or neither
train --data-path - --latents @empty       | no latents.json
train --data-path - --latents @scaled      | scale 0.5, the training asks for 1.0
train --data-path - --latents @relabelled --hierarchy @pets.json | labelled by another hierarchy
train --data-path - --latents @reformatted | format 'other'
train --data-path - --latents @unlabelled  | labels.npy cannot be used
train --data-path - --latents @latents --image-size 16 | image size 8, the training asks for 16
train --image-size 100 --vae mse --dry-run | 100, expected a multiple of 8
train --num-classes 5 --hierarchy inat2021 --dry-run | --num-classes is 5, but inat2021 has 10000
continue --method bitfit                   | was begun with --method finediffusion, found bitfit
continue --hierarchy @other.json           | was begun with --hierarchy
continue --model DiT-S/2                   | was begun with --model DiT-Ti/2
continue --image-size 16                   | was begun with --image-size 8
sample --ckpt nowhere.safetensors          | no file nowhere.safetensors
sample --ckpt @state                       | is a training state
sample --ckpt @html.safetensors            | is damaged
sample --ckpt @rebased.safetensors         | is not the base of SHA-256 --base
sample --base @deeper.pt                   | is not the base of
sample --base nowhere.pt                   | nowhere.pt
sample --image-size 16                     | --image-size is 16, but
sample --num-classes 6                     | --num-classes is 6, but pets has 5
sample --hierarchy @other.json             | trained on
sample --vae @vae                          | pass the --vae it was trained with
sample --classes 10000                     | Class 10000 is out of range: pets has 0..4
sample --classes -1                        | Class -1 is out of range
sample --classes cat                       | 'cat'
sample --num-sampling-steps 0              | --num-sampling-steps is 0, expected 1 to 1000
sample --num-sampling-steps 1001           | --num-sampling-steps is 1001
sample --cfg-scale nan                     | --cfg-scale is nan
sample --cfg-scale -1                      | --cfg-scale is -1
sample --seed -1                           | --seed is -1
sample --seed 18446744073709551616         | --seed is 18446744073709551616
sample --seed-mode official --sampler ddim | found ddim
sample --per-class 0                       | --per-class is 0
sample --batch-size 0                      | --batch-size is 0
sample --sample-dir @file.jpg              | file.jpg
sample --sample-dir @file.jpg/deeper       | file.jpg
official --ckpt @html.pt                   | html.pt is no checkpoint
official --ckpt @base                      | does not fit this model
official --hierarchy -                     | pass --hierarchy
official --hierarchy vegfru --num-classes 292 --num-super-classes 25 | not the superclass of each class
official --num-super-classes 3             | --num-super-classes is 3
official --image-size 7                    | 7 pixels wide
official --vae nowhere/x                   | pass such a folder as --vae
encode --data-path nowhere                 | no image folder 'nowhere'
encode --vae @vae --image-size 60          | 60, expected a multiple of 8
encode --out @scaled                       | other images or settings
encode --out @file.jpg                     | file.jpg
read --train nowhere                       | nowhere
read --real @flat                          | images but no folders
read --generated a=nowhere                 | no image folder 'nowhere'
"""


def parsed(line):
    changes, words = line.split(" | ")
    program, *flags = changes.split()
    return pytest.param(program, flags, words.split(), id=changes.strip().replace("/", "|"))


def flags_of(line):
    """{flag: its values} of a command line."""
    flags, name = {}, None
    for word in line:
        if word.startswith("--"):
            name = word
            flags[name] = []
        else:
            flags[name].append(word)
    return flags


@pytest.mark.parametrize("program, changes, words", map(parsed, CASES.strip().split("\n")))
def test_one_sentence_and_nothing_written(program, changes, words, whole, command, tmp_path, monkeypatch):
    (tmp_path / "inputs/states").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(read_glyphs, "STEPS", 2)

    def file(name):
        if name in whole:
            return whole[name]
        path = tmp_path / "inputs" / name
        if not path.exists():
            MAKE[name](path, file)
        return path

    def value(word):
        before, at, name = word.partition("@")
        first, slash, rest = name.partition("/deeper")
        return before + str(file(first)) + slash + rest if at else word

    main, flags = COMMANDS[program]
    flags = flags_of(flags.split()) | flags_of(changes)
    flags = [[name, *map(value, words)] for name, words in flags.items() if words != ["-"]]
    before = tree(tmp_path)
    result = command(main, *sum(flags, []))
    assert result.code == 2
    name = f"{main.__module__.rsplit('.', 1)[-1]}.py: "
    assert result.err.startswith(name) and result.err.endswith(".\n") and result.err.count("\n") == 1, result.err
    for word in words:
        assert word in result.err, result.err
    assert tree(tmp_path) == before


def test_a_damaged_image_is_named(whole, command, tmp_path):
    damaged_image(tmp_path / "damaged", whole.get)
    flags = ["--data-path", tmp_path / "damaged", "--resume", whole["base"], "--results-dir", tmp_path / "out"]
    flags += ["--model", "DiT-Ti/2", "--global-batch-size", 20, "--num-workers", 1, "--max-steps", 1]
    result = command(train.main, *PIXELS, *flags, "--max-bad-images", 0)
    sentence = result.err.split("\n")[-2]  # below the progress bar
    assert result.code == 2 and "Traceback" not in result.err and not list(tmp_path.glob("out/*/*/*"))
    assert sentence.startswith("train.py: 1 images could not be read ('cats/manx/0.png'), expected at most 0")
    result = command(train.main, *PIXELS, *flags)
    assert result.code == 0 and "1 images so far could not be read" in result.out and "cats/manx/0.png" in result.out


def test_a_gpu_without_kernels(command, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90", "compute_90"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P40")
    result = command(sample.main, "--ckpt", adapter, "--sample-dir", tmp_path / "out")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "Tesla P40 is sm_61, expected one of sm_75, sm_90, compute_90" in result.err and "install" in result.err
    assert not (tmp_path / "out").exists()
