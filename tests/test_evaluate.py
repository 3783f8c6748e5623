"""The program end to end: its figures recomputed from the images, every form of a set, and what it refuses."""

import io
import itertools
import json
import os
import re
import shutil
import socket
import zipfile

import numpy as np
import pytest
import torch
from conftest import CLASSES, tree
from PIL import Image
from pytorch_fid.fid_score import compute_statistics_of_path
from torch.nn import functional as F
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

import evaluate
from data import center_crop
from evaluation import features, measure
from evaluation.image_sets import open_set
from evaluation.npz_sets import save_statistics
from metrics import Gaussian

NAMES = [name for names in CLASSES.values() for name in names]
PARENT = dict(lynx=0, manx=0, beagle=1, pug=1, pug_dog=1)
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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def report(world, command, tmp_path_factory):
    """Of `real` and `fake`, with all that tiny networks can give."""
    result, report = run(
        command,
        tmp_path_factory.mktemp("report"),
        *(world / "real", world / "fake", *PLAIN[:4], "--random-weights"),
        *("--features", world / "tiles.pt", "--classifier", world / "reader.pt", "--floor", "--batch-size", 7),
    )
    assert result.code == 0, result.err
    return report


def figures(report):
    """{"overall.lpips": 0.1, ...}, the floats of the result."""
    found = {}

    def walk(thing, name):
        items = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list) else ()
        for key, value in items:
            walk(value, f"{name}.{key}")
        if isinstance(thing, float | int):
            found[name] = thing

    walk({key: report[key] for key in ("overall", "superclasses")}, "")
    return found


def same_figures(a, b, least=10, **tolerance):
    a, b = figures(a), figures(b)
    assert a.keys() == b.keys() and len(a) >= least
    for key in a:
        assert a[key] == pytest.approx(b[key], **tolerance), key


# ---- the figures ---------------------------------------------------------------------------------


def test_distances_are_torch_fidelitys(world, report):
    network = torch.jit.load(world / "tiles.pt")
    sides = [{name: network(x) for name, x in pixels(world / side).items()} for side in ("real", "fake")]
    rows = {"": (report["overall"], NAMES)}
    rows |= {name: (report["superclasses"][name], classes) for name, classes in CLASSES.items()}
    for row, classes in rows.values():
        real, fake = (torch.cat([side[name] for name in classes]) for side in sides)
        assert (row["n_real"], row["n_fake"]) == (len(real), len(fake))
        found = row["features"]["tiles"]
        stats = [fid_features_to_statistics(x.double()) for x in (real, fake)]
        expected = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
        assert found["fd"] == pytest.approx(expected, rel=1e-4)  # theirs is inexact where n < d
        options = dict(kid_subsets=100, kid_subset_size=found["kid_size"], rng_seed=0, verbose=False)
        kid = kid_features_to_metric(fake, real, **options)
        assert (found["kid"], found["kid_std"]) == pytest.approx(tuple(kid.values()), abs=1e-5)
    order = [torch.cat([side[name] for name in NAMES]) for side in sides]
    expected = prc_features_to_metric(order[1], order[0], verbose=False)
    for key in ("precision", "recall"):
        assert report["overall"][key] == pytest.approx(expected[key], abs=1e-6)


def test_the_floor_is_of_two_halves(report):
    for row, n in ((report["overall"], 15), (report["superclasses"]["cats"], 6), (report["superclasses"]["dogs"], 9)):
        found = row["features"]["tiles"]
        assert found["floor_n"] == n and 0 < found["floor"] < found["fd"] * 10


