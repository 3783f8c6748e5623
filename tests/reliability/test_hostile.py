"""Malicious files: no code runs, memory stays bounded, and each file is refused in one sentence."""

import ast
import ctypes
import gc
import json
import os
import pickle
import re
import resource

import pytest
import torch
from helpers.hostile_files import READERS, Call, Trap, deflated, wrapped
from helpers.tiny_files import random_dit
from helpers.tiny_models import SOURCES, same

import autoencoder
from checkpoint.download import DIT_URL
from checkpoint.format import read_weights
from checkpoint.loading import DiT_models, load_adapted, load_weights
from evaluation.weights import PUBLISHED, load_strictly
from hierarchy import Hierarchy, archive
from hierarchy.layouts import folder_names

BOUND = 256  # MB that reading a file may add to the memory of the process


# ---- R4 ------------------------------------------------------------------------------------------


def forked(read, path):
    """Return the MB that `read(path)` took and its result, measured in a process of its own."""
    gc.collect()  # otherwise memory that was freed but not returned would hide the growth
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    here, there = os.pipe()
    child = os.fork()
    if not child:
        before, outcome = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "read"
        try:
            read(path)
        except ValueError as error:
            outcome = f"refused: {error}"
        except BaseException as error:
            outcome = repr(error)
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(there, json.dumps([taken, outcome[:2000]]).encode())
        os._exit(0)
    os.close(there)
    with os.fdopen(here) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text)


@pytest.mark.reliability("R4", "malicious files: run, filling memory, or read")
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_run_and_nothing_inflates(tmp_path, cases, figure):
    results = {}
    every = [(read, name, write) for read, files in READERS for name, write in files.items()]
    for number, (read, name, write) in enumerate(every[:: cases(3, full=1)]):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        write(folder / name, Trap(folder / "sprung"))
        taken, outcome = forked(read, folder / name)
        results[name, number] = taken
        assert not (folder / "sprung").exists(), name
        assert outcome.startswith("refused: ") and "\n" not in outcome, (name, outcome)
        assert taken < BOUND, (name, taken)
    most = max(results, key=results.get)
    figure(f"{len(results)} files: 0 run, 0 read, at most {results[most]:.0f} MB taken ({most[0]}), bound {BOUND} MB")


def test_the_traps_would_have_worked(tmp_path):
    """Control: without the precautions, code runs and memory fills."""
    pickle.loads(pickle.dumps(wrapped(Trap(tmp_path / "sprung"))))
    assert (tmp_path / "sprung").exists()
    deflated(tmp_path / "deflated.pt", None)
    torch.save({"a": Call(bytearray, 10**8)}, tmp_path / "memory.pt")
    for name in ("deflated.pt", "memory.pt"):
        taken, outcome = forked(lambda path: torch.load(path, weights_only=True), tmp_path / name)
        assert outcome == "read" and taken > 90


