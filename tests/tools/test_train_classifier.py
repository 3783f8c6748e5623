"""tools.train_classifier and tools.filter_images: training resumes exactly, scores, the files that evaluate.py reads."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.image_sets import CornerReader
from helpers.launch import launch, worst
from helpers.refusals import ROW, refused
from helpers.tiny_files import CLASSES, tree
from PIL import Image
from safetensors.torch import load_file

from dataset.images import read_crop
from evaluation.named_networks import named_network
from evaluation.networks import match_outputs
from hierarchy import Hierarchy
from tools import filter_images, train_classifier
from tools.classifier import training
from tools.classifier.data import LabelledImages, StepRows, TrainingCrops, open_images
from tools.classifier.scores import score, text_report

NAMES = [name for names in CLASSES.values() for name in names]
TINY = "--model test_vit --input-size 32 --image-size 16 --batch-size 4 --num-workers 0 --lr 1e-3".split()


def write_colours(root, each, seed):
    """Images of 16 pixels; the red of a class's images is about 50 times its label."""
    noise = np.random.default_rng(seed)
    for superclass, names in CLASSES.items():
        for name in names:
            folder = root / superclass / name
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = noise.integers(0, 256, (16, 16, 3))
                pixels[..., 0] = 50 * NAMES.index(name) + noise.integers(0, 9)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Folders `real` (3 images of each of 5 classes), `made` (4) and `test` (2)."""
    root = tmp_path_factory.mktemp("colours")
    for seed, (name, each) in enumerate({"real": 3, "made": 4, "test": 2}.items()):
        write_colours(root / name, each, seed)
    return root


@pytest.fixture
def train(command, tmp_path):
    """train(name, *flags) -> code, out, err; 6 steps to tmp_path/name.safetensors unless flags say otherwise."""

    def train(name, *flags):
        out = tmp_path / f"{name}.safetensors"
        return command(train_classifier.main, *TINY, "--max-steps", 6, "--save-every", 2, "--out", out, *flags)

    return train


def same_weights(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


# ---- training ------------------------------------------------------------------------------------


def test_the_classification_accuracy_score(train, colours, tmp_path):
    """Trained on generated images, tried on real ones; then evaluate.py's loading gives the same logits."""
    flags = "--generated", colours / "made", "--test", colours / "test", "--max-steps", 40, "--batch-size", 10
    result = train("cas", *flags)
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "cas.scores.json").read_text())
    assert report["overall"]["n"] == 10 and report["overall"]["top1"] >= 0.8  # by chance 0.2
    assert list(report["superclasses"]) == list(CLASSES) and list(report["classes"]) == NAMES
    assert report["generated"] == [str(colours / "made")] and report["real"] == []
    text = (tmp_path / "cas.scores.md").read_text()
    assert text.startswith("# Classification accuracy score of test_vit\n") and "| pug_dog | 2 |" in text
    spec = f"test_vit@32={tmp_path}/cas.safetensors"
    assert f"--classifier {spec}" in result.out and "classification accuracy score on 10 images" in result.out

    network = named_network(spec, "logits")
    hierarchy = Hierarchy.from_folder(colours / "test")
    assert match_outputs(network, 5, hierarchy).tolist() == [0, 1, 2, 3, 4]
    test = open_images([str(colours / "test")], hierarchy)
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in test.paths])
    found = network(pixels)["logits"].argmax(1).numpy()
    assert (found == test.labels).mean() == report["overall"]["top1"]
    again = train("cas", *flags)  # complete: nothing is trained again
    assert again.code == 0 and again.out == result.out and "training" not in again.err