def test_diversity_is_pairwise_lpips(world, report):
    network = features.lpips_features().module.net
    for suffix, side in (("", "fake"), ("_real", "real")):
        images = pixels(world / side)
        within, pooled = {}, {}
        everything = [(name, x) for name in NAMES for x in images[name]]
        for (a, x), (b, y) in itertools.combinations(everything, 2):
            with torch.inference_mode():
                distance = network(x[None] / 127.5 - 1, y[None] / 127.5 - 1).item()
            if a == b:
                within.setdefault(a, []).append(distance)
            pooled.setdefault((PARENT[a], PARENT[b]), []).append(distance)
        means = {name: np.mean(values) for name, values in within.items()}
        rows = [(report["overall"], NAMES, [v for values in pooled.values() for v in values])]
        for s, (superclass, classes) in enumerate(CLASSES.items()):
            rows.append((report["superclasses"][superclass], classes, pooled[s, s]))
        for row, classes, values in rows:
            expected = np.mean([means[name] for name in classes])
            assert row[f"lpips{suffix}"] == pytest.approx(expected, abs=1e-5)
            assert row[f"lpips_pooled{suffix}"] == pytest.approx(np.mean(values), abs=1e-5)
            low, high = row[f"lpips_interval{suffix}"]
            assert min(means.values()) - 1e-5 <= low < expected < high <= max(means.values()) + 1e-5
            low, high = row[f"lpips_pooled_interval{suffix}"]
            assert low < np.mean(values) < high and row[f"lpips_classes{suffix}"] == len(classes)
    assert means["lynx"] > 0.01


def test_accuracy_is_of_the_named_classifier(world, report):
    network = torch.jit.load(world / "reader.pt")
    for suffix, side in (("", "fake"), ("_real", "real")):
        right = {name: network(x).argmax(1).tolist() for name, x in pixels(world / side).items()}
        pairs = [(NAMES.index(name), found) for name in NAMES for found in right[name]]
        for row, s in (
            (report["overall"], None),
            (report["superclasses"]["cats"], 0),
            (report["superclasses"]["dogs"], 1),
        ):
            some = [(a, b) for a, b in pairs if s in (None, PARENT[NAMES[a]])]
            assert row[f"top1{suffix}"] == pytest.approx(np.mean([a == b for a, b in some]))
            parents = [PARENT[NAMES[a]] == PARENT[NAMES[b]] for a, b in some]
            assert row[f"superclass_accuracy{suffix}"] == pytest.approx(np.mean(parents))


def test_fid_and_inception_score_are_of_inception(world, command, tmp_path):
    for side in ("real", "fake"):
        paint(tmp_path / side, 40, 2, seed=len(side))
    torch.save(features.inception().module.net.state_dict(), tmp_path / "inception.pth")
    flags = ("--inception", tmp_path / "inception.pth", "--num-workers", 0, "--lpips-trunk", "none")
    _, report = run(command, tmp_path / "out", tmp_path / "real", tmp_path / "fake", *flags)
    network = features.inception(tmp_path / "inception.pth")
    real, fake = (network(torch.cat([pixels(tmp_path / side)[name] for name in NAMES])) for side in ("real", "fake"))
    x, y = (side["features"].double() for side in (real, fake))
    cross = torch.linalg.svdvals((x - x.mean(0)) @ (y - y.mean(0)).T).sum()
    scatter = (x - x.mean(0)).square().sum() + (y - y.mean(0)).square().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + (scatter - 2 * cross) / 9
    assert report["overall"]["fid"] == pytest.approx(expected.item(), rel=1e-6)
    p = fake["logits"].double().softmax(1)  # one image a split: no spread, a score of 1
    assert report["overall"]["inception_score"] == pytest.approx(1) and p.shape == (10, 1008)
    assert report["choices"]["networks"][0]["weights"] == features.sha256(tmp_path / "inception.pth")
    assert not report["comparable"] and "published" in report["not_comparable"][0]
    assert any("Below 2,048 images" in note for note in report["notes"])


def test_the_result_says_all_that_was_chosen(world, report):
    assert list(report["superclasses"]) == list(CLASSES)
    choices = report["choices"]
    assert choices["image_size"] == 40 and choices["seed"] == 0 and choices["features_kept"] == ["all", "all"]
    assert choices["networks"] == [{"name": "tiles", "weights": features.sha256(world / "tiles.pt")}]
    assert choices["lpips"]["weights"] == "random" and not report["comparable"]
    assert report["sampling"] == {"sampler": "ddpm", "cfg_scale": 4.0}
    assert report["versions"]["torch-fidelity"] and report["real"]["n"] == 30 and report["fake"]["kind"] == "folder"
    assert 0 < report["real"]["seconds"]["network"] <= report["real"]["seconds"]["total"]


