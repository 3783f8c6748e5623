"""Sets of images for the tests of evaluate.py, tiny networks to compare them by, and calls of the program."""

import json

import numpy as np
import pytest
import torch
from helpers.tiny_files import CLASSES
from PIL import Image
from torch.nn import functional as F

import evaluate
from dataset.images import center_crop

NAMES = [name for names in CLASSES.values() for name in names]
PLAIN = ("--num-workers", 0, "--inception", "none", "--lpips-trunk", "none")


class Tiles(torch.nn.Module):
    """uint8 images to 12 numbers."""

    def __init__(self, numbers: int = 12):
        super().__init__()
        weight = torch.randn(48, numbers, generator=torch.Generator().manual_seed(0)) / 7
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return torch.tanh(F.adaptive_avg_pool2d(x.float() / 255, [4, 4]).flatten(1) @ self.weight)


class Undefined(torch.nn.Module):
    """NaN for images that are white in the first corner."""

    def forward(self, x):
        rest = 255 - x.float().mean(1)[:, 0, :2]
        return rest / rest


def paint(root, size, each, seed, names=NAMES):
    """`superclass/class/*.png`, of which the class sets the colours a little."""
    noise = np.random.default_rng(seed)
    for superclass, classes in CLASSES.items():
        for name in classes:
            if name in names:
                folder = root / superclass / name
                folder.mkdir(parents=True)
                for i in range(each):
                    tiles = noise.integers(0, 200, (3, 3, 3)) + 10 * NAMES.index(name)
                    image = Image.fromarray(tiles.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
                    image.save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with sets `real` (30 images of 50 pixels) and `fake` (20 of 40), and networks `tiles`, `reader`, `undefined`."""
    root = tmp_path_factory.mktemp("world")
    paint(root / "real", 50, 6, seed=1)
    paint(root / "fake", 40, 4, seed=2)
    (root / "fake/settings.json").write_text('{"sampler": "ddpm", "cfg_scale": 4.0}')
    for name, module in {"tiles": Tiles(), "reader": Tiles(5), "undefined": Undefined()}.items():
        torch.jit.script(module).save(root / f"{name}.pt")
    return root


def pixels(folder, size=40):
    """{class: uint8 (n, 3, size, size)} of a folder of sets, the centre crops."""
    found = {}
    for path in sorted(folder.glob("*/*/*.png")):
        image = np.array(center_crop(Image.open(path), size))
        found.setdefault(path.parent.name, []).append(torch.from_numpy(image).permute(2, 0, 1))
    return {name: torch.stack(images) for name, images in found.items()}


def run(command, out, *flags):
    """The result of the command and, if it wrote one, its metrics.json."""
    result = command(evaluate.main, *flags, "--output", out)
    path = out / "metrics.json"
    return result, json.loads(path.read_text()) if path.is_file() else None


def npz(world, path, save=np.savez, labels="arr_1", side="fake", **arrays):
    """The images of a side in random order, and their labels."""
    images = pixels(world / side)
    pairs = [(x.permute(1, 2, 0).numpy(), NAMES.index(name)) for name in NAMES for x in images[name]]
    order = np.random.default_rng(0).permutation(len(pairs))
    arrays |= {"arr_0": np.stack([pairs[i][0] for i in order])}
    save(path, **arrays, **({labels: np.array([pairs[i][1] for i in order])} if labels else {}))
    return path


@pytest.fixture(scope="session")
def statistics(world, command, tmp_path_factory):
    """`real.npz`, the statistics of the real images at 40 pixels under `tiles`."""
    path = tmp_path_factory.mktemp("statistics") / "real.npz"
    flags = (*PLAIN[:4], "--random-weights", "--features", world / "tiles.pt", "--image-size", 40, "--save-stats", path)
    result = command(evaluate.main, world / "real", *flags)
    assert result.code == 0, result.err
    return path