@pytest.mark.parametrize("model", ["test_vit", "test_efficientnet"])  # without and with running statistics
def test_a_stopped_training_resumes_exactly(model, train, colours, tmp_path, monkeypatch):
    flags = "--real", colours / "real", "--model", model, "--balance"
    assert train("complete", *flags).code == 0
    save, crops = training.save, []

    def stop(path, tensors, step, settings):
        save(path, tensors, step, settings)
        raise ValueError(f"stopped at {step}.")

    monkeypatch.setattr(training, "save", stop)
    assert train("stopped", *flags).code == 2 and not (tmp_path / "stopped.safetensors").exists()
    monkeypatch.setattr(training, "save", save)
    state = tmp_path / "stopped.state.safetensors"
    intact = state.read_bytes()
    state.write_bytes(intact[:-40])
    refused(train("stopped", *flags), "stopped.state.safetensors is damaged", "remove it")
    state.write_bytes(intact)
    real = TrainingCrops.__getitem__
    monkeypatch.setattr(TrainingCrops, "__getitem__", lambda self, item: crops.append(item[0]) or real(self, item))
    result = train("stopped", *flags)
    assert result.code == 0 and "resuming after step 2 of 6" in result.out and set(crops) == {2, 3, 4, 5}
    assert same_weights(tmp_path / "stopped.safetensors", tmp_path / "complete.safetensors")
    assert sorted(path.name for path in tmp_path.glob("stopped*")) == ["stopped.classes.txt", "stopped.safetensors"]


def test_two_processes_train_the_same_classifier(train, colours, tmp_path):
    flags = "--real", colours / "real", "--generated", colours / "made", "--test", colours / "test"
    assert train("one", *flags).code == 0
    more = [*TINY, "--max-steps", 6, "--out", tmp_path / "two.safetensors", *flags]
    assert worst(launch(train_classifier.main, more, tmp_path, 2)) == 0
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    one, two = (json.loads((tmp_path / f"{name}.scores.json").read_text()) for name in ("one", "two"))
    assert one["overall"] == two["overall"] and one["training"] == two["training"]


def test_weights_of_other_classes_to_start_from(train, colours, tmp_path):
    assert train("first", "--real", colours / "real").code == 0
    shutil.copytree(colours / "real/cats", tmp_path / "cats/cats")
    flags = "--real", tmp_path / "cats", "--weights", tmp_path / "first.safetensors", "--lr", 1e-12
    assert train("second", *flags).code == 0
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("first", "second"))
    assert second["head.weight"].shape[0] == 2
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first if "head" not in name)


# ---- rows and crops ------------------------------------------------------------------------------


def test_rows_of_steps():
    labels = np.array([0] * 7 + [2] * 2 + [5])
    rows = [row for batch in StepRows(labels, 4, 5, seed=1) for _, _, row in batch]
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10)) and rows[:10] != rows[10:20]
    balanced = [row for batch in StepRows(labels, 6, 7, seed=1, balance=True) for _, _, row in batch]
    assert np.bincount(labels[balanced]).tolist() == [14, 0, 14, 0, 0, 14]  # classes equally often
    assert np.bincount(balanced).tolist() == [2] * 7 + [7, 7, 14]  # and each class's images in turn
    for balance in (False, True):  # shares of processes, and a later start
        everything = list(StepRows(labels, 4, 5, 1, balance))
        shares = [list(StepRows(labels, 4, 5, 1, balance, 2, rank, 2)) for rank in range(2)]
        assert [sorted(a + b) for a, b in zip(*shares)] == everything[2:]


def test_random_crops(colours):
    images = open_images([str(colours / "real")], Hierarchy.from_folder(colours / "real"))
    centre = np.array(read_crop(images.paths[3], 16))
    alone, label = TrainingCrops(images, 16, 16, 1.0, False, 0)[0, 0, 3]
    assert np.array_equal(alone.permute(1, 2, 0).numpy(), centre) and label == images.labels[3]
    crops = TrainingCrops(images, 16, 16, 0.3, True, 0)
    several = [crops[step, 0, 3][0] for step in range(6)]
    assert all(x.shape == (3, 16, 16) and x.dtype == torch.uint8 for x in several)
    assert len({x.numpy().tobytes() for x in several}) == 6 and crops[2, 0, 3][0].equal(several[2])
    flips = TrainingCrops(images, 16, 16, 1.0, True, 0)
    mirrored = [flips[step, 1, 3][0].equal(alone.flip(2)) for step in range(60)]
    assert 15 < sum(mirrored) < 45 and all(
        flips[step, 1, 3][0].equal(alone) for step in range(60) if not mirrored[step]
    )


