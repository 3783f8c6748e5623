"""evaluate.py end to end: its metrics recomputed from the images, and all forms of sets; see test_evaluate_input.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import image_sets
from helpers.image_sets import NAMES, NO_NETWORKS, read_pixels, run, save_npz, write_set
from helpers.launch import launch
from helpers.tiny_files import CLASSES
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

import evaluate
from evaluation import features, image_pass, plan, training_features
from evaluation.image_sets import open_second, open_set
from hierarchy import Hierarchy
from runtime import progress
from runtime.files import sha256

sets, saved_statistics = image_sets.sets, image_sets.saved_statistics
PARENT = dict(lynx=0, manx=0, beagle=1, pug=1, pug_dog=1)


@pytest.fixture(scope="module")
def report(sets, command, tmp_path_factory):
    """The report on `real` and `fake`, with every metric that tiny networks can give."""
    result, report = run(
        command,
        tmp_path_factory.mktemp("report"),
        *(sets / "real", sets / "fake", *NO_NETWORKS[:4], "--random-weights"),
        *("--features", sets / "tiles.pt", "--classifier", sets / "classifier.pt", "--floor", "--batch-size", 7),
    )
    assert result.code == 0, result.err
    return report


def values_of(report):
    """Return {"overall.lpips": 0.1, ...} of all numbers among the report's metrics."""
    values = {}

    def walk(node, name):
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            walk(value, f"{name}.{key}")
        if isinstance(node, float | int):
            values[name] = node

    walk({key: report[key] for key in ("overall", "superclasses")}, "")
    return values


def assert_same_metrics(a, b, least=10, **tolerance):
    a, b = values_of(a), values_of(b)
    assert a.keys() == b.keys() and len(a) >= least
    for key in a:
        assert a[key] == pytest.approx(b[key], **tolerance), key


# ---- the metrics ---------------------------------------------------------------------------------


def test_distances_equal_torch_fidelity(sets, report):
    network = torch.jit.load(sets / "tiles.pt")
    outputs = [{name: network(x) for name, x in read_pixels(sets / name).items()} for name in ("real", "fake")]
    rows = {"": (report["overall"], NAMES)}
    rows |= {name: (report["superclasses"][name], classes) for name, classes in CLASSES.items()}
    for row, classes in rows.values():
        real, fake = (torch.cat([of_set[name] for name in classes]) for of_set in outputs)
        assert (row["n_real"], row["n_fake"]) == (len(real), len(fake))
        found = row["features"]["tiles"]
        stats = [fid_features_to_statistics(x.double()) for x in (real, fake)]
        expected = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
        assert found["fd"] == pytest.approx(expected, rel=1e-4)  # torch-fidelity is inexact if n < d
        options = dict(kid_subsets=100, kid_subset_size=found["kid_size"], rng_seed=0, verbose=False)
        kid = kid_features_to_metric(fake, real, **options)
        assert (found["kid"], found["kid_std"]) == pytest.approx(tuple(kid.values()), abs=1e-5)
    real, fake = (torch.cat([of_set[name] for name in NAMES]) for of_set in outputs)
    expected = prc_features_to_metric(fake, real, verbose=False)
    for key in ("precision", "recall"):
        assert report["overall"][key] == pytest.approx(expected[key], abs=1e-6)


def test_floor_is_the_distance_of_two_halves_beside_fake_at_their_size(report):
    for row, n in ((report["overall"], 15), (report["superclasses"]["cats"], 6), (report["superclasses"]["dogs"], 9)):
        found = row["features"]["tiles"]
        assert found["floor_n"] == n and 0 < found["floor"] < found["fd"] * 10 and found["fd_at_floor_n"] > 0
    assert report["floor"] is None and report["choices"]["floor"] == "halves"


