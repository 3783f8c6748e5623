"""Bad input of sample.py: guidances that cannot be."""

import pytest
from helpers.refusals import ROW, refused
from helpers.tiny_files import rewritten, tree

import sample
from checkpoint.description import Base
from runtime.files import sha256

PIXELS = "--model DiT-Ti/2 --vae none --image-size 8".split()


def official_base(adapter, official, path):
    return rewritten(adapter, path, base=Base(str(official), sha256(official)))


REFUSED = [
    ("--cfg-scale -0.5", "--cfg-scale is -0.5, expected a finite number, 0 or more"),
    ("--guidance chain --cfg-scale-parent nan", "--cfg-scale-parent is nan"),
    ("--guidance-interval 600 200", "--guidance-interval is 600 200 the lower one first"),
    ("--guidance-interval 0 1000", "--guidance-interval is 0 1000, expected two timesteps of 0..999"),
    ("--guidance-interval -1 999", "--guidance-interval is -1 999"),
    ("--guidance null", "--guidance is null, but the model has no null row: train it with --null-prob"),
    ("--guidance chain --cfg-scale-parent 2", "--guidance is chain, but the model has no null row"),
    ("--guidance autoguidance", "pass an earlier adapter as --weak"),
    ("--guidance autoguidance --weak nowhere", "--weak is nowhere, expected an earlier adapter"),
    ("--guidance autoguidance --weak @base", "expected an earlier adapter"),
    ("--guidance autoguidance --weak @rebased", "is of another base, model or method than"),
    ("--guidance autoguidance --weak @rooted", "is of another base, model or method than"),
    ("--weak @base", "--weak belongs to --guidance autoguidance, found superclass"),
    ("--cfg-scale-parent 2", "--cfg-scale-parent belongs to --guidance chain"),
    ("--ckpt @rebased --guidance domain", "--guidance domain needs the null row of a plain DiT"),
    ("--ckpt @plain --guidance domain", "expected an adapter"),
    ("--seed-mode official --guidance none", "drop the other flags"),
    (
        "--seed-mode official --mixed-precision bf16",
        "--seed-mode is official and --mixed-precision bf16, expected float32",
    ),
    ("--seed-mode official --guidance-interval 0 500", "drop the other flags"),
]


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize("flags, words", REFUSED, ids=lambda value: value.replace("/", "|"))
def test_guidance_that_cannot_be(flags, words, command, adapter, base, official, tmp_path):
    make = {
        "@base": lambda: base,
        "@rebased": lambda: official_base(adapter, official, tmp_path / "rebased.safetensors"),
        "@rooted": lambda: rewritten(adapter, tmp_path / "rooted.safetensors", null_row=True),
    }
    start = ["--ckpt", adapter]
    if "@plain" in flags:
        start, flags = ["--ckpt", base, *PIXELS, "--num-classes", 9, "--num-super-classes", 1], flags[14:]
    flags = [make[flag]() if flag in make else flag for flag in flags.split()]
    before = tree(tmp_path)
    result = command(sample.main, *start, "--sample-dir", tmp_path / "out", *flags)
    refused(result, *words.split(" the lower"))
    assert tree(tmp_path) == before
