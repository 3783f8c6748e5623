"""Nearest training images: the search, the comparison with held-out images, and the folder of features."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from helpers.image_sets import Tiles, write_set
from helpers.tiny_models import refusal
from scipy import stats

from evaluation import training_features
from evaluation.features import make_network
from evaluation.image_sets import Pixels, open_set
from evaluation.memorisation import closeness, memorisation_notes, nearest
from evaluation.training_features import TrainingFeatures
from hierarchy import Hierarchy

# ---- search --------------------------------------------------------------------------------------


def blocks_of(x, size):
    return ((i, x[i : i + size]) for i in range(0, len(x), size))


def by_pairs(queries, x, k):
    """All distances in float64, one pair at a time; rows of NaN last; ties to the lower index."""
    distances = (queries.double()[:, None] - x.double()).norm(dim=2).nan_to_num(torch.inf)
    index = distances.argsort(dim=1, stable=True)[:, :k]
    return distances.gather(1, index).numpy(), index.numpy()


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("offset, scale", [(0, 1), (1000, 1), (0, 1e-6)])
def test_the_nearest_rows_are_exact(k, offset, scale):
    """Also for copies, near copies, ties, rows of NaN, and values far from 0, which float32 rounds."""
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(400, 30, generator=draw) * scale + offset).float()
    queries = (torch.randn(70, 30, generator=draw) * scale + offset).float()
    queries[:5] = x[100:105]
    queries[5:10] = x[200:205] + 1e-3 * scale * torch.randn(5, 30, generator=draw)
    x[300:305], x[7] = x[100:105], torch.nan
    found = nearest(queries, blocks_of(x, 64), k)
    expected = by_pairs(queries, x, k)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-12)
    assert (found[1] == expected[1]).all() and (found[0][:5, 0] == 0).all() and found[1][0, 0] == 100


def test_few_rows_and_equal_rows():
    distances, index = nearest(torch.zeros(3, 2), blocks_of(torch.tensor([[3.0, 4.0]]), 8), 2)
    assert distances[:, 0].tolist() == [5, 5, 5] and np.isinf(distances[:, 1]).all() and (index[:, 1] == -1).all()
    distances, index = nearest(torch.ones(3, 2), blocks_of(torch.ones(9, 2), 4), 3)
    assert (distances == 0).all() and index.tolist() == [[0, 1, 2]] * 3


# ---- comparison with held-out images -------------------------------------------------------------


def test_closeness_of_a_hand_computed_example():
    held_out = np.arange(1.0, 201)  # 1% of 200: the second smallest is 2
    found = closeness(held_out, np.array([0.1, 0.5, 1.0, 1.5, 2.0, 50]))
    assert found == {
        "threshold": 2,
        "closer": 4 / 6,
        "closer_expected": 2 / 201,
        "closer_than_any": 2 / 6,
        "near": 1,
        "near_held_out": 0,
        "p_value": pytest.approx(stats.betabinom.sf(3, 6, 2, 199)),
    }
    # few held-out images: the closest
    assert closeness(np.array([3.0, 4]), np.array([5.0]))["threshold"] == 3


def test_the_p_value_is_uniform_for_further_held_out_images():
    """Of all orders of n held-out and m further images, which are equally likely, those with as many below the k-th."""
    draw, n, m = np.random.default_rng(0), 12, 8
    values = np.array([closeness(*np.split(draw.permutation(n + m) + 1.0, [n]))["p_value"] for _ in range(1500)])
    for p in np.unique(values):
        assert (values <= p).mean() == pytest.approx(p, abs=0.04)


def test_notes():
    def note(**changes):
        numbers = dict(closer=0.01, closer_expected=0.01, near=0, near_held_out=0, p_value=0.5) | changes
        sets = {"held_out": {"copies": 0, "n": 200}, "generated": {"copies": changes.get("copies", 0)}}
        return memorisation_notes({"overall": numbers, **sets}, "real", "fake")

    assert note() == []
    assert "2 images of fake are exact copies of training images" in note(copies=2, near=2)[0]
    assert "1 more images of fake are as close to a training image as a changed copy" in note(copies=2, near=3)[1]
    (text,) = note(p_value=1e-9, closer=0.3)
    assert text.startswith("30.0% of the images of fake are closer to a training image than 99% of held-out images are")
    few = {"held_out": {"copies": 3, "n": 7}, "generated": {"copies": 0}}
    texts = memorisation_notes({"overall": dict(near=0, p_value=1), **few}, "real", "fake")
    assert texts[0].startswith("3 images of real are exact copies of training images: they do not count as held out")
    assert texts[1].startswith("Only 7 images of real are held out")


# ---- the folder of features ----------------------------------------------------------------------


@pytest.fixture
def train(tmp_path, monkeypatch):
    """30 training images in files of 8, with the network Tiles, which counts its images."""
    monkeypatch.setattr(training_features, "CHUNK", 8)
    images = open_set(write_set(tmp_path / "train", 24, 6, seed=5))
    images.label(Hierarchy.from_folder(tmp_path / "train"))
    network = make_network("tiles", Counted(), None, "cpu")
    return SimpleNamespace(
        images=images, pixels=Pixels(images, 20, crop=True), network=network, folder=tmp_path / "cache"
    )


class Counted(Tiles):
    """Tiles with dict outputs; `seen`: images that went through."""

    seen = 0

    def forward(self, x):
        self.seen += len(x)
        return {"features": super().forward(x)}


def features_of(train, **changes):
    options = vars(train) | changes
    return TrainingFeatures(options["folder"], options["pixels"], options["network"], 12)


def compute(train, **changes):
    """Compute the features; return them, and all rows."""
    found = features_of(train, **changes)
    found.compute(PartialState(cpu=True), batch_size=3, workers=0)
    return found, torch.cat([features for _, features in found.blocks()])


def test_features_are_computed_once_and_resumed(train):
    found, rows = compute(train)
    expected = train.network(torch.stack([train.pixels[i][0] for i in range(30)]))["features"]
    torch.testing.assert_close(rows, expected)
    assert found.digests.tolist() == [train.pixels[i][1] for i in range(30)] and not found.lost.any()
    assert sorted(path.name for path in train.folder.glob("*.safetensors")) == [
        f"{k:05d}.safetensors" for k in range(4)
    ]
    # what is there is not computed again, and what is missing is
    train.network.module.seen = 0
    compute(train)
    assert train.network.module.seen == 0
    (train.folder / "00001.safetensors").unlink()
    (train.folder / "00003.safetensors").unlink()
    assert compute(train)[1].equal(rows) and train.network.module.seen == 8 + 6


def test_an_unreadable_image_is_left_out(train):
    paths = [train.images.paths[i] for i in (3, 4)]
    open(paths[0], "wb").close()
    found, rows = compute(train)
    assert np.flatnonzero(found.lost).tolist() == [3] and torch.isnan(rows).any(1).nonzero().flatten().tolist() == [3]
    open(paths[1], "wb").close()
    with refusal("2 images cannot be read", "expected at most 1"):
        compute(train, folder=train.folder.with_name("other"))


def test_features_of_something_else_are_refused(train):
    compute(train)
    other = make_network("tiles", Counted(), None, "cpu", resize="clean")
    with refusal("has training features with network name tiles, weights random, expected name tiles", "--train-cache"):
        compute(train, network=other)
    with refusal("has training features with crop 20, expected 16"):
        compute(train, pixels=Pixels(train.images, 16, crop=True))
    os.rename(train.images.paths[0], train.images.paths[0].replace("0.png", "z.png"))
    images = open_set(train.images.path)
    images.label(Hierarchy.from_folder(train.images.path))
    with refusal("has training features of other images, expected those of .*train"):
        compute(train, pixels=Pixels(images, 20, crop=True))


def test_damaged_files_are_refused(train):
    compute(train)
    path = train.folder / "00002.safetensors"
    data = path.read_bytes()
    for content in (data[:-1] + bytes([data[-1] ^ 1]), data[:100], b""):
        path.write_bytes(content)
        with refusal("00002.safetensors is damaged, expected its SHA-256: remove it"):
            compute(train)
    (train.folder / "record.json").write_text("[]")
    with refusal("record.json is damaged"):
        compute(train)


def test_non_finite_features_name_the_image(train):
    train.network.module.weight[:] = torch.nan
    with refusal("The tiles features of .*0.png are non-finite"):
        compute(train)
    assert json.loads((train.folder / "record.json").read_text())["images"] == 30
