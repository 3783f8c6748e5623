"""evaluate.py --train, --rank, --class-embeddings and classes.csv, end to end."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import image_sets
from helpers.image_sets import NAMES, NO_NETWORKS, assert_refused, read_pixels, run, save_npz, write_set
from helpers.refusals import ROW
from helpers.tiny_files import CLASSES
from PIL import Image

import evaluate
from evaluation import comparison, options, ranks
from evaluation.features import lpips_features
from evaluation.neighbours import neighbourhoods

sets = image_sets.sets
RANDOM_LPIPS = (*NO_NETWORKS[:4], "--random-weights")


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """40 training images of 40 pixels."""
    return write_set(tmp_path_factory.mktemp("train") / "train", 40, 8, seed=7)


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


# ---- training images -----------------------------------------------------------------------------


def change_a_pixel(source, target):
    """Copy a set with one changed pixel in each image."""
    for path in source.glob("*/*/*.png"):
        image = Image.open(path)
        image.putpixel((5, 5), tuple(255 - value for value in image.getpixel((5, 5))))
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        image.save(copy)
    return target


def test_copies_with_one_changed_pixel_are_found(sets, command, tmp_path, train):
    fake = change_a_pixel(train, tmp_path / "fake")
    flags = (sets / "real", fake, "--features", sets / "tiles.pt", "--train", train, "--batch-size", 16)
    result, found = run(command, tmp_path / "out", *flags, *RANDOM_LPIPS)
    assert result.code == 0, result.err
    memorised = found["memorisation"]
    assert memorised["network"] == "tiles" and memorised["n"] == memorised["generated"]["n"] == 40
    assert memorised["held_out"] | {"n": 30, "copies": 0} == memorised["held_out"]
    overall = memorised["overall"]
    assert overall["closer"] == overall["closer_than_any"] == 1 and overall["near"] == 40 and overall["p_value"] < 1e-9
    for words in ("40 more images of", "100.0% of the images of", "Only 30 images of"):
        assert any(note.startswith(words) for note in found["notes"]) and words in result.out
    assert not any("exact copies" in note for note in found["notes"])  # which a changed pixel hides
    # the closest pairs:
    pairs = rows_of(tmp_path / "out/pairs.csv")
    assert [pair["set"] for pair in pairs] == ["generated"] * 24 + ["held out"] * 8
    for pair in pairs[:24]:
        assert pair["image"].removeprefix(str(fake)) == pair["nearest"].removeprefix(str(train))
        assert float(pair["changed_pixels"]) == pytest.approx(1 / 1600) and pair["lpips_nearest"] == pair["nearest"]
        assert pair["image_class"] == pair["nearest_class"]
    first, last = pairs[0], pairs[-1]
    images = [torch.from_numpy(np.array(Image.open(first[key]))).permute(2, 0, 1) for key in ("image", "nearest")]
    f = lpips_features()(torch.stack(images))["features"]
    assert float(first["lpips"]) == pytest.approx((f[0] - f[1]).square().sum().item(), abs=1e-6)
    assert float(last["distance"]) > 5 * float(first["distance"]) and float(last["lpips"]) > float(first["lpips"])
    assert Image.open(tmp_path / "out/pairs.png").width > 800
    # distances: the features of all images, one pair at a time
    network = torch.jit.load(sets / "tiles.pt")
    features = [torch.cat([network(x[name]) for name in NAMES]) for x in map(read_pixels, (sets / "real", train))]
    expected = torch.cdist(*(x.double() for x in features), compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    assert memorised["held_out"]["smallest"] == pytest.approx(expected.min().item(), rel=1e-6)
    assert memorised["held_out"]["median"] == pytest.approx(expected.quantile(0.5).item(), rel=1e-6)
    # the next command takes the features from their folder
    again, same = run(command, tmp_path / "out", *flags, *NO_NETWORKS)
    assert "training images" not in again.err and same["memorisation"] == memorised


def test_copies_of_real_images_with_one_changed_pixel_are_found_without_training_images(sets, command, tmp_path, train):
    """Their Frechet distance is excellent; one copy is exact, which is another note, and one image is new."""
    fake = change_a_pixel(train, tmp_path / "fake")
    shutil.copy(train / "cats/lynx/3.png", fake / "cats/lynx/3.png")
    shutil.copy(sets / "fake/cats/lynx/0.png", fake / "cats/lynx/4.png")
    flags = (*NO_NETWORKS, "--features", sets / "tiles.pt")
    _, found = run(command, tmp_path / "out", train, fake, *flags)
    assert found["overall"]["features"]["tiles"]["fd"] < 0.01 and found["overall"]["near_copies"] == 38
    assert any(
        note.startswith(f"38 images of {fake} are as close to an image of {train} as") for note in found["notes"]
    )
    assert any(note.startswith(f"1 images of {fake} are exact copies of images of {train}") for note in found["notes"])
    # other images are none
    _, found = run(command, tmp_path / "new", sets / "real", sets / "fake", *flags)
    assert found["overall"]["near_copies"] == 0 and not any("changed copy" in note for note in found["notes"])


def test_new_images_are_no_copies(sets, command, tmp_path, train):
    """FAKE is another sample of the distribution; of REAL, images that are in the training set are not held out."""
    shutil.copytree(sets / "real", tmp_path / "real")
    shutil.copy(train / "cats/lynx/3.png", tmp_path / "real/cats/lynx/leak.png")
    flags = (*NO_NETWORKS, "--features", sets / "tiles.pt", "--image-size", 40, "--train-cache", tmp_path / "cache")
    write_set(tmp_path / "fake", 40, 9, seed=8)
    shutil.copy(train / "dogs/pug/5.png", tmp_path / "fake/dogs/pug/copy.png")
    _, found = run(command, tmp_path / "out", tmp_path / "real", tmp_path / "fake", *flags, "--train", train)
    memorised = found["memorisation"]
    assert memorised["held_out"]["n"] == 30 and memorised["held_out"]["copies"] == 1
    assert memorised["generated"]["copies"] == 1 and memorised["overall"]["p_value"] > 0.01
    texts = " ".join(found["notes"])
    assert "1 images of" in texts and "are exact copies of training images: they do not count as held out" in texts
    assert "more images of" not in texts and "look at the closest pairs" not in texts
    assert not (tmp_path / "out/training-features").exists() and (tmp_path / "cache/record.json").is_file()
    assert memorised["generated"]["same_class"] < 1 and found["choices"]["features_kept"] == ["all", "all"]


@pytest.mark.reliability(*ROW)
def test_bad_training_folders_are_refused(sets, command, tmp_path, train):
    tiles, real, fake = ("--features", sets / "tiles.pt"), sets / "real", sets / "fake"
    both = (real, fake, *NO_NETWORKS, *tiles, "--train")
    (tmp_path / "link").symlink_to(real)
    shutil.copytree(train, tmp_path / "few")
    shutil.rmtree(tmp_path / "few/dogs/pug")
    shutil.copytree(train, tmp_path / "other")
    (tmp_path / "other/dogs/pug").rename(tmp_path / "other/dogs/wolf")
    (tmp_path / "one/cats").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "one/cats/0.png")
    npz = save_npz(sets, tmp_path / "fake.npz")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(12), sigma=np.eye(12))
    statistics = (tmp_path / "stats.npz", fake, *NO_NETWORKS, *tiles, "--hierarchy", "none", "--trust-stats")
    for flags, words in (
        ((*both, real), ["--train is", "which is REAL too, expected the images that the model was trained on"]),
        ((*both, tmp_path / "link"), ["which is REAL too"]),
        ((*both, fake), ["which is FAKE too"]),
        ((*both, tmp_path / "nowhere"), ["There is no", "expected a folder"]),
        ((*both, npz), ["--train is", "expected a folder of training images"]),
        (
            (*both, tmp_path / "few"),
            ["few has no images of 1 classes of", "('pug')", "expected the images that the model"],
        ),
        ((*both, tmp_path / "other"), ["other has a folder 'wolf', expected names of classes of real"]),
        ((*both, tmp_path / "one", "--hierarchy", "none"), ["one has 1 image"]),
        ((*statistics, "--train", train), ["stats.npz holds statistics, expected images to compare with --train"]),
        (
            (real, fake, *NO_NETWORKS, "--classifier", sets / "classifier.pt", "--train", train),
            ["--train needs features"],
        ),
        ((*both[:-1], "--train-cache", tmp_path / "cache"), ["--train-cache is set without --train"]),
    ):
        assert_refused(command, tmp_path, words, *flags)
    result = command(evaluate.main, *both, train)
    assert result.code == 2 and "--train has no folder for its features" in result.err
    # REAL is a copy of the training images, so that nothing is held out; this shows after the passes
    shutil.copytree(train, tmp_path / "real")
    flags = (tmp_path / "real", fake, *NO_NETWORKS, *tiles, "--train", train, "--train-cache", tmp_path / "cache")
    result = command(evaluate.main, *flags)
    assert result.code == 2 and "All images of REAL are in" in result.err and "held out" in result.err
    # features of another network
    result = command(evaluate.main, real, fake, *NO_NETWORKS, "--features", sets / "classifier.pt", *flags[-4:])
    assert result.code == 2 and "has training features with network name tiles" in result.err


# ---- classes, ranks and equal numbers ------------------------------------------------------------


def test_classes_csv(sets, command, tmp_path):
    flags = (*RANDOM_LPIPS, "--classifier", sets / "classifier.pt", "--features", sets / "tiles.pt")
    _, report = run(command, tmp_path / "out", sets / "real", sets / "fake", *flags)
    rows = rows_of(tmp_path / "out/classes.csv")
    assert [row["class"] for row in rows] == NAMES and [row["superclass"] for row in rows][:3] == [
        "cats",
        "cats",
        "dogs",
    ]
    network, lpips = torch.jit.load(sets / "classifier.pt"), lpips_features()
    right = []
    for suffix, folder in (("", "fake"), ("_real", "real")):
        for row, (name, x) in zip(rows, read_pixels(sets / folder).items()):
            assert row["class"] == name and int(row[f"n{suffix or '_fake'}"]) == len(x)
            found = network(x).argmax(1).tolist()
            label = NAMES.index(name)
            assert float(row[f"top1{suffix}"]) == pytest.approx(np.mean([c == label for c in found]))
            assert float(row[f"top5{suffix}"]) == 1  # of five classes
            f = lpips(x)["features"]
            pairs = (f[:, None] - f).square().sum(2)
            expected = pairs.sum() / (len(f) * (len(f) - 1))
            assert float(row[f"lpips{suffix}"]) == pytest.approx(expected.item(), abs=1e-5)
            if not suffix:
                right += [c == label for c in found]
                wrong = [c for c in found if c != label]
                counts = {c: wrong.count(c) for c in sorted(wrong)}
                best = max(counts, key=counts.get, default=None)
                assert row["mistaken_for"] == ("" if best is None else NAMES[best])
                assert float(row["mistaken"]) == pytest.approx(counts.get(best, 0) / len(found))
    assert report["overall"]["top1"] == pytest.approx(np.mean(right))


def test_accuracy_at_every_rank(sets, command, tmp_path):
    flags = (*NO_NETWORKS, "--classifier", sets / "classifier.pt", "--features", sets / "tiles.pt")
    result, report = run(command, tmp_path / "out", sets / "real", sets / "fake", *flags)
    row = report["overall"]
    for suffix in ("", "_real"):
        expected = {"superclass": row[f"superclass_accuracy{suffix}"], "class": row[f"top1{suffix}"]}
        assert row[f"ranks{suffix}"]["accuracy"] == pytest.approx(expected)
        wrong = row[f"ranks{suffix}"]["wrong_images"]
        share = (expected["superclass"] - expected["class"]) / (1 - expected["class"])
        assert wrong == pytest.approx({"superclass": share, "none": 1 - share})
    assert "Finest right rank of the images of a wrong class: superclass" in result.out


TREE = {  # class: order, genus
    "lynx": ("Feliformia", "Lynx"),
    "manx": ("Feliformia", "Felis"),
    "beagle": ("Caniformia", "Canis"),
    "pug": ("Caniformia", "Canis"),
    "pug_dog": ("Caniformia", "Vulpes"),
}


def test_rows_of_another_rank(sets, command, tmp_path, monkeypatch):
    """With --rank each node that has enough images gets the row that a hierarchy of these superclasses gives."""
    order, genus = ([TREE[name][i] for name in NAMES] for i in (0, 1))
    path = tmp_path / "tree.json"
    path.write_text(json.dumps({"classes": NAMES, "ranks": {"order": order, "genus": genus}}))
    for module in (options, ranks):
        monkeypatch.setattr(module, "LEAST_OF_NODE", 4)
    (tmp_path / "fake").symlink_to(sets / "fake")
    flags = (*NO_NETWORKS, "--features", sets / "tiles.pt", "--classifier", sets / "classifier.pt")
    both = (sets / "real", tmp_path / "fake", *flags)
    result, found = run(command, tmp_path / "out", *both, "--hierarchy", path, "--rank", "genus")
    assert result.code == 0, result.err
    assert set(found["superclasses"]) == {"Lynx", "Felis", "Canis", "Vulpes"} and found["choices"]["rank"] == "genus"
    own = tmp_path / "genus.json"
    nodes = list(dict.fromkeys(genus))
    own.write_text(json.dumps({"superclasses": nodes, "classes": NAMES, "parents": genus}))
    _, expected = run(command, tmp_path / "own", *both, "--hierarchy", own)
    for name, row in found["superclasses"].items():
        other = expected["superclasses"][name]
        assert row["features"] == other["features"] and row["top1"] == other["top1"]
        assert set(row["ranks"]["accuracy"]) == {"order", "genus", "class"}
    assert found["overall"]["ranks"]["accuracy"]["genus"] == expected["overall"]["superclass_accuracy"]
    assert found["hierarchy"]["sha256"] != expected["hierarchy"]["sha256"]
    # nodes that are too small
    for module in (options, ranks):
        monkeypatch.setattr(module, "LEAST_OF_NODE", 5)
    _, found = run(command, tmp_path / "out", *both, "--hierarchy", path, "--rank", "genus")
    assert list(found["superclasses"]) == ["Canis"]
    assert any(note.startswith("3 of 4 nodes of the rank genus have fewer than") for note in found["notes"])


@pytest.mark.reliability(*ROW)
def test_bad_ranks_and_class_embeddings_are_refused(sets, command, tmp_path):
    both = (sets / "real", sets / "fake", *NO_NETWORKS, "--features", sets / "tiles.pt")
    (tmp_path / "file.safetensors").write_bytes(b"")
    for flags, words in (
        (("--rank", "superclass"), ["No node of the rank superclass has 50 images in every set", "a coarser --rank"]),
        (("--rank", "family"), ["family"]),
        (("--rank", "order", "--hierarchy", "none"), ["--rank is order, but the images have no classes"]),
        (("--class-embeddings", "file.safetensors"), ["--class-embeddings needs an image tower"]),
        (
            ("--classifier", sets / "classifier.pt", "--class-embeddings", tmp_path / "file.safetensors"),
            ["file.safetensors is not a file of class embeddings"],
        ),
    ):
        assert_refused(command, tmp_path, words, *both, *flags)


def test_metrics_of_equal_numbers(sets, command, tmp_path, monkeypatch):
    """The superclasses have 8 and 12 generated images: all get 8."""
    monkeypatch.setattr(comparison, "LEAST_EQUAL", 6)
    write_set(tmp_path / "more", 40, 5, seed=3)
    flags = (sets / "real", sets / "fake", *NO_NETWORKS, "--features", sets / "tiles.pt", "--floor", tmp_path / "more")
    result, found = run(command, tmp_path / "out", *flags)
    network = torch.jit.load(sets / "tiles.pt")
    real, fake = (read_pixels(sets / name) for name in ("real", "fake"))
    rows = {name: found["superclasses"][name]["at_equal_n"] for name in CLASSES}
    assert {row["n"] for row in rows.values()} == {8} and rows["dogs"]["floor"].keys() == rows["dogs"].keys() - {
        "n",
        "floor",
    }
    # FAKE's cats are all taken
    x, y = (network(torch.cat([images[name] for name in CLASSES["cats"]])) for images in (real, fake))
    several = [neighbourhoods(x[torch.randperm(len(x))[:8]], y).precision for _ in range(50)]
    assert min(several) - 0.2 <= rows["cats"]["precision"] <= max(several) + 0.2
    assert "of the rows are of 8 random images in both sets" in result.out
    assert 0 <= found["overall"]["coverage"] <= 1 and found["overall"]["density"] > 0
    # a superclass that has too few
    monkeypatch.setattr(comparison, "LEAST_EQUAL", 10)
    _, found = run(command, tmp_path / "out", *flags)
    assert "at_equal_n" not in found["superclasses"]["cats"] and found["superclasses"]["dogs"]["at_equal_n"]["n"] == 12
    assert any("1 rows have no recall, density and coverage at equal n" in note for note in found["notes"])
