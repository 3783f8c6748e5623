"""The program end to end: its figures recomputed from the images, and every form of a set; see test_evaluate_input.py."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import image_sets as painted
from helpers.image_sets import NAMES, PLAIN, npz, paint, pixels, run
from helpers.launch import launch
from helpers.tiny_files import CLASSES
from PIL import Image
from pytorch_fid.fid_score import compute_statistics_of_path
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

import evaluate
from evaluation import features, measure

world, statistics = painted.world, painted.statistics
PARENT = dict(lynx=0, manx=0, beagle=1, pug=1, pug_dog=1)


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


def test_three_processes_give_the_same_figures(world, tmp_path, report):
    named = ("--features", world / "tiles.pt", "--classifier", world / "reader.pt")
    flags = [world / "real", world / "fake", *FULL, *named, "--output", tmp_path / "out"]
    assert launch(evaluate.main, flags, tmp_path, world=3) == {0: 0, 1: 0, 2: 0}
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    same_figures(found, report, least=60, abs=1e-9, rel=1e-9)