def test_a_perfect_model_is_at_the_floor_at_its_number_of_images(sets, command, tmp_path, monkeypatch):
    """FAKE is another sample of the same distribution: its distance to REAL is half the floor, as it has twice the images."""
    draw = np.random.default_rng(0)
    for name in ("real", "fake"):
        np.savez(tmp_path / f"{name}.npz", arr_0=draw.integers(0, 256, (500, 4, 4, 3), dtype=np.uint8))
    torch.jit.script(image_sets.Tiles(48)).save(tmp_path / "many.pt")
    flags = (*NO_NETWORKS, "--features", tmp_path / "many.pt", "--hierarchy", "none", "--batch-size", 500)
    monkeypatch.setattr(image_pass, "MUCH_MEMORY", 48 * 48 * 8)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    result, found = run(command, tmp_path / "out", "--floor", tmp_path / "real.npz", tmp_path / "fake.npz", *flags)
    assert result.code == 0, result.err
    assert "distances: 100%" in result.err  # a progress bar
    assert "real.npz: the sums over superclasses take 0.0 GB per process" in result.err
    values = found["overall"]["features"]["many"]
    assert values["floor_n"] == 250 and values["fd_at_floor_n"] == pytest.approx(values["floor"], rel=0.2)
    assert values["fd"] == pytest.approx(values["floor"] / 2, rel=0.2)
    titles, row = (line.split() for line in result.out.splitlines()[:3:2])
    assert (
        " ".join(titles).startswith("real fake FD many floor n floor many FD many at floor n KID") and row[4] == "250"
    )


def test_floor_takes_a_second_real_set_from_a_folder(sets, command, tmp_path):
    """The floor is the distance that evaluate.py gives for the same images as FAKE."""
    write_set(tmp_path / "more", 50, 9, seed=3)
    shutil.copy(sets / "real/cats/lynx/0.png", tmp_path / "more/cats/lynx/0.png")
    flags = (*NO_NETWORKS, "--features", sets / "tiles.pt", "--image-size", 40)
    result, found = run(command, tmp_path / "out", sets / "real", sets / "fake", *flags, "--floor", tmp_path / "more")
    assert result.code == 0, result.err
    assert found["floor"]["n"] == 20 and found["choices"]["floor"] == str(tmp_path / "more")
    chosen = open_second(tmp_path / "more", labelled(sets / "fake"), Hierarchy.from_folder(sets / "real"), seed=0)
    assert np.bincount(chosen.labels).tolist() == [4] * 5
    for path in chosen.paths:
        copy = tmp_path / "chosen" / Path(path).relative_to(tmp_path / "more")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    _, expected = run(command, tmp_path / "same", sets / "real", tmp_path / "chosen", *flags)
    for group in ("cats", "dogs", "overall"):
        row, other = ({**r["superclasses"], "overall": r["overall"]}[group] for r in (found, expected))
        assert row["features"]["tiles"]["floor"] == pytest.approx(other["features"]["tiles"]["fd"], rel=1e-9)
        assert row["features"]["tiles"]["floor_n"] == row["n_fake"]
    copied = str(tmp_path / "more/cats/lynx/0.png") in chosen.paths
    assert sum("the floor is too low" in note for note in found["notes"]) == copied
    assert "floor n" in result.out and "at floor n" not in result.out
    # fewer real images than FAKE has
    shutil.rmtree(tmp_path / "more/dogs/pug")
    _, found = run(command, tmp_path / "few", sets / "real", sets / "fake", *flags, "--floor", tmp_path / "more")
    assert found["floor"]["n"] == 16 and any("fewer than FAKE in some classes" in note for note in found["notes"])


def labelled(folder):
    images = open_set(folder)
    images.label(Hierarchy.from_folder(folder))
    return images


def test_diversity_equals_pairwise_lpips(sets, report):
    network = features.lpips_features().module.net
    for suffix, folder in (("", "fake"), ("_real", "real")):
        images = read_pixels(sets / folder)
        within, pooled = {}, {}
        everything = [(name, x) for name in NAMES for x in images[name]]
        scaled = torch.stack([x for _, x in everything]) / 127.5 - 1
        for i, (a, _) in enumerate(everything[:-1]):
            with torch.inference_mode():
                distances = network(scaled[i : i + 1].expand_as(scaled[i + 1 :]), scaled[i + 1 :]).flatten().tolist()
            for (b, _), distance in zip(everything[i + 1 :], distances):
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
            assert row[f"lpips_pooled_interval{suffix}"] is None  # too few classes
            assert row[f"lpips_classes{suffix}"] == len(classes)
    assert means["lynx"] > 0.01