def test_every_output_has_the_figures_and_the_stamp(world, command, tmp_path):
    flags = ("--features", world / "tiles.pt", "test_vit@32", "--random-weights")
    result, report = run(command, tmp_path / "out", world / "real", world / "fake", *PLAIN, *flags)
    assert result.code == 0
    fd = f"{report['overall']['features']['tiles']['fd']:.4g}"
    texts = [result.out, *((tmp_path / "out" / f"metrics.{kind}").read_text() for kind in ("md", "csv"))]
    assert all("cats" in text and "overall" in text for text in texts)
    for text in texts[:2]:
        assert (
            fd in text and "NOT COMPARABLE" in text and "FD test_vit@32" in text and "FID" not in text.split("NOT")[0]
        )
    table = [line.split(",") for line in texts[2].splitlines()]
    assert [row[0] for row in table[1:]] == ["cats", "dogs", "overall"] and {row[-1] for row in table[1:]} == {"False"}
    assert float(table[3][table[0].index("features.tiles.fd")]) == report["overall"]["features"]["tiles"]["fd"]
    picture = Image.open(tmp_path / "out/superclasses.png")
    assert picture.width > 200 and len(np.unique(np.array(picture))) > 10


# ---- forms of a set ------------------------------------------------------------------------------


def npz(world, path, save=np.savez, labels="arr_1", side="fake", **arrays):
    """The images of a side in random order, and their labels."""
    images = pixels(world / side)
    pairs = [(x.permute(1, 2, 0).numpy(), NAMES.index(name)) for name in NAMES for x in images[name]]
    order = np.random.default_rng(0).permutation(len(pairs))
    arrays |= {"arr_0": np.stack([pairs[i][0] for i in order])}
    save(path, **arrays, **({labels: np.array([pairs[i][1] for i in order])} if labels else {}))
    return path


FULL = ("--num-workers", 0, "--inception", "none", "--random-weights", "--batch-size", 7, "--floor")


@pytest.mark.parametrize("save, labels", [(np.savez, "arr_1"), (np.savez_compressed, "labels")])
def test_an_npz_gives_the_figures_of_the_folder(world, command, tmp_path, report, save, labels):
    path = npz(world, tmp_path / "fake.npz", save, labels)
    named = ("--features", world / "tiles.pt", "--classifier", world / "reader.pt")
    result, found = run(command, tmp_path / "out", world / "real", path, *FULL, *named)
    assert result.code == 0, result.err
    apart = ("kid", "precision", "recall")  # random subsets go by the order of the images

    def stable(report):
        rows = json.loads(json.dumps({key: report[key] for key in ("overall", "superclasses")}))
        for row in (rows["overall"], *rows["superclasses"].values()):
            for part in (row, row["features"]["tiles"]):
                for key in [key for key in part if key.startswith(apart)]:
                    del part[key]
        return rows

    same_figures(stable(found), stable(report), rel=1e-9)
    assert found["sampling"] is None and found["fake"]["kind"] == "npz"
    (tmp_path / "fake").mkdir()
    for digest, notes in ((found["hierarchy"]["sha256"], 0), ("0" * 64, 1)):
        (tmp_path / "fake/settings.json").write_text(json.dumps({"hierarchy": digest}))
        flags = (*PLAIN, "--features", world / "tiles.pt")
        _, found = run(command, tmp_path / "out", world / "real", path, *flags)
        assert found["sampling"] == {"hierarchy": digest}
        assert sum("another hierarchy" in note for note in found["notes"]) == notes


def test_one_level_of_folders_with_a_grid_above(world, command, tmp_path, report):
    for folder in (world / "fake").glob("*/*"):
        shutil.copytree(folder, tmp_path / "fake" / folder.name)
    Image.new("RGB", (100, 30)).save(tmp_path / "fake/grid.png")
    (tmp_path / "fake/.ipynb_checkpoints").mkdir()
    named = ("--features", world / "tiles.pt", "--classifier", world / "reader.pt")
    _, found = run(command, tmp_path / "out", world / "real", tmp_path / "fake", *FULL, *named)
    same_figures(found, report, rel=1e-9)


