"""Names of iNaturalist's species: read from an annotation file into a cache, and found by every command."""

import hashlib
import io
import json
import shutil
import tarfile

import pytest
import torch
from helpers.species import SPECIES
from helpers.tiny_files import random_dit
from helpers.tiny_models import ROOT

import sample
from checkpoint import download
from hierarchy import Hierarchy, names
from hierarchy import hierarchy as hierarchy_module
from hierarchy.layouts import INAT_RANKS
from tools import names as tool

COMMON = {7: "Red Fox", 6: "Arctic Fox", 5: "Common Raven", 11: ""}


def categories(folders=SPECIES):
    """The categories of an annotation file, in another order than their labels."""
    found = []
    for label, folder in enumerate(folders):
        ranks = dict(zip((*INAT_RANKS[1:-1], "specific_epithet"), folder.split("_")[1:]))
        found.append({"id": label, "image_dir_name": folder, "common_name": COMMON.get(label, "X"), **ranks})
    return found[::-1]


def write_annotations(path, record):
    content = json.dumps(record).encode()
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("val.json")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def small(tmp_path, monkeypatch):
    """iNaturalist with 12 classes as the built-in hierarchy, and an empty cache -> its annotation file."""
    built_in = json.loads((hierarchy_module.BUILT_IN / "inat2021.json").read_text())
    built_in["parents"] = Hierarchy.from_class_names(SPECIES).parents.tolist()
    (tmp_path / "built-in").mkdir()
    (tmp_path / "built-in/inat2021.json").write_text(json.dumps(built_in))
    monkeypatch.setattr(hierarchy_module, "BUILT_IN", tmp_path / "built-in")
    monkeypatch.setenv("FINEDIFFUSION_CACHE", str(tmp_path / "cache"))
    return write_annotations(tmp_path / "val.json.tar.gz", {"categories": categories(), "images": []})


def store(command, *flags):
    result = command(tool.main, "inat2021", *flags)
    assert result.code == 0, result.err
    return result.out


def test_names_are_stored_and_found(small, command, tmp_path):
    h = Hierarchy.load("inat2021")
    digest = h.digest()
    with pytest.raises(ValueError, match="for names run python -m tools.names inat2021 once"):
        h.find("red fox")
    out = store(command, "--file", small)
    assert out == f"names of 12 species, 11 with a common name, in {tmp_path / 'cache/inat2021.json'}\n"
    assert names.full_names(h) == tuple(SPECIES) and h.classes[7] == "00007" and h.digest() == digest
    for query, label in (("Vulpes vulpes", 7), ("red fox", 7), ("raven", 5), ("bellis", 11), ("Fungi", 10), ("7", 7)):
        assert h.find(query) == label
    for query, words in (
        ("fox", r"fits 2 classes of inat2021 \('Vulpes lagopus \(Arctic Fox\)', 'Vulpes vulpes \(Red Fox\)'\)"),
        ("Vulpes", "fits 2 classes"),
        ("red fax", r"the nearest are 'Vulpes vulpes \(Red Fox\)'"),
    ):
        with pytest.raises(ValueError, match=words):
            h.find(query)
    # a hierarchy with iNaturalist's names, of all or of some classes, gets the common ones
    some = Hierarchy.from_class_names(SPECIES[5:8])
    assert some.find("Red Fox") == 2 and names.titles(some)[0] == "Corvus corax (Common Raven)"
    # other hierarchies have their own names alone
    assert names.all_names(Hierarchy.plain(("a", "b"), "x")) == [("a",), ("b",)]


