"""A user's mistake gives one sentence on stderr and exit code 2, and nothing is written."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.bad_inputs import MAKE
from helpers.launch import launch, worst
from helpers.refusals import ROW, refused
from helpers.tiny_files import tree

import sample
import train
from examples.glyphs import read as read_glyphs
from tools import encode_latents


@pytest.fixture(scope="module")
def whole(images, base, official, adapter, command, tmp_path_factory):
    """Return {name: path} of valid inputs."""
    root = tmp_path_factory.mktemp("whole")
    flags = [*PIXELS, "--data-path", images, "--num-workers", 0]
    assert command(encode_latents.main, *flags, "--out", root / "latents").code == 0
    start = ["--resume", base, "--results-dir", root, "--experiment", "run", "--global-batch-size", 4, "--max-steps", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PREVIEW, "steps", 1)
        assert command(train.main, *flags, *start, "--model", "DiT-Ti/2").code == 0
    state = root / "run/states/0000001.safetensors"
    latents, vae = root / "latents", Path(train.__file__).parent / "examples/glyphs/vae"
    names = dict(images=images, base=base, official=official, adapter=adapter)
    return names | dict(state=state, latents=latents, vae=vae)


# ---- commands; "@name" stands for the file or folder that MAKE[name] writes ------------------------

PIXELS = ["--vae", "none", "--image-size", "8"]
COMMANDS = {  # all work; a case changes flags, and "-" removes one
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
train --data-path @looped                  | cats/loop has no images
train --data-path @vegfru/vegfru_list/vegfru_train.txt | (line 2: 'chive: none')
train --num-classes 6                      | --num-classes is 6, but pets has 5
train --num-super-classes 3                | --num-super-classes is 3, but pets has 2
train --hierarchy nowhere.json             | nowhere.json
train --hierarchy @text.json               | not JSON
train --hierarchy @fish.json               | superclass 2 (fish) has no class
train --hierarchy @short.json              | 4 parents for 5 classes
train --hierarchy @range.json              | class 4 (pug_dog) has parent 2, expected an index 0..1
train --hierarchy @twice.json              | 'pug' is at 2 and 3
train --hierarchy @cats.json               | 'cats' is at 0 and 1
train --hierarchy @null.json               | class 4 (pug_dog) has parent None
train --hierarchy @wolves.json             | parent 'wolves' is not among the superclasses
train --hierarchy @list.json               | 'superclasses' and 'parents', got ['cats', 'dogs']
train --hierarchy @base                    | is not JSON
train --hierarchy inat2021                 | class folders that inat2021 lacks
train --hierarchy vegfru --data-path @vegfru | not the superclass of each class
train --image-size 7                       | 7 pixels wide, expected a multiple of its patch size 2
train --vae @vae --image-size 60           | 60, expected a multiple of 8
train --vae nowhere/x                      | nowhere/x could not be loaded pass such a folder as --vae
train --vae @empty                         | could not be loaded
train --vae mse                            | could not be loaded pass such a folder as --vae
train --resume nowhere.pt                  | no file nowhere.pt
train --resume -                           | pass --resume FILE
train --resume @empty.pt                   | empty.pt
train --resume @html.pt                    | html.pt is not a checkpoint
train --resume @html.safetensors           | html.safetensors is damaged
train --resume @pointer.pt                 | pointer.pt is not a checkpoint
train --resume @pointer.safetensors        | pointer.safetensors is damaged
train --resume @nan.pt                     | not finite in blocks.1.attn.qkv.bias
train --resume @nan.safetensors            | not finite in y_embedder.embedding_table.weight
train --resume @states/nan.safetensors     | All 1 training states
train --resume @ruined                     | All 2 training states
train --resume @wider.pt                   | does not fit this model of another shape
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
train --resume @states/adapter.safetensors | is not a training state
train --lr nan                             | --lr is nan
train --lr fast                            | --lr: invalid float value: 'fast'
train --lr 0                               | --lr is 0.0, expected a number above 0
train --lr -0.0001                          | --lr is -0.0001
train --lr inf                             | --lr is inf
train --table-lr 0                         | --table-lr is 0
train --table-std nan                      | --table-std is nan
train --table-std -1                       | --table-std is -1
train --clip-grad 0                        | --clip-grad is 0
train --clip-grad nan                      | --clip-grad is nan
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
train --epochs 1.5                         | --epochs: invalid int value: '1.5'
train --method prompts                     | --method: invalid choice: 'prompts'
train --no-such-flag 3                     | unrecognized arguments: --no-such-flag 3
train --image-size 0                       | --image-size is 0
train --preview-images -1                  | --preview-images is -1
train --null-prob -0.1                     | --null-prob is -0.1
train --null-prob 0.6 --class-dropout-prob 0.5 | at most 1
train --null-prob 0.1 --method bitfit      | has a null row already
train --micro-batch 2 --grad-accum 2       | both --micro-batch and --grad-accum
train --micro-batch 0                      | --micro-batch is 0
train --keep-states 0                      | --keep-states is 0
train --max-bad-images -1                  | --max-bad-images is -1
train --report-to wandb                    | --report-to is wandb, expected its package
train --ema-decay 1.5                      | --ema-decay is 1.5
train --ema-decay nan                      | --ema-decay is nan
train --mixed-precision fp16                | expected a GPU
train --class-dropout-prob 1.5             | label dropout is 1.5
train --class-dropout-prob -0.1            | label dropout is -0.1
train --class-dropout-prob nan             | label dropout is nan
train --results-dir @file.jpg              | file.jpg/000-DiT-Ti-2-finediffusion cannot be used
train --latents @latents                   | found both or neither
train --data-path -                        | found both or neither
train --data-path - --latents @empty       | no latents.json
train --data-path - --latents @scaled      | scale 0.5, expected 1.0
train --data-path - --latents @relabelled --hierarchy @pets.json | labelled by another hierarchy
train --data-path - --latents @reformatted | format 'other'
train --data-path - --latents @unlabelled  | labels.npy cannot be used
train --data-path - --latents @mislabelled | labels of 0 to 5, expected 0 to 4 of pets
train --data-path - --latents @latents --image-size 16 | image size 8, expected 16
train --image-size 100 --vae mse --dry-run | 100, expected a multiple of 8
train --num-classes 5 --hierarchy inat2021 --dry-run | --num-classes is 5, but inat2021 has 10000
continue --method bitfit                   | was started with --method finediffusion, found bitfit
continue --hierarchy @other.json           | was started with --hierarchy
continue --model DiT-S/2                   | was started with --model DiT-Ti/2
continue --image-size 16                   | was started with --image-size 8
continue --data-path @renamed              | other images or labels --allow-changes
continue --lr 0.5 --global-seed 3 --no-flip | --global-seed 0 (now 3), --lr 0.0001 (now 0.5), --flip True (now False)
sample --ckpt nowhere.safetensors          | no file nowhere.safetensors
sample --ckpt @state                       | is a training state
sample --ckpt @html.safetensors            | is damaged
sample --ckpt @rebased.safetensors         | is not the base of SHA-256 --base
sample --ckpt @lost.safetensors            | needs its base lost.pt --base
sample --ckpt @nan.safetensors             | not finite in y_embedder.embedding_table.weight
sample --ckpt @cut.safetensors             | is damaged
sample --base @deeper.pt                   | is not the base of
sample --base nowhere.pt                   | nowhere.pt
sample --image-size 16                     | --image-size is 16, expected 8
sample --num-classes 6                     | --num-classes is 6, but pets has 5
sample --hierarchy @other.json             | on which the adapter was trained
sample --vae @vae                          | pass the --vae it was trained with
sample --classes 10000                     | Class 10000 is out of range: pets has 0..4
sample --classes -1                        | Class -1 is out of range
sample --classes cat                       | 'cat'
sample --num-sampling-steps 0              | --num-sampling-steps is 0, expected 1 to 1000
sample --num-sampling-steps 1001           | --num-sampling-steps is 1001
sample --num-sampling-steps abc            | --num-sampling-steps: invalid int value: 'abc'
sample --sampler euler                     | --sampler: invalid choice: 'euler'
sample --cfg-scale nan                     | --cfg-scale is nan
sample --cfg-scale inf                     | --cfg-scale is inf
sample --cfg-scale -1                      | --cfg-scale is -1
sample --seed -1                           | --seed is -1
sample --seed 18446744073709551616         | --seed is 18446744073709551616
sample --seed-mode official --sampler ddim | found ddim
sample --per-class 0                       | --per-class is 0
sample --batch-size 0                      | --batch-size is 0
sample --sample-dir @file.jpg              | file.jpg
sample --sample-dir @file.jpg/deeper       | file.jpg
official --ckpt @html.pt                   | html.pt is not a checkpoint
official --ckpt @empty.pt                  | empty.pt
official --ckpt @pointer.pt                | pointer.pt is not a checkpoint
official --ckpt @pickle.pt                 | pickled code, which is not run
official --ckpt @nan.pt                    | not finite in blocks.1.attn.qkv.bias
official --ckpt @larger.pt                 | pos_embed (1, 64, 256), here (1, 16, 256)
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
    """Return {flag: values} of a command line."""
    flags, name = {}, None
    for word in line:
        if word.startswith("--"):
            name = word
            flags[name] = []
        else:
            flags[name].append(word)
    return flags


@pytest.mark.reliability(*ROW)
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
    refused(result, *words)
    assert result.err.count("\n") == 1 and "\r" not in result.err
    assert tree(tmp_path) == before


@pytest.mark.reliability(*ROW)
def test_a_batch_that_does_not_divide_among_the_processes(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--model DiT-Ti/2 --num-workers 0 --max-steps 1 --results-dir".split()
    files = tmp_path / "out", "--data-path", whole["images"], "--resume", whole["base"]
    assert worst(launch(train.main, [*PIXELS, *flags, *files, "--global-batch-size", 5], tmp_path, world=2)) == 2
    for rank in range(2):
        said = (tmp_path / f"err{rank}").read_text()
        if said:
            refused(
                SimpleNamespace(code=2, err=said),
                "--global-batch-size is 5, expected a multiple of the number of processes (2): pass 4.",
            )
    assert said and not (tmp_path / "out").exists()


@pytest.mark.reliability(*ROW)
def test_a_gpu_without_kernels(command, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90", "compute_90"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P40")
    result = command(sample.main, "--ckpt", adapter, "--sample-dir", tmp_path / "out")
    refused(result, "Tesla P40 is sm_61, expected one of sm_75, sm_90, compute_90", "install")
    assert not (tmp_path / "out").exists()