# ---- scores --------------------------------------------------------------------------------------


def test_scores_of_known_predictions():
    hierarchy = Hierarchy(("lynx", "manx", "beagle", "pug"), ("cats", "dogs"), [0, 0, 1, 1])
    found = np.array([[0, 1], [1, 0], [3, 2], [2, 3], [0, 3], [1, 0]])
    report = score(found, np.array([0, 0, 0, 2, 3, 3]), hierarchy)
    assert report["overall"] == {"n": 6, "top1": 2 / 6, "top5": 4 / 6, "superclass": 3 / 6}
    assert report["classes"]["lynx"] == {"n": 3, "top1": 1 / 3, "top5": 2 / 3, "superclass": 2 / 3, "mistaken": "manx"}
    assert report["classes"]["beagle"]["mistaken"] is None and "manx" not in report["classes"]
    assert report["superclasses"]["dogs"] == {"n": 3, "top1": 1 / 3, "top5": 2 / 3, "superclass": 1 / 3}
    plain = score(found, np.array([0, 0, 0, 2, 3, 3]), Hierarchy.plain(hierarchy.classes, "plain"))
    assert "superclasses" not in plain and "superclass" not in plain["overall"]
    table = text_report(report, "A title").splitlines()
    assert table[:5] == [
        "# A title",
        "",
        "|  | images | top-1, % | top-5, % | right superclass, % |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| **all images** | 6 | 33.3 | 66.7 | 50.0 |",
    ]
    assert "| lynx | 3 | 33.3 | 66.7 | 66.7 | manx |" in table


# ---- filter --------------------------------------------------------------------------------------


def test_a_filter_lists_the_images_of_their_class(command, train, colours, tmp_path):
    """CornerReader takes an image for the class 4 - red / 50, so of our colours only class 2 is right; kept.json trains."""
    torch.jit.script(CornerReader()).save(tmp_path / "reader.pt")
    before, out = tree(colours), tmp_path / "kept.json"
    flags = "--images", colours / "made", "--classifier", tmp_path / "reader.pt", "--image-size", 16, "--num-workers", 0
    result = command(filter_images.main, *flags, "--min-confidence", 0.3, "--out", out)
    assert result.code == 0, result.err
    assert result.out == f"{out}: 4 of 20 images kept (20%), the fewest of lynx: 0 of 4\n"
    kept = json.loads(out.read_text())
    assert kept["images"] == [f"dogs/beagle/{i}.png" for i in range(4)] and tree(colours) == before
    images = open_images([str(colours / "real"), str(out)], Hierarchy.from_folder(colours / "real"))
    assert images.counts(5).tolist() == [3, 3, 7, 3, 3]
    assert train("kept", "--real", colours / "real", "--generated", out).code == 0
    assert command(filter_images.main, *flags, "--top-k", 5, "--out", out).code == 0
    assert len(json.loads(out.read_text())["images"]) == 20


def test_the_choice_of_the_filter():
    confidence, place = np.array([0.9, 0.3, 0.05, 0.2]), np.array([0, 1, 3, 0])
    assert filter_images.choose(confidence, place, 2, None).tolist() == [True, True, False, True]
    assert filter_images.choose(confidence, place, None, 0.2).tolist() == [True, True, False, True]
    assert filter_images.choose(confidence, place, 1, 0.25).tolist() == [True, False, False, False]