def test_without_classes_all_images_are_one(world, command, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((world / "fake").glob("*/*/*.png"))):
        shutil.copy(path, flat / f"{i}.png")
    flags = ("--num-workers", 0, "--inception", "none", "--random-weights", "--features", world / "tiles.pt")
    _, found = run(command, tmp_path / "out", world / "real", flat, *flags, "--hierarchy", "none")
    assert found["superclasses"] == {} and found["hierarchy"] is None and found["overall"]["n_fake"] == 20
    assert found["overall"]["lpips"] == pytest.approx(found["overall"]["lpips_pooled"], rel=1e-9)
    _, deep = run(command, tmp_path / "deep", world / "real", world / "fake", *flags, "--hierarchy", "none")
    assert deep["overall"]["features"]["tiles"]["fd"] == pytest.approx(found["overall"]["features"]["tiles"]["fd"])


def test_image_size_crops_both_sides(world, command, tmp_path):
    flags = (*PLAIN, "--features", world / "tiles.pt", "--image-size", 24)
    _, found = run(command, tmp_path / "out", world / "real", world / "fake", *flags)
    network = torch.jit.load(world / "tiles.pt")
    real, fake = (network(torch.cat(list(pixels(world / side, 24).values()))) for side in ("real", "fake"))
    stats = [fid_features_to_statistics(x.double()) for x in (real, fake)]
    expected = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert found["overall"]["features"]["tiles"]["fd"] == pytest.approx(expected, rel=1e-6)
    assert found["choices"]["image_size"] == 24


# ---- statistics ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def statistics(world, command, tmp_path_factory):
    """`real.npz`, the statistics of the real images at 40 pixels under `tiles`."""
    path = tmp_path_factory.mktemp("statistics") / "real.npz"
    flags = (*PLAIN[:4], "--random-weights", "--features", world / "tiles.pt", "--image-size", 40, "--save-stats", path)
    result = command(evaluate.main, world / "real", *flags)
    assert result.code == 0, result.err
    return path


def test_statistics_stand_for_the_images(world, command, tmp_path, report, statistics):
    flags = (*PLAIN[:4], "--random-weights", "--features", world / "tiles.pt")
    result, found = run(command, tmp_path / "out", statistics, world / "fake", *flags)
    assert result.code == 0, result.err
    for name in (None, *CLASSES):
        row, expected = (each["superclasses"][name] if name else each["overall"] for each in (found, report))
        assert row["features"]["tiles"]["fd"] == pytest.approx(expected["features"]["tiles"]["fd"], rel=1e-6)
        assert row["features"]["tiles"]["kid"] is None and row["n_real"] == expected["n_real"]
        for key in ("lpips", "lpips_real", "lpips_interval_real", "lpips_pooled_real"):
            assert row[key] == pytest.approx(expected[key], rel=1e-9)
    # both sides
    _, twice = run(command, tmp_path / "twice", statistics, statistics, "--trust-stats")
    assert twice["overall"]["features"]["tiles"]["fd"] == pytest.approx(0, abs=1e-9)


def test_pytorch_fid_reads_the_statistics(world, statistics):
    mu, sigma = compute_statistics_of_path(str(statistics), None, 1, 12, "cpu")
    network = torch.jit.load(world / "tiles.pt")
    real = network(torch.cat([pixels(world / "real")[name] for name in NAMES])).double()
    np.testing.assert_allclose(mu, real.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, torch.cov(real.T), rtol=1e-9, atol=1e-12)


def test_what_adms_evaluator_reads(world, command, tmp_path):
    paint(tmp_path / "real", 32, 2, seed=0)
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
        "arr_0": ((10, 32, 32, 3), np.uint8),
    }
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert x.equal(torch.cat([pixels(tmp_path / "real", 32)[name] for name in NAMES]))
    found = features.inception(spatial=True)(x)
    np.testing.assert_allclose(mu, found["features"].double().mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.diag(sigma), found["spatial"].double().var(0), rtol=1e-2, atol=1e-6)


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
def test_statistics_made_otherwise_are_refused(world, command, tmp_path, statistics, change, words):
    with np.load(statistics) as file:
        arrays = dict(file)
    arrays["record"] = json.dumps(json.loads(str(arrays["record"])) | change)
    np.savez(tmp_path / "changed.npz", **arrays)
    flags = (*PLAIN, "--features", world / "tiles.pt")
    refused(command, tmp_path, words, tmp_path / "changed.npz", world / "fake", *flags)


