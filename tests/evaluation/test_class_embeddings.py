"""Class embeddings: the logits of open_clip (tests/golden/open_clip.safetensors), and files that are refused."""

import json
import re
import sys

import pytest
import timm
import torch
from helpers.species import SPECIES
from helpers.tiny_models import PETS, golden, refusal
from safetensors.torch import save_file

from evaluation.class_embeddings import FORMAT, embedding_classifier, read_class_embeddings, save_class_embeddings
from evaluation.networks import match_outputs
from hierarchy import Hierarchy
from runtime.files import sha256
from tools import class_embeddings

TENSORS, RECORD = golden("open_clip")  # a CLIP with random weights, uint8 images, class embeddings and logits
SPEC = "vit_base_patch16_clip_224@32"
INPUT = {
    "mean": RECORD["mean"],
    "std": RECORD["std"],
    "input_size": [3, 32, 32],
    "interpolation": "bicubic",
}


@pytest.fixture
def tower(tmp_path, monkeypatch):
    """The weights of the small image tower, as open_clip saves them; timm makes its model as small."""
    weights = {name.removeprefix("state/"): x for name, x in TENSORS.items() if name.startswith("state/")}
    text = {"token_embedding.weight": torch.zeros(20, 16), "logit_scale": torch.tensor(3.0)}
    save_file({name: x.contiguous() for name, x in (weights | text).items()}, tmp_path / "clip.safetensors")
    sizes = dict(embed_dim=RECORD["width"], depth=RECORD["layers"], num_heads=RECORD["heads"])
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **options | sizes))
    return f"bioclip:{SPEC}={tmp_path / 'clip.safetensors'}"


def save(path, embeddings=TENSORS["embeddings"], **changes):
    record = {"names": list(PETS.classes), "logit_scale": RECORD["logit_scale"], "quick_gelu": False, "input": INPUT}
    save_class_embeddings(path, embeddings, record | changes)
    return path


def test_logits_equal_open_clip(tower, tmp_path):
    path = save(tmp_path / "classes.safetensors")
    network = embedding_classifier(tower, path)
    torch.testing.assert_close(network(TENSORS["images"])["logits"], TENSORS["logits"], atol=1e-5, rtol=0)
    assert network.name == "bioclip" and network.record["class_embeddings"] == sha256(path)
    assert network.record["weights"] == sha256(tmp_path / "clip.safetensors")
    assert TENSORS["logits"].std() > 1
    # its outputs are found by their names
    assert match_outputs(network, 5, PETS).tolist() == [0, 1, 2, 3, 4]
    reverse = Hierarchy(PETS.classes[::-1], PETS.superclasses, PETS.parents.flip(0), "reverse")
    assert match_outputs(network, 5, reverse).tolist() == [4, 3, 2, 1, 0]
    with refusal("classes.safetensors lacks 1 classes", "'wolf'"):
        match_outputs(network, 5, Hierarchy(["wolf", *PETS.classes[1:]], PETS.superclasses, PETS.parents, "wolves"))


def test_the_scaling_is_that_of_the_file(tower, tmp_path):
    path = save(tmp_path / "classes.safetensors", input=INPUT | {"mean": [0.5] * 3, "std": [0.5] * 3})
    found = embedding_classifier(tower, path)(TENSORS["images"])["logits"]
    assert (found - TENSORS["logits"]).abs().max() > 0.1


def test_a_tower_with_random_weights_has_as_many_values_as_the_embeddings(tower, tmp_path):
    network = embedding_classifier(SPEC, save(tmp_path / "classes.safetensors"), random=True)
    logits = network(TENSORS["images"])["logits"]
    assert (
        logits.shape == (3, 5) and logits.abs().max() <= RECORD["logit_scale"] and network.record["weights"] == "random"
    )