def test_confidence_and_place_of_classes_by_name(colours):
    """A classifier with its classes in another order, and one more."""
    hierarchy = Hierarchy.from_folder(colours / "real")
    order = ["wolf", *reversed(NAMES)]
    logits = torch.tensor([[0.0, 1, 2, 3, 4, 5]])

    class Fixed:
        classes, classes_file, name = order, None, "fixed"

        def __call__(self, images):
            return {"logits": logits.expand(len(images), -1)}

    images = LabelledImages(open_images([str(colours / "real")], hierarchy).paths[:2], np.array([0, 4]), "")
    args = SimpleNamespace(image_size=16, batch_size=2, num_workers=0)
    confidence, place = filter_images.judge(Fixed(), images, hierarchy, args, "cpu")
    shares = logits[0].double().softmax(0)
    assert place.tolist() == [0, 4] and np.allclose(confidence, [shares[5], shares[1]])


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.reliability(*ROW)
@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "There are no images to train on, expected --real, --generated or both"),
        ("--real nowhere", "nowhere"),
        ("--real REAL --test REAL", "which is trained on too"),
        ("--real REAL --test REAL/../real", "which is trained on too"),
        ("--real REAL --model resnet999", "--model is resnet999, expected a model of timm"),
        ("--real REAL --out x.pt", "--out is x.pt, expected a name that ends in .safetensors"),
        ("--real REAL --lr 0", "--lr is 0.0, expected a finite number above 0."),
        ("--real REAL --crop 0", "--crop is 0.0, expected 0.01 to 1."),
        ("--real REAL --max-steps 0", "--max-steps is 0"),
        ("--real REAL --weights nowhere.pt", "nowhere.pt"),
        ("--real REAL --hierarchy inat2021", "class folders that inat2021 lacks"),
        ("--generated kept.json --real REAL", "kept.json"),
        ("--real REAL/cats --hierarchy REAL", "3 of 5 classes have no image to train on ('beagle', 'pug', 'pug_dog')"),
    ],
)
def test_bad_flags(flags, words, train, colours, tmp_path):
    before = tree(tmp_path)
    refused(train("x", *flags.replace("REAL", str(colours / "real")).split()), words)
    assert tree(tmp_path) == before


@pytest.mark.reliability(*ROW)
def test_bad_files_and_other_settings(train, command, colours, tmp_path):
    real = "--real", colours / "real"
    assert train("x", *real).code == 0
    before = tree(tmp_path)
    refused(
        train("x", *real, "--seed", 1), "x.safetensors was made with other settings (seed 0, here 1): choose another"
    )
    (tmp_path / "list.json").write_text('{"format": "other", "folder": "x", "images": []}')
    refused(
        train("y", *real, "--generated", tmp_path / "list.json"), "list.json is not a list of images (its format is"
    )
    record = {"format": "finediffusion-kept-images-1", "folder": str(colours / "made"), "images": ["cats/lynx/9.png"]}
    (tmp_path / "list.json").write_text(json.dumps(record))
    refused(
        train("y", *real, "--generated", tmp_path / "list.json"), "names 1 images that", "lacks ('cats/lynx/9.png')"
    )
    (tmp_path / "list.json").unlink()
    assert tree(tmp_path) == before
    (tmp_path / "x.safetensors").write_bytes(b"0" * 99)
    refused(train("x", *real), "x.safetensors is damaged or no classifier (")
    shutil.copytree(colours / "test", tmp_path / "linked")
    (tmp_path / "linked/cats/lynx/7.png").symlink_to(colours / "real/cats/lynx/0.png")
    refused(train("z", *real, "--test", tmp_path / "linked"), "1 images of --test are trained on too")
    refused(train("z", *real, "--lr", 1e30), "The loss is nan at step 1, expected a finite one: lower --lr.")
    keep = "--images", colours / "made", "--classifier", "x.pt", "--out"
    refused(command(filter_images.main, *keep, "kept.json"), "Nothing says which images to keep")
    refused(
        command(filter_images.main, *keep, "kept.txt", "--top-k", 1), "--out is kept.txt, expected a name that ends in"
    )
