"""Statistics in place of images: foreign files, files that are refused, and files written for other programs."""

import json

import numpy as np
import pytest
import torch
from helpers import image_sets
from helpers.image_sets import NAMES, NO_NETWORKS, assert_refused, read_pixels, run, write_set
from helpers.refusals import ROW
from pytorch_fid.fid_score import compute_statistics_of_path

import evaluate
from evaluation import features
from evaluation.image_sets import open_set
from evaluation.metrics import Gaussian
from evaluation.saved_statistics import save_statistics

sets, saved_statistics = image_sets.sets, image_sets.saved_statistics


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize(
    "change, words",
    [
        ({"network": {"name": "tiles", "weights": "0" * 64}}, ["made with weights 0000", "expected "]),
        ({"network": {"name": "other"}}, ["made with name other, expected tiles"]),
        ({"crop": 64}, ["expected 64 x 64"]),
        ({"crop": None}, ["made with crop None, expected 40"]),
        ({"format": "another"}, ["does not say by which network"]),
    ],
)
def test_statistics_with_another_record_are_refused(sets, command, tmp_path, saved_statistics, change, words):
    with np.load(saved_statistics) as file:
        arrays = dict(file)
    arrays["record"] = json.dumps(json.loads(str(arrays["record"])) | change)
    np.savez(tmp_path / "changed.npz", **arrays)
    flags = (*NO_NETWORKS, "--features", sets / "tiles.pt")
    assert_refused(command, tmp_path, words, tmp_path / "changed.npz", sets / "fake", *flags)


def test_statistics_with_another_resize_are_refused(command, tmp_path):
    record = {"network": {"name": "inception", "weights": "random", "resize": "pytorch"}, "crop": 40}
    save_statistics(tmp_path / "stats.npz", {None: Gaussian(9, torch.zeros(4), torch.eye(4))}, record)
    with pytest.raises(ValueError, match="made with resize pytorch, expected tf1"):
        open_set(tmp_path / "stats.npz").check(features.inception().record, 40)


def test_statistics_without_a_record_need_trust_stats(sets, command, tmp_path):
    network = torch.jit.load(sets / "tiles.pt")
    real = network(torch.cat(list(read_pixels(sets / "real").values()))).double()
    np.savez(tmp_path / "other.npz", mu=real.mean(0), sigma=torch.cov(real.T))
    flags = (*NO_NETWORKS, "--features", sets / "tiles.pt", "--hierarchy", "none")
    assert_refused(command, tmp_path, ["does not say", "--trust-stats"], tmp_path / "other.npz", sets / "fake", *flags)
    _, found = run(command, tmp_path / "out", tmp_path / "other.npz", sets / "fake", *flags, "--trust-stats")
    assert found["overall"]["n_real"] is None and not found["comparable"]
    assert found["overall"]["features"]["tiles"]["fd"] > 0


def test_statistics_give_no_advice_that_needs_images(sets, command, tmp_path, saved_statistics):
    flags = (*NO_NETWORKS, "--features", sets / "tiles.pt")
    _, found = run(command, tmp_path / "out", saved_statistics, sets / "fake", *flags)
    (note,) = (note for note in found["notes"] if "the features of tiles" in note)
    assert note.startswith("1 row has fewer than 12 images") and "KID" not in note
    with np.load(saved_statistics) as file:
        assert found["real"]["pixels"] == json.loads(str(file["record"]))["pixels"]


def test_pytorch_fid_reads_saved_statistics(sets, saved_statistics):
    mu, sigma = compute_statistics_of_path(str(saved_statistics), None, 1, 12, "cpu")
    network = torch.jit.load(sets / "tiles.pt")
    real = network(torch.cat([read_pixels(sets / "real")[name] for name in NAMES])).double()
    np.testing.assert_allclose(mu, real.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, torch.cov(real.T), rtol=1e-9, atol=1e-12)


def test_reference_batch_for_adms_evaluator(sets, command, tmp_path):
    write_set(tmp_path / "real", 32, 1, seed=0)
    flags = ("--num-workers", 0, "--random-weights", "--lpips-trunk", "none", "--save-adm", tmp_path / "adm.npz")
    result = command(evaluate.main, tmp_path / "real", *flags)
    assert result.code == 0, result.err
    with np.load(tmp_path / "adm.npz") as file:
        shapes = {name: (file[name].shape, file[name].dtype) for name in file.files}
        images, mu, sigma = file["arr_0"], file["mu"], file["sigma_s"]
    assert shapes == {
        "mu": ((2048,), np.float64),
        "sigma": ((2048, 2048), np.float64),
        "mu_s": ((2023,), np.float64),
        "sigma_s": ((2023, 2023), np.float64),
        "arr_0": ((5, 32, 32, 3), np.uint8),
    }
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert x.equal(torch.cat([read_pixels(tmp_path / "real", 32)[name] for name in NAMES]))
    found = features.inception(spatial=True)(x)
    np.testing.assert_allclose(mu, found["features"].double().mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.diag(sigma), found["spatial"].double().var(0), rtol=1e-2, atol=1e-6)