def test_another_resize_is_refused(command, tmp_path):
    record = {"network": {"name": "inception", "weights": "random", "resize": "pytorch"}, "crop": 40}
    save_statistics(tmp_path / "stats.npz", {None: Gaussian(9, torch.zeros(4), torch.eye(4))}, record)
    with pytest.raises(ValueError, match="made with resize pytorch, expected tf1"):
        open_set(tmp_path / "stats.npz").check(features.inception().record, 40)


def test_foreign_statistics_are_trusted_on_request(world, command, tmp_path):
    network = torch.jit.load(world / "tiles.pt")
    real = network(torch.cat(list(pixels(world / "real").values()))).double()
    np.savez(tmp_path / "foreign.npz", mu=real.mean(0), sigma=torch.cov(real.T))
    flags = (*PLAIN, "--features", world / "tiles.pt", "--hierarchy", "none")
    refused(command, tmp_path, ["does not say", "--trust-stats"], tmp_path / "foreign.npz", world / "fake", *flags)
    _, found = run(command, tmp_path / "out", tmp_path / "foreign.npz", world / "fake", *flags, "--trust-stats")
    assert found["overall"]["n_real"] is None and not found["comparable"]
    assert found["overall"]["features"]["tiles"]["fd"] > 0


# ---- memory and processes ------------------------------------------------------------------------


def test_what_is_kept_changes_only_what_needs_it(world, command, tmp_path, report, monkeypatch):
    monkeypatch.setattr(measure, "PER_SUPERCLASS", 5)
    monkeypatch.setattr(measure, "SAMPLE", 6)
    named = ("--features", world / "tiles.pt", "--classifier", world / "reader.pt")
    _, found = run(
        command, tmp_path / "out", world / "real", world / "fake", *FULL, *named, "--keep-features", "sample"
    )
    assert found["choices"]["features_kept"] == ["sample", "sample"]
    assert found["overall"]["features"]["tiles"]["kid_size"] == 3
    for name in (None, *CLASSES):
        row, expected = (each["superclasses"][name] if name else each["overall"] for each in (found, report))
        assert row["features"]["tiles"]["fd"] == pytest.approx(expected["features"]["tiles"]["fd"], rel=1e-6)
        assert row["features"]["tiles"]["floor"] == pytest.approx(expected["features"]["tiles"]["floor"], rel=1e-6)
        assert row["lpips_pooled"] == expected["lpips_pooled"]


