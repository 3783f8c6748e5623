"""Write the files of this folder with the version before the modules moved into packages; run at commit 41035a2.

    PYTHONPATH=.:tests python make.py OUT

In a checkout of that version, on one thread of a CPU; today's modules have other names. All but expected.safetensors is
written by the commands themselves, with a DiT of 60 thousand numbers in the place of a preset. Paths are relative to OUT.
"""
# ruff: noqa: I001  (the modules imported here are those of then)

import hashlib
import json
import os
import shutil
import sys
import tempfile

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from conftest import CLASSES, call, write_images
from tiny import TinyDiT
from trainings import SPEEDS
import checkpoint
import models
import sample
import sample_ddp
import train
from tools import encode_latents

START = "--model DiT-Test/2 --vae none --image-size 8 --num-workers 0 --latents latents --preview-images 0"
BASE = f"{START} --method full --resume none --max-steps 400 --lr 2e-3 --global-batch-size 20 --ema-decay 0.9"
TRAIN = (
    f"{START} --resume base.safetensors --results-dir . --experiment run --global-batch-size 4 --lr 1e-3 --ema-decay 0.5 "
    "--max-steps 5 --log-every 2 --ckpt-every 3"
)
SAMPLE = "--ckpt run/adapters/0000003.safetensors --num-sampling-steps 3"
MANY = f"{SAMPLE} --num-fid-samples 11 --format both --sample-dir samples --name"


def command(main, flags, code=0):
    result = call(main, *flags.split())
    assert result.code == code, result.err


def digest(tensors):
    """SHA-256 of tensors by name."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def probe():
    """A digest of what plain torch computes here: another CPU or another torch may round otherwise."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0, activation="gelu", batch_first=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    x = torch.randn(4, 16, 32, generator=generator)
    y = layer(x)
    (y * x).sum().backward()
    return digest({"y": y} | {name: p.grad for name, p in layer.named_parameters()})


def train_and_go_on():
    """Reset the run to step 3, within a row of metrics; return the adapter and metrics of its resumption."""
    command(train.main, TRAIN)
    for name in ("log.txt", "adapters/0000005.safetensors", "states/0000005.safetensors"):
        os.unlink(f"run/{name}")
    shutil.copytree("run", "kept")
    command(train.main, TRAIN)
    continued, _ = checkpoint.read("run/adapters/0000005.safetensors")
    rows = [json.loads(line) for line in open("run/metrics.jsonl")]
    shutil.rmtree("run")
    os.rename("kept", "run")
    return continued, [{key: value for key, value in row.items() if key not in SPEEDS} for row in rows]


def main(out):
    models.DiT_models["DiT-Test/2"] = TinyDiT
    os.makedirs(out)
    os.chdir(out)
    with tempfile.TemporaryDirectory() as away:
        images = write_images(f"{away}/pets", 8)
        flags = "--vae none --image-size 8 --num-workers 0 --out latents --data-path"
        command(encode_latents.main, f"{flags} {images}")
        command(train.main, f"{BASE} --results-dir {away} --experiment base")
        shutil.copy(f"{away}/base/adapters/0000400.safetensors", "base.safetensors")
        continued, rows = train_and_go_on()
        command(sample.main, f"{SAMPLE} --classes all --sample-dir {away}/drawn")
        names = [name for classes in CLASSES.values() for name in classes]
        drawn = np.stack([np.asarray(Image.open(f"{away}/drawn/{name}/000000.png")) for name in names])
    command(sample_ddp.main, f"{MANY} whole")
    left = iter(range(5))
    sample_ddp.check_images = lambda *_: next(left, None) is None and sys.exit(1)  # the sixth image stops it
    command(sample_ddp.main, f"{MANY} half", code=1)

    model, description = checkpoint.load_adapted("run/adapters/0000003.safetensors")
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([0, 500, 999]), torch.tensor([0, 4, 6])  # two classes and a superclass
    with torch.no_grad():
        tensors = {"x": x, "t": t, "y": y, "output": model(x, t, y), "images": torch.from_numpy(drawn)}
    tensors |= {f"continued/{name}": tensor for name, tensor in continued.items()}
    words = {key: value for key, value in description.items() if key not in ("hierarchy", "trained")}
    record = {"model": digest(model.state_dict()), "description": words, "rows": rows, "probe": probe()}
    record |= {"train": TRAIN, "sample": SAMPLE, "many": MANY}
    save_file(tensors, "expected.safetensors", metadata={"json": json.dumps(record)})


if __name__ == "__main__":
    main(sys.argv[1])