@pytest.mark.reliability("R4", "the files of DiT and FineDiffusion are read")
def test_files_in_the_official_forms_are_read(base, official, adapter, tmp_path, figure):
    for path in (base, official):
        record = torch.load(path, weights_only=False)
        expected = record.get("ema", record)
        assert same(read_weights(path)[0], expected)
        torch.save(record, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
        assert same(read_weights(tmp_path / "legacy.pt")[0], expected)
    load_adapted(adapter)
    figure("4 of 4: plain and with model, ema, opt and args; zip and legacy")


# ---- names in files ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_weights_that_are_no_floats(dtype, tmp_path):
    sizes = dict(input_size=8, in_channels=3, num_classes=2)
    weights = random_dit(**sizes)
    weights["final_layer.linear.weight"] = weights["final_layer.linear.weight"].to(dtype)
    torch.save(weights, tmp_path / "dit.pt")
    model = DiT_models["DiT-Ti/2"](**sizes)
    before = model.state_dict()["final_layer.linear.weight"].clone()
    with pytest.raises(ValueError, match=f"not floating-point final_layer.linear.weight {dtype}"):
        load_weights(model, read_weights(tmp_path / "dit.pt")[0], "dit.pt")
    assert model.state_dict()["final_layer.linear.weight"].equal(before)
    network = torch.nn.Linear(2, 2)
    tensors = network.state_dict() | {"weight": torch.ones(2, 2).to(dtype)}
    with pytest.raises(ValueError, match=f"x.pt has weight of {dtype}"):
        load_strictly(network, tensors, "x.pt", "a network")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_other_floats(dtype, tmp_path):
    sizes = dict(input_size=8, in_channels=3, num_classes=2)
    weights = {name: t.to(dtype) for name, t in random_dit(**sizes).items()}
    torch.save(weights, tmp_path / "dit.pt")
    model = DiT_models["DiT-Ti/2"](**sizes)
    load_weights(model, read_weights(tmp_path / "dit.pt")[0], "dit.pt")
    assert all(model.state_dict()[name].equal(weights[name].float()) for name in weights)


def test_an_adapter_cannot_have_its_autoencoder_downloaded(tmp_path, monkeypatch):
    """Of names that are not folders, only the two published ones are downloaded."""
    from diffusers import AutoencoderKL

    asked = []

    def load_config(name, revision):
        asked.append((name, revision))
        raise OSError("not here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoencoderKL, "load_config", load_config)
    for name in ("someone/vae", "https://example.org/vae", "/nowhere", "..\x1b[2J", "ema/../x"):
        with pytest.raises(ValueError, match="pass such a folder as --vae"):
            autoencoder.load_autoencoder(name)
    assert not asked
    for name in ("ema", "mse"):
        with pytest.raises(ValueError, match="not here"):
            autoencoder.load_autoencoder(name)
    assert [name for name, _ in asked] == ["stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse"]
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for _, commit in asked)


NAMES = [
    "..",
    ".",
    "",
    "/etc/passwd",
    "../../x",
    "a/b",
    "a\\b",
    "a\0b",
    " . ",
    "C:",
    "~",
    "$(x)",
    "a\nb",
    "-rf",
    "con.",
]


def test_names_of_classes_stay_in_their_folder(tmp_path):
    folders = folder_names(NAMES)
    assert len(set(folders)) == len(NAMES)
    for name in folders:
        path = tmp_path / name
        path.mkdir()
        assert path.resolve().parent == tmp_path.resolve() and name.strip(". ") == name
    archive.unpack_hierarchy(archive.pack_hierarchy(Hierarchy(NAMES, ("a",), [0] * len(NAMES)).to_dict()))


# ---- promises about the sources ------------------------------------------------------------------

PLACES = {  # calls that are allowed in these files only
    "torch.load": {"torch_files.py"},
    "torch.save": {"export.py", "features.py"},  # foreign formats; in memory, for torch-fidelity to read
    "torch.jit.load": {"named_networks.py"},  # a program that the user names explicitly
    "urllib.request.urlopen": {"download.py"},
}
NEVER = re.compile(
    r"(c?[pP]ickle|dill|joblib|marshal|shelve|cloudpickle)\.(dumps?|loads?|Pickler|Unpickler|open)|"
    r"eval|exec|compile|__import__|os\.(system|popen|exec\w+|spawn\w+)|subprocess\.get\w+|commands\.\w+|"
    r"(torch\.)?hub\.(load|download)\w*|yaml\.(load|unsafe_load)|\w*\.?urlretrieve"
)
IMPORTED = {"torch", "pickle", "subprocess", "os", "urllib.request", "torch.hub", "numpy"}  # called by their full names


def calls():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path, node, ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}


def test_no_pickle_is_written_or_trusted_and_no_text_is_run():
    places = {name: set() for name in PLACES}
    for path, node, name, options in calls():
        where = f"{path.name}:{node.lineno}"
        assert not NEVER.fullmatch(name), where
        if name in places:
            places[name].add(path.name)
        assert name != "torch.load" or options.get("weights_only") == "True", where
        assert options.get("allow_pickle", "False") == "False" and options.get("shell", "False") == "False", where
        assert options.get("pretrained", "False") == "False", where
        if name.startswith("subprocess."):
            assert isinstance(node.args[0], ast.List), where  # a list of words, not a shell command
    assert places == PLACES
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in IMPORTED:
                names = {alias.name for alias in node.names}
                dangerous = {
                    "save",
                    "load",
                    "loads",
                    "dump",
                    "dumps",
                    "system",
                    "popen",
                    "urlopen",
                    "urlretrieve",
                    "jit",
                    "hub",
                }
                assert not names & (dangerous | {"run", "Popen", "call", "check_output"}), path


def test_every_address_is_encrypted():
    own = r"(?!\{host\})"  # the address of tools.browse itself
    found = [path.name for path in SOURCES if re.search(r"\b(http|ftp)://" + own, path.read_text())]
    assert not found
    assert DIT_URL.startswith("https://")
    assert all(names[0].startswith("https://") for names in PUBLISHED.values())