BAD = {  # name: (changes of the record, embeddings, words)
    "fewer names": ({"names": ["lynx"]}, TENSORS["embeddings"], "1 names and embeddings (5, 8)"),
    "a name twice": ({"names": ["lynx"] * 5}, TENSORS["embeddings"], "names are not different"),
    "numbers as names": ({"names": [1, 2, 3, 4, 5]}, TENSORS["embeddings"], "names are not different"),
    "no names": ({"names": None}, TENSORS["embeddings"], ""),
    "no scaling": ({"input": {"mean": [0, 0, 0]}}, TENSORS["embeddings"], "scale of the logits or of the input"),
    "NaN": ({}, TENSORS["embeddings"] * torch.nan, "not of length 1"),
    "another length": ({}, 2 * TENSORS["embeddings"], "not of length 1"),
    "another format": ({"format": "finediffusion-adapter-1"}, TENSORS["embeddings"], ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(tmp_path, name):
    changes, embeddings, words = BAD[name]
    path = save(tmp_path / "classes.safetensors", embeddings, **changes)
    with refusal(
        "classes.safetensors is not a file of class embeddings", re.escape(words), "expected one of tools.class_emb"
    ):
        read_class_embeddings(path)


def test_other_files_are_refused(tower, tmp_path):
    path = tmp_path / "classes.safetensors"
    with refusal("There is no file", "classes.safetensors"):
        read_class_embeddings(path)
    path.write_bytes(b"<html>")
    with refusal("is not a file of class embeddings"):
        read_class_embeddings(path)
    save_file({"x": torch.zeros(1)}, path)
    with refusal("is not a file of class embeddings"):
        read_class_embeddings(path)
    # embeddings of another model
    one = torch.nn.functional.normalize(torch.ones(5, 6), dim=1)
    network = embedding_classifier(tower, save(path, one))
    with refusal("has embeddings of 6 values, expected the 8 of the image tower"):
        network(TENSORS["images"])
    save(path, quick_gelu=True)
    with refusal("has QuickGELU, expected the same of bioclip:vit_base_patch16_clip_224@32"):
        embedding_classifier(tower, path)


# ---- the script ----------------------------------------------------------------------------------


def test_texts_of_class_names():
    species = Hierarchy.from_class_names(SPECIES)
    name = species.classes[0]
    rank = " ".join(name.split("_")[1:])
    assert class_embeddings.texts(species, ["a photo of {}.", "{}"])[0] == [f"a photo of {rank}.", rank]
    assert class_embeddings.texts(PETS, ["{}"])[-1] == [PETS.classes[-1].replace("_", " ")]


def test_without_open_clip_the_script_says_what_to_install(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    (tmp_path / "pets.json").write_text(json.dumps(PETS.to_dict()))
    flags = ("--hierarchy", tmp_path / "pets.json", "--model", "ViT-B-32", "--out", tmp_path / "out.safetensors")
    result = command(class_embeddings.main, *flags)
    assert result.code == 2 and "pip install open_clip_torch" in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


def test_the_script_refuses_bad_flags(command, tmp_path):
    flags = ("--hierarchy", "inat2021", "--model", "ViT-B-32", "--out", tmp_path / "out.safetensors")
    result = command(class_embeddings.main, *flags)
    assert result.code == 2 and "numbers" in result.err and "--hierarchy" in result.err
    (tmp_path / "pets.json").write_text(json.dumps(PETS.to_dict()))
    flags = ("--hierarchy", tmp_path / "pets.json", "--out", tmp_path / "out.safetensors")
    for more, words in ((("--template", "a photo"), "a photo"), (("--batch-size", 0), "--batch-size is 0")):
        result = command(class_embeddings.main, *flags, *more)
        assert result.code == 2 and words in result.err and result.err.count("\n") == 1


def test_the_script_makes_the_embeddings_of_open_clip(command, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    (tmp_path / "pets.json").write_text(json.dumps(PETS.to_dict()))
    path = tmp_path / "pets.safetensors"
    torch.manual_seed(0)
    flags = ("--hierarchy", tmp_path / "pets.json", "--model", "ViT-B-32", "--template", "a {}", "--out", path)
    result = command(class_embeddings.main, *flags)
    assert result.code == 0, result.err
    found, record = read_class_embeddings(path)
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32").eval()
    tokens = open_clip.get_tokenizer("ViT-B-32")([f"a {name.replace('_', ' ')}" for name in PETS.classes])
    with torch.no_grad():
        expected = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert record["names"] == list(PETS.classes) and record["format"] == FORMAT
    assert record["logit_scale"] == pytest.approx(model.logit_scale.exp().item())