def test_memory_decides_what_is_kept(monkeypatch):
    labels, parents = np.repeat(np.arange(4), 10), np.array([0, 0, 1, 1])
    monkeypatch.setattr(measure, "PER_SUPERCLASS", 5)
    monkeypatch.setattr(measure, "SAMPLE", 12)
    for numbers, kept in ((1, 40), (measure.KEPT_BYTES // 160, 40), (measure.KEPT_BYTES // 160 + 1, None)):
        plan = measure.make_plan(labels, parents, "auto", numbers)
        assert plan.sampled.sum() == 12 and (plan.kept >= plan.sampled).all()
        assert plan.kept.sum() == kept or kept is None and 12 <= plan.kept.sum() <= 20
        assert all(plan.kept[plan.superclass == s].sum() >= 5 for s in (0, 1))


def test_halves_are_pairs_of_a_class():
    labels, parents = np.repeat(np.arange(4), [7, 4, 1, 9]), np.array([0, 0, 1, 1])
    for most, sizes in (([100, 100], (5, 4)), ([3, 100], (3, 4))):
        plan = measure.make_plan(labels, parents, halves=most, seed=3)
        for s, size in enumerate(sizes):
            halves = [np.sort(labels[(plan.superclass == s) & (plan.part == part)]) for part in (0, 1)]
            assert len(halves[0]) == size and (halves[0] == halves[1]).all()
    assert not np.array_equal(plan.part, measure.make_plan(labels, parents, halves=most, seed=4).part)


def test_three_processes_give_the_same_figures(world, command, tmp_path, report):
    named = ("--features", world / "tiles.pt", "--classifier", world / "reader.pt")
    flags = [world / "real", world / "fake", *FULL, *named]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(3):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            code = 1
            try:
                code = command(evaluate.main, *flags, "--output", tmp_path / "out").code
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    same_figures(found, report, least=60, abs=1e-9, rel=1e-9)


# ---- what may be wrong ---------------------------------------------------------------------------


def test_doubtful_images_are_told(world, command, tmp_path):
    for side in ("real", "fake"):
        shutil.copytree(world / side, tmp_path / side)
    shutil.copy(tmp_path / "fake/cats/lynx/0.png", tmp_path / "fake/cats/lynx/copy.png")
    shutil.rmtree(tmp_path / "fake/dogs/pug")
    for i in (1, 2, 3):
        (tmp_path / f"fake/cats/manx/{i}.png").unlink()
    real = tmp_path / "real/cats/lynx/0.png"
    Image.open(real).convert("RGB").save(real.with_suffix(".jpg"))
    real.unlink()
    center_crop(Image.open(tmp_path / "real/dogs/pug/0.png"), 40).save(tmp_path / "fake/dogs/beagle/stolen.png")
    flags = (*PLAIN, "--features", world / "tiles.pt")
    result, found = run(command, tmp_path / "out", tmp_path / "real", tmp_path / "fake", *flags)
    assert result.code == 0, result.err
    for words in (
        "1 files of .*real were compressed with loss",
        "1 images of .*fake are exact copies of others",
        "1 images of .*fake are exact copies of images of .*real",
        r"fake has no images of 1 classes of .*real \('pug'\)",
        "1 classes of .*fake have one image",
    ):
        assert any(re.search(words, note) for note in found["notes"]), (words, found["notes"])
    assert all(note in result.out for note in found["notes"])


def refused(command, tmp_path, words, *flags):
    """Code 2, one line that has the words in it, nothing written."""
    before = tree(tmp_path)
    result = command(evaluate.main, *flags, "--output", tmp_path / "never/out")
    lines = [line for line in result.err.splitlines() if line.startswith("evaluate.py: ")]
    assert result.code == 2 and len(lines) == 1 and "Traceback" not in result.err, result.err
    assert all(word in lines[0] for word in words), lines[0]
    assert tree(tmp_path) == before


def damaged(path, data=b"not an image"):
    path.write_bytes(data)


def white_folder(path):
    path.mkdir()
    white(path / "0.png")


def white(path):
    Image.new("RGB", (40, 40), "white").save(path)


FOLDERS = {  # name: (what happens to the copy of `fake`, words of the sentence)
    "no such folder": (lambda fake: shutil.rmtree(fake), ["There is no", "expected a folder"]),
    "an empty folder": (lambda fake: (shutil.rmtree(fake), fake.mkdir()), ["has no images in it"]),
    "no class folders": (
        lambda fake: (shutil.rmtree(fake), white_folder(fake)),
        ["has no classes", "expected class folders", "--hierarchy none"],
    ),
    "empty class folders": (lambda fake: [path.unlink() for path in fake.glob("*/*/*")], ["has no images in it"]),
    "one image": (
        lambda fake: [path.unlink() for path in sorted(fake.glob("*/*/*"))[1:]],
        ["has 1 image", "at least 2"],
    ),
    "one superclass": (
        lambda fake: shutil.rmtree(fake / "dogs"),
        ["no images of 1 superclasses", "'dogs'", "both sides"],
    ),
    "an unknown class": (lambda fake: (fake / "dogs/pug").rename(fake / "dogs/wolf"), ["'wolf'", "--hierarchy"]),
    "an unreadable image": (lambda fake: damaged(fake / "cats/lynx/2.png"), ["Cannot read image", "2.png", "replace"]),
    "an empty image": (lambda fake: damaged(fake / "cats/lynx/2.png", b""), ["Cannot read image", "2.png"]),
    "images of two sizes": (
        lambda fake: Image.new("RGB", (44, 40)).save(fake / "dogs/pug/1.png"),
        ["pug/1.png has 44 x 40 pixels", "expected 40 x 40", "--image-size"],
    ),
    "an image that is not square": (
        lambda fake: Image.new("RGB", (44, 40)).save(fake / "cats/lynx/0.png"),
        ["lynx/0.png has 44 x 40 pixels", "expected a square"],
    ),
    "no settings": (lambda fake: (fake / "settings.json").write_text("{"), ["settings.json is no JSON"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_bad_folders(world, command, tmp_path, name):
    change, words = FOLDERS[name]
    shutil.copytree(world / "fake", tmp_path / "fake")
    change(tmp_path / "fake")
    refused(command, tmp_path, words, world / "real", tmp_path / "fake", *PLAIN, "--features", world / "tiles.pt")


def test_an_unreadable_image_in_a_worker(world, command, tmp_path):
    shutil.copytree(world / "fake", tmp_path / "fake")
    damaged(tmp_path / "fake/cats/lynx/2.png")
    flags = ("--num-workers", 1, *PLAIN[2:], "--features", world / "tiles.pt")
    refused(command, tmp_path, ["Cannot read image", "2.png"], world / "real", tmp_path / "fake", *flags)


def test_features_that_are_not_finite_name_the_image(world, command, tmp_path):
    shutil.copytree(world / "fake", tmp_path / "fake")
    white(tmp_path / "fake/dogs/pug/3.png")
    words = ["undefined features of", "pug/3.png", "not finite", "expected"]
    flags = (*PLAIN, "--features", world / "undefined.pt")
    refused(command, tmp_path, words, world / "real", tmp_path / "fake", *flags)


SQUARE = np.zeros((4, 8, 8, 3), np.uint8)
ARCHIVES = {  # name: (arrays of FAKE.npz, words)
    "missing keys": ({"images": SQUARE}, ["holds 'images'", "expected images in arr_0"]),
    "objects": ({"arr_0": np.array([None, "x"], dtype=object)}, ["arr_0 of object", "expected uint8"]),
    "floats": ({"arr_0": SQUARE / 255}, ["arr_0 of float64", "expected uint8"]),
    "channels first": ({"arr_0": SQUARE.transpose(0, 3, 1, 2)}, ["(4, 3, 8, 8)", "expected uint8 (N, H, W, 3)"]),
    "no images": ({"arr_0": SQUARE[:0]}, ["has no images"]),
    "labels of other length": ({"arr_0": SQUARE, "arr_1": np.zeros(3, int)}, ["labels of the shape (3,)"]),
    "labels that are text": ({"arr_0": SQUARE, "arr_1": np.array(list("abcd"))}, ["of the type", "plain numbers"]),
    "labels outside the range": (
        {"arr_0": SQUARE, "arr_1": np.array([0, 1, 2, 5])},
        ["the label 5", "expected 0 to 4"],
    ),
    "no labels": ({"arr_0": SQUARE}, ["has no classes", "--hierarchy none"]),
    "only mu": ({"mu": np.zeros(12)}, ["does not say"]),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_bad_npz_files(world, command, tmp_path, name):
    arrays, words = ARCHIVES[name]
    np.savez(tmp_path / "fake.npz", **arrays)
    refused(command, tmp_path, words, world / "real", tmp_path / "fake.npz", *PLAIN, "--features", world / "tiles.pt")


def test_labels_without_a_hierarchy(world, command, tmp_path):
    for side in ("real", "fake"):
        npz(world, tmp_path / f"{side}.npz", side=side)
    both = (tmp_path / "real.npz", tmp_path / "fake.npz", *PLAIN, "--features", world / "tiles.pt", "--image-size", 40)
    refused(command, tmp_path, ["superclass", "only numbers", "expected --hierarchy"], *both)
    _, found = run(command, tmp_path / "out", *both, "--hierarchy", world / "real")
    assert list(found["superclasses"]) == list(CLASSES)


STATISTICS = {  # name: (arrays of REAL.npz, words)
    "no sigma": ({"mu": np.zeros(12)}, ["holds 'mu'", "expected 'sigma'"]),
    "shapes": ({"mu": np.zeros(12), "sigma": np.eye(11)}, ["sigma (11, 11)", "expected (d,) and (d, d)"]),
    "NaN": ({"mu": np.zeros(12), "sigma": np.full((12, 12), np.nan)}, ["not finite"]),
    "objects": ({"mu": np.array([None] * 12), "sigma": np.eye(12)}, ["'mu' of the type object"]),
    "another dimension": ({"mu": np.zeros(8), "sigma": np.eye(8)}, ["8 and 12 numbers", "one network"]),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_bad_statistics(world, command, tmp_path, name):
    arrays, words = STATISTICS[name]
    np.savez(tmp_path / "real.npz", **arrays)
    flags = (*PLAIN, "--features", world / "tiles.pt", "--trust-stats", "--hierarchy", "none")
    refused(command, tmp_path, words, tmp_path / "real.npz", world / "fake", *flags)


def test_damaged_npz_files(world, command, tmp_path):
    path = tmp_path / "fake.npz"
    flags = (world / "real", path, *PLAIN, "--features", world / "tiles.pt")
    refused(command, tmp_path, ["There is no file"], *flags)
    whole = npz(world, path).read_bytes()
    for content in (b"", b"<html></html>", whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused(command, tmp_path, ["fake.npz is damaged or no .npz file"], *flags)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (20, 40, 40, 3)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(1000))
    refused(command, tmp_path, ["fake.npz is shorter than"], *flags)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", "no array")
    refused(command, tmp_path, ["fake.npz is damaged or no .npz file"], *flags)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:  # 100 GB of zeros, says the header
        with archive.open("arr_0.npy", "w") as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (500_000, 256, 256, 3)}
            np.lib.format.write_array_header_1_0(stream, header)
    refused(command, tmp_path, ["compressed or too large", "numpy.savez"], *flags)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--batch-size", 0), ["--batch-size is 0, expected 1"]),
        (("--seed", 2**64), ["--seed is", "expected 0"]),
        (("--image-size", -1), ["--image-size is -1"]),
        (("--save-stats", "stats.txt"), ["stats.txt", "ends in .npz"]),
        (("--inception", "nowhere.pth"), ["There is no file nowhere.pth"]),
        (("--features", "nowhere.pt"), ["nowhere.pt"]),
        (("--hierarchy", "vegfru"), ["VegFru"]),
        ((), ["No network was named"]),
    ],
)
def test_bad_flags(world, command, tmp_path, flags, words):
    refused(command, tmp_path, words, world / "real", world / "fake", *PLAIN, *flags)


def test_outputs_that_cannot_be_written(world, command, tmp_path):
    (tmp_path / "file").write_text("")
    flags = (world / "real", world / "fake", *PLAIN, "--features", world / "tiles.pt")
    for more in (("--output", tmp_path / "file"), ("--save-stats", tmp_path / "file/stats.npz")):
        before = tree(tmp_path)
        result = command(evaluate.main, *flags, *more)
        assert result.code == 2 and "file cannot be written" in result.err and tree(tmp_path) == before


def test_flags_that_do_not_go_together(world, command, tmp_path):
    real, tiles, reader = world / "real", world / "tiles.pt", world / "reader.pt"
    refused(command, tmp_path, ["There is no FAKE"], real, *PLAIN, "--features", tiles)
    refused(command, tmp_path, ["no features to save"], real, *PLAIN, "--save-stats", tmp_path / "s.npz")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2), sigma=np.eye(2))
    again = (tmp_path / "stats.npz", "--trust-stats", "--save-stats", tmp_path / "s.npz")
    refused(command, tmp_path, ["holds statistics", "expected images"], *again)
    refused(command, tmp_path, ["a network 'tiles'"], real, world / "fake", *PLAIN, "--features", tiles, tiles)
    refused(command, tmp_path, ["12 classes, expected the 5"], real, world / "fake", *PLAIN, "--classifier", tiles)
    flat = (real, world / "fake", *PLAIN, "--classifier", reader, "--hierarchy", "none")
    refused(command, tmp_path, ["no classes", "drop the flag"], *flat)
    shutil.copy(tiles, tmp_path / "inception.pt")
    refused(command, tmp_path, ["'inception'"], real, world / "fake", *PLAIN, "--features", tmp_path / "inception.pt")