def test_the_downloaded_file_is_checked(small, command, monkeypatch, tmp_path):
    monkeypatch.setattr(tool, "download_file", lambda url, path, **more: shutil.copy(small, path))
    result = command(tool.main, "inat2021")
    assert result.code == 2 and "has the MD5" in result.err and not names.cache_path().exists()
    monkeypatch.setattr(tool, "MD5", hashlib.md5(small.read_bytes()).hexdigest())
    assert "12 species" in store(command)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path.write_text("<html>"), "is not an annotation file"),
        (lambda path: write_annotations(path, {"images": []}), "is not an annotation file"),
        (
            lambda path: write_annotations(path, {"categories": categories(SPECIES[:5])}),
            "has 5 categories, expected the 12",
        ),
        (lambda path: write_annotations(path, {"categories": [{"id": 0}]}), "categories lack"),
        (lambda path: None, "other.tar.gz"),
    ],
)
def test_other_files_are_refused(make, words, small, command, tmp_path):
    make(tmp_path / "other.tar.gz")
    result = command(tool.main, "inat2021", "--file", tmp_path / "other.tar.gz")
    assert result.code == 2 and words in result.err and not names.cache_path().exists()


def test_a_damaged_cache_is_one_sentence(small, command):
    names.cache_path().parent.mkdir()
    names.cache_path().write_text('["a", 1]')
    result = command(sample.main, "--list", "fox", "--num-classes", 12, "--hierarchy", "inat2021")
    assert result.code == 2 and result.err.endswith("run python -m tools.names inat2021 again.\n")


# ---- sample.py -----------------------------------------------------------------------------------


def test_list_prints_the_matching_classes(small, command, images, adapter):
    inat = "--hierarchy", "inat2021"
    result = command(sample.main, "--list", "fox", *inat)
    assert result.code == 2 and "run python -m tools.names inat2021 once" in result.err
    store(command, "--file", small)
    result = command(sample.main, "--list", "FOX", *inat)
    assert result.out == "    6  Vulpes lagopus (Arctic Fox)  [Mammals]\n    7  Vulpes vulpes (Red Fox)  [Mammals]\n"
    assert len(command(sample.main, "--list", "Chordata", *inat).out.splitlines()) == 6
    assert command(sample.main, "--list", "pug", "--ckpt", adapter).out.startswith("    3  pug  [dogs]\n")
    result = command(sample.main, "--list", "wolf", "--ckpt", adapter)
    assert result.code == 2 and "No class 'wolf': pets has names such as 'lynx'" in result.err


def test_a_checkpoint_with_numbers_is_sampled_by_name(small, command, tmp_path):
    store(command, "--file", small)
    parents = Hierarchy.load("inat2021").parents.tolist()
    sizes = dict(input_size=8, in_channels=3, num_classes=12, num_super_classes=11, parents=parents)
    torch.save(random_dit(1, affine=True, **sizes), tmp_path / "released.pt")
    flags = (
        "--model DiT-Ti/2 --vae none --image-size 8 --hierarchy inat2021 --preset fast --num-sampling-steps 2".split()
    )
    flags += ["--ckpt", tmp_path / "released.pt", "--sample-dir", tmp_path / "samples"]
    result = command(sample.main, *flags, "--classes", "Vulpes vulpes", "common raven")
    assert result.code == 0, result.err
    found = {path.parent.name for path in (tmp_path / "samples").glob("*/*.png")}
    assert found == {"00007", "00005"}


@pytest.mark.parametrize("name", download.RELEASED)
def test_a_missing_released_checkpoint_says_where_to_get_it(name, command):
    result = command(sample.main, "--ckpt", f"models/{name}")
    link = download.RELEASED[name]
    assert result.code == 2 and f"download it from {link} to this path.\n" in result.err


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", ("ddpm", 250, 4.0)),
        ("--preset paper", ("ddpm", 250, 4.0)),
        ("--preset fast", ("unipc", 20, 4.0)),
        ("--num-sampling-steps 9 --preset fast --cfg-scale 2", ("unipc", 9, 2.0)),
        ("--preset fast --sampler ddim", ("ddim", 20, 4.0)),
    ],
)
def test_presets_are_defaults(flags, expected, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sample.py", *flags.split()])
    args = sample.parse_args()
    assert (args.sampler, args.num_sampling_steps, args.cfg_scale) == expected


def test_the_links_are_those_of_the_paper_tables():
    released = json.loads((ROOT / "tools/figures/paper.json").read_text())["released"]
    assert {each["url"] for each in released} == set(download.RELEASED.values())