def test_accuracy_equals_the_classifiers(sets, report):
    network = torch.jit.load(sets / "classifier.pt")
    for suffix, folder in (("", "fake"), ("_real", "real")):
        predicted = {name: network(x).argmax(1).tolist() for name, x in read_pixels(sets / folder).items()}
        pairs = [(name, NAMES[label]) for name in NAMES for label in predicted[name]]
        rows = {None: report["overall"], 0: report["superclasses"]["cats"], 1: report["superclasses"]["dogs"]}
        for s, row in rows.items():
            group = [(a, b) for a, b in pairs if s in (None, PARENT[a])]
            assert row[f"top1{suffix}"] == pytest.approx(np.mean([a == b for a, b in group]))
            same_superclass = [PARENT[a] == PARENT[b] for a, b in group]
            assert row[f"superclass_accuracy{suffix}"] == pytest.approx(np.mean(same_superclass))


def test_a_classifier_in_another_order_needs_its_class_names(sets, command, tmp_path):
    """A classifier that reads the class from the top-left pixel, with its outputs in reverse order."""
    for name in ("real", "fake"):
        for path in sorted((sets / name).glob("*/*/*.png")):
            image = Image.new("RGB", (8, 8), (50 * NAMES.index(path.parent.name), path.stat().st_size % 256, 0))
            copy = tmp_path / name / path.relative_to(sets / name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            image.save(copy)
    torch.jit.script(image_sets.CornerReader()).save(tmp_path / "reader.pt")
    flags = (tmp_path / "real", tmp_path / "fake", *NO_NETWORKS, "--classifier", tmp_path / "reader.pt")
    result, found = run(command, tmp_path / "out", *flags)
    assert found["overall"]["top1"] == found["overall"]["top1_real"] == 0.2  # the third class alone
    (note,) = (note for note in found["notes"] if note.startswith("The classifier finds"))
    assert "20.0% of the real images, and chance of 20.0%" in note
    (tmp_path / "reader.classes.txt").write_text("\n".join(NAMES[::-1]))
    result, found = run(command, tmp_path / "out", *flags)
    assert found["overall"]["top1"] == found["overall"]["top1_real"] == 1
    assert not any(note.startswith("The classifier finds") for note in found["notes"])
    titles, *_, overall = result.out.split("  Precision")[0].splitlines()[:5]
    assert "real top-1" in titles and overall.count("100.0%") == 4


def test_fid_and_inception_score_use_inception(sets, command, tmp_path):
    for seed, name in enumerate(("real", "fake")):
        write_set(tmp_path / name, 40, 1, seed=seed)
    torch.save(features.inception().module.net.state_dict(), tmp_path / "inception.pth")
    flags = ("--inception", tmp_path / "inception.pth", "--num-workers", 0, "--lpips-trunk", "none")
    _, report = run(command, tmp_path / "out", tmp_path / "real", tmp_path / "fake", *flags)
    network = features.inception(tmp_path / "inception.pth")
    images = [read_pixels(tmp_path / name) for name in ("real", "fake")]
    real, fake = (network(torch.cat([of_class[name] for name in NAMES])) for of_class in images)
    x, y = real["features"].double(), fake["features"].double()
    cross = torch.linalg.svdvals((x - x.mean(0)) @ (y - y.mean(0)).T).sum()
    scatter = (x - x.mean(0)).square().sum() + (y - y.mean(0)).square().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + (scatter - 2 * cross) / 4
    assert report["overall"]["fid"] == pytest.approx(expected.item(), rel=1e-6)
    p = fake["logits"].double().softmax(1)  # one image per split: a score of 1
    assert report["overall"]["inception_score"] == pytest.approx(1) and p.shape == (5, 1008)
    assert report["choices"]["networks"][0]["weights"] == sha256(tmp_path / "inception.pth")
    assert not report["comparable"] and "published" in report["not_comparable"][0]
    assert any("fewer than 2,048 images" in note for note in report["notes"])


def test_report_records_every_choice(sets, report):
    assert list(report["superclasses"]) == list(CLASSES)
    choices = report["choices"]
    assert choices["image_size"] == 40 and choices["seed"] == 0 and choices["features_kept"] == ["all", "all"]
    assert choices["networks"] == [{"name": "tiles", "weights": sha256(sets / "tiles.pt")}]
    assert choices["lpips"]["weights"] == "random" and not report["comparable"]
    assert report["sampling"] == {"sampler": "ddpm", "cfg_scale": 4.0}
    assert report["versions"]["torch-fidelity"] and report["real"]["n"] == 30 and report["fake"]["kind"] == "folder"
    assert 0 < report["real"]["seconds"]["network"] <= report["real"]["seconds"]["total"]


def test_every_output_has_the_metrics_and_the_warning(sets, command, tmp_path):
    flags = ("--features", sets / "tiles.pt", "vit:test_vit@32", "--random-weights")
    result, report = run(command, tmp_path / "out", sets / "real", sets / "fake", *NO_NETWORKS, *flags)
    assert result.code == 0
    fd = f"{report['overall']['features']['tiles']['fd']:.4g}"
    texts = [result.out, *((tmp_path / "out" / f"metrics.{kind}").read_text() for kind in ("md", "csv"))]
    assert all("cats" in text and "overall" in text for text in texts)
    for text in texts[:2]:
        assert fd in text and "NOT COMPARABLE" in text and "FD vit" in text and "FID" not in text.split("NOT")[0]
        assert "on the features of tiles." in text  # precision and recall are of the first network
    table = [line.split(",") for line in texts[2].splitlines()]
    assert [row[0] for row in table[1:]] == ["cats", "dogs", "overall"] and {row[-1] for row in table[1:]} == {"False"}
    assert float(table[3][table[0].index("features.tiles.fd")]) == report["overall"]["features"]["tiles"]["fd"]
    figure = Image.open(tmp_path / "out/superclasses.png")
    assert figure.width > 200 and len(np.unique(np.array(figure))) > 10


# ---- forms of sets -------------------------------------------------------------------------------


REPORT_FLAGS = ("--num-workers", 0, "--inception", "none", "--random-weights", "--batch-size", 7, "--floor")


@pytest.mark.parametrize("save, labels", [(np.savez, "arr_1"), (np.savez_compressed, "labels")])
def test_an_npz_gives_the_metrics_of_the_folder(sets, command, tmp_path, report, save, labels):
    path = save_npz(sets, tmp_path / "fake.npz", save, labels)
    named = ("--features", sets / "tiles.pt", "--classifier", sets / "classifier.pt")
    result, found = run(command, tmp_path / "out", sets / "real", path, *REPORT_FLAGS, *named)
    assert result.code == 0, result.err
    # these take random images, which depend on the order of the images
    random = ("kid", "precision", "recall", "fd_at_floor_n")

    def without_random(report):
        rows = json.loads(json.dumps({key: report[key] for key in ("overall", "superclasses")}))
        for row in (rows["overall"], *rows["superclasses"].values()):
            for part in (row, row["features"]["tiles"]):
                for key in [key for key in part if key.startswith(random)]:
                    del part[key]
        return rows

    assert_same_metrics(without_random(found), without_random(report), rel=1e-9)
    assert found["sampling"] is None and found["fake"]["kind"] == "npz"
    (tmp_path / "fake").mkdir()
    for digest, notes in ((found["hierarchy"]["sha256"], 0), ("0" * 64, 1)):
        (tmp_path / "fake/settings.json").write_text(json.dumps({"hierarchy": digest}))
        flags = (*NO_NETWORKS, "--features", sets / "tiles.pt")
        _, found = run(command, tmp_path / "out", sets / "real", path, *flags)
        assert found["sampling"] == {"hierarchy": digest}
        assert sum("another hierarchy" in note for note in found["notes"]) == notes


def test_class_folders_beside_a_grid_give_the_same_metrics(sets, command, tmp_path, report):
    for folder in (sets / "fake").glob("*/*"):
        shutil.copytree(folder, tmp_path / "fake" / folder.name)
    Image.new("RGB", (100, 30)).save(tmp_path / "fake/grid.png")
    (tmp_path / "fake/.ipynb_checkpoints").mkdir()
    named = ("--features", sets / "tiles.pt", "--classifier", sets / "classifier.pt")
    _, found = run(command, tmp_path / "out", sets / "real", tmp_path / "fake", *REPORT_FLAGS, *named)
    assert_same_metrics(found, report, rel=1e-9)


def test_without_a_hierarchy_all_images_are_one_class(sets, command, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((sets / "fake").glob("*/*/*.png"))):
        shutil.copy(path, flat / f"{i}.png")
    flags = ("--num-workers", 0, "--inception", "none", "--random-weights", "--features", sets / "tiles.pt")
    _, found = run(command, tmp_path / "out", sets / "real", flat, *flags, "--hierarchy", "none")
    assert found["superclasses"] == {} and found["hierarchy"] is None and found["overall"]["n_fake"] == 20
    assert found["overall"]["lpips"] == pytest.approx(found["overall"]["lpips_pooled"], rel=1e-9)
    _, deep = run(command, tmp_path / "deep", sets / "real", sets / "fake", *flags, "--hierarchy", "none")
    assert deep["overall"]["features"]["tiles"]["fd"] == pytest.approx(found["overall"]["features"]["tiles"]["fd"])


def test_image_size_crops_both_sets(sets, command, tmp_path):
    flags = (*NO_NETWORKS, "--features", sets / "tiles.pt", "--image-size", 24)
    _, found = run(command, tmp_path / "out", sets / "real", sets / "fake", *flags)
    network = torch.jit.load(sets / "tiles.pt")
    real, fake = (network(torch.cat(list(read_pixels(sets / name, 24).values()))) for name in ("real", "fake"))
    stats = [fid_features_to_statistics(x.double()) for x in (real, fake)]
    expected = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert found["overall"]["features"]["tiles"]["fd"] == pytest.approx(expected, rel=1e-6)
    assert found["choices"]["image_size"] == 24


# ---- statistics ----------------------------------------------------------------------------------


def test_saved_statistics_replace_the_real_images(sets, command, tmp_path, report, saved_statistics):
    flags = (*NO_NETWORKS[:4], "--random-weights", "--features", sets / "tiles.pt")
    result, found = run(command, tmp_path / "out", saved_statistics, sets / "fake", *flags)
    assert result.code == 0, result.err
    for name in (None, *CLASSES):
        row, expected = (each["superclasses"][name] if name else each["overall"] for each in (found, report))
        assert row["features"]["tiles"]["fd"] == pytest.approx(expected["features"]["tiles"]["fd"], rel=1e-6)
        assert row["features"]["tiles"]["kid"] is None and row["n_real"] == expected["n_real"]
        for key in ("lpips", "lpips_real", "lpips_interval_real", "lpips_pooled_real"):
            assert row[key] == pytest.approx(expected[key], rel=1e-9)
    # statistics as both sets
    _, twice = run(command, tmp_path / "twice", saved_statistics, saved_statistics, "--trust-stats")
    assert twice["overall"]["features"]["tiles"]["fd"] == pytest.approx(0, abs=1e-9)


# ---- memory and processes ------------------------------------------------------------------------


def test_keeping_a_sample_changes_only_sampled_metrics(sets, command, tmp_path, report, monkeypatch):
    monkeypatch.setattr(plan, "PER_SUPERCLASS", 5)
    monkeypatch.setattr(plan, "SAMPLE", 6)
    named = ("--features", sets / "tiles.pt", "--classifier", sets / "classifier.pt")
    _, found = run(
        command, tmp_path / "out", sets / "real", sets / "fake", *REPORT_FLAGS, *named, "--keep-features", "sample"
    )
    assert found["choices"]["features_kept"] == ["sample", "sample"]
    assert found["overall"]["features"]["tiles"]["kid_size"] == 3
    for name in (None, *CLASSES):
        row, expected = (each["superclasses"][name] if name else each["overall"] for each in (found, report))
        assert row["features"]["tiles"]["fd"] == pytest.approx(expected["features"]["tiles"]["fd"], rel=1e-6)
        assert row["features"]["tiles"]["floor"] == pytest.approx(expected["features"]["tiles"]["floor"], rel=1e-6)
        assert row["lpips_pooled"] == expected["lpips_pooled"]


def test_three_processes_give_the_same_metrics(sets, tmp_path, report, monkeypatch):
    """And each computes the features of some training images."""
    monkeypatch.setattr(training_features, "CHUNK", 8)
    train, named = (
        write_set(tmp_path / "train", 40, 4, 9),
        ("--features", sets / "tiles.pt", "--train", tmp_path / "train"),
    )
    named = (*named, "--classifier", sets / "classifier.pt")
    flags = [sets / "real", sets / "fake", *REPORT_FLAGS, *named, "--output", tmp_path / "out"]
    assert launch(evaluate.main, flags, tmp_path, world=3) == {0: 0, 1: 0, 2: 0}
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert_same_metrics(found, report, least=60, abs=1e-9, rel=1e-9)
    network = torch.jit.load(sets / "tiles.pt")
    x, y = (network(torch.cat(list(read_pixels(folder).values()))).double() for folder in (sets / "fake", train))
    median = torch.cdist(x, y).min(1).values.quantile(0.5).item()
    assert found["memorisation"]["generated"]["median"] == pytest.approx(median, rel=1e-5)
    assert len(list((tmp_path / "out/training-features").glob("*.safetensors"))) == 3
