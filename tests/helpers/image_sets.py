"""Sets of images and tiny networks for the tests of evaluate.py, and a call of the command."""

import json

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from helpers.tiny_files import CLASSES, tree
from PIL import Image
from torch.nn import functional as F

import evaluate
from dataset.images import center_crop

NAMES = [name for names in CLASSES.values() for name in names]
NO_NETWORKS = ("--num-workers", 0, "--inception", "none", "--lpips-trunk", "none")


class Tiles(torch.nn.Module):
    """uint8 (n, 3, H, W) -> (n, outputs), from the colours of 4 x 4 tiles."""

    def __init__(self, outputs: int = 12):
        super().__init__()
        weight = torch.randn(48, outputs, generator=torch.Generator().manual_seed(0)) / 7
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return torch.tanh(F.adaptive_avg_pool2d(x.float() / 255, [4, 4]).flatten(1) @ self.weight)


class CornerReader(torch.nn.Module):
    """Logits (n, 5) of a class that the red of the top-left pixel gives in steps of 50, in reverse order."""

    def forward(self, x):
        label = 4 - (x[:, 0, 0, 0].float() / 50).round().long()
        return F.one_hot(label, 5).float()


class NonFinite(torch.nn.Module):
    """Features that are NaN for images with a white top-left corner."""

    def forward(self, x):
        distance = 255 - x.float().mean(1)[:, 0, :2]
        return distance / distance


def write_set(root, size, each, seed, names=NAMES):
    """Write `each` random images per class to superclass/class/*.png; later classes are slightly brighter."""
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
def sets(tmp_path_factory):
    """Make a folder with the sets `real` (30 images of 50 pixels) and `fake` (20 of 40), and TorchScript networks."""
    root = tmp_path_factory.mktemp("sets")
    write_set(root / "real", 50, 6, seed=1)
    write_set(root / "fake", 40, 4, seed=2)
    (root / "fake/settings.json").write_text('{"sampler": "ddpm", "cfg_scale": 4.0}')
    for name, module in {"tiles": Tiles(), "classifier": Tiles(5), "non_finite": NonFinite()}.items():
        torch.jit.script(module).save(root / f"{name}.pt")
    return root


def read_pixels(folder, size=40):
    """Return {class: uint8 (n, 3, size, size)}, the centre-cropped images of a set."""
    images = {}
    for path in sorted(folder.glob("*/*/*.png")):
        image = np.array(center_crop(Image.open(path), size))
        images.setdefault(path.parent.name, []).append(torch.from_numpy(image).permute(2, 0, 1))
    return {name: torch.stack(of_class) for name, of_class in images.items()}


def run(command, out, *flags):
    """Run evaluate.py; return its result and the content of its metrics.json, None if it wrote none."""
    result = command(evaluate.main, *flags, "--output", out)
    path = out / "metrics.json"
    return result, json.loads(path.read_text()) if path.is_file() else None


def save_npz(sets, path, save=np.savez, labels="arr_1", name="fake", **arrays):
    """Save a set's images in random order, and their labels; return the path."""
    images = read_pixels(sets / name)
    pairs = [(x.permute(1, 2, 0).numpy(), NAMES.index(name)) for name in NAMES for x in images[name]]
    order = np.random.default_rng(0).permutation(len(pairs))
    arrays |= {"arr_0": np.stack([pairs[i][0] for i in order])}
    save(path, **arrays, **({labels: np.array([pairs[i][1] for i in order])} if labels else {}))
    return path


@pytest.fixture(scope="session")
def saved_statistics(sets, command, tmp_path_factory):
    """real.npz: statistics of the real images at 40 pixels, with the network `tiles`."""
    path = tmp_path_factory.mktemp("statistics") / "real.npz"
    networks = (*NO_NETWORKS[:4], "--random-weights", "--features", sets / "tiles.pt")
    result = command(evaluate.main, sets / "real", *networks, "--image-size", 40, "--save-stats", path)
    assert result.code == 0, result.err
    return path


def assert_refused(command, tmp_path, words, *flags):
    """Assert that evaluate.py exits with one sentence that has these words, and writes nothing."""
    before = tree(tmp_path)
    refused(command(evaluate.main, *flags, "--output", tmp_path / "never/out"), *words)
    assert tree(tmp_path) == before
