"""Damage to files on disk is noticed: flipped bits, overwritten ranges, truncation, and swapped files."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers.tiny_latents import NAMES, write_latents
from helpers.tiny_models import THREE_PETS, TinyDiT, awake, refusal, same

from checkpoint.description import ADAPTER, Base, ModelDescription
from checkpoint.format import read_weights, save_adapter, save_safetensors
from checkpoint.loading import build_model, load_adapted, load_base_weights
from dataset import latents
from dataset.latents import LatentData
from evaluation.image_sets import open_set
from evaluation.metrics import Gaussian
from evaluation.saved_statistics import save_statistics
from finetune import METHODS, select
from models import DiT_models
from runtime.files import sha256
from training.state import DECISIVE_FLAGS, check_same_run, latest_valid_state, save_state

ALL, SHORT = 1500, 75
LATENTS = ("moments.npy", "labels.npy", "images.txt", "latents.json")


# ---- ways to damage a file: (bytes, random.Random) -> other bytes ---------------------------------


def flip(content, chance):
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]


def flip_head(content, chance):
    """Flip a bit in the header, which holds names, shapes and descriptions."""
    end = min(len(content), 2000)
    return flip(content[:end], chance) + content[end:]


def cut(content, chance):
    return content[: chance.randrange(len(content))]


def grow(content, chance):
    return content + chance.randbytes(chance.randrange(1, 9))


def insert(content, chance):
    at = chance.randrange(len(content))
    return content[:at] + chance.randbytes(chance.randrange(1, 9)) + content[at:]


def exchange(content, chance):
    """Swap two ranges of the file."""
    length = chance.randrange(1, len(content) // 3)
    a, b = chance.randrange(len(content) // 3), chance.randrange(len(content) // 2, len(content) - length)
    parts = (
        content[:a],
        content[b : b + length],
        content[a + length : b],
        content[a : a + length],
        content[b + length :],
    )
    return b"".join(parts)


def wipe(content, chance):
    """Zero a block, as a file system may do after a crash."""
    at = chance.randrange(len(content))
    return content[:at] + bytes(len(content[at : at + 512])) + content[at + 512 :]


WAYS = (flip, flip_head, cut, grow, insert, exchange, wipe)


def changed(content, chance):
    """Return the damaged bytes and the name of the damage."""
    while True:
        way = chance.choice(WAYS)
        other = way(content, chance)
        if other != content:
            return other, way.__name__


# ---- files and their readers ---------------------------------------------------------------------


@dataclass
class Case:
    """A file, the function that reads it and reports damage as a ValueError with `words`, and other valid files of its kind."""

    path: object
    read: Callable
    words: str
    others: list


def described(model="tiny", **changes):
    about = dict(image_size=64, latent_size=8, channels=4, vae="mse", method="finediffusion", embedder="tiered")
    about |= dict(
        model=model,
        hierarchy=THREE_PETS,
        data="abc",
        settings=dict.fromkeys(DECISIVE_FLAGS) | {"ema_warmup": 0},
        base=None,
        step=7,
    )
    return ModelDescription(**about | changes)


def state(path, seed=0, **changes):
    """Return a random training state of a tiny model."""
    torch.manual_seed(seed)
    model = awake(build_model(described()), seed)
    parameters = select(model, METHODS["finediffusion"])
    optimizer = torch.optim.AdamW(parameters.values())
    for p in parameters.values():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    averages = {name: p * 0.5 for name, p in parameters.items()}
    save_state(path, parameters, {}, averages, optimizer, {"terms": torch.ones(2)}, described(**changes))
    return path


def adapter(path, base):
    model = awake(build_model(described()))
    averages = {name: p.detach() for name, p in select(model, METHODS["finediffusion"]).items()}
    save_adapter(path, averages, model, described(base=Base(str(base), sha256(base))))
    return path


def plain(path, seed=0):
    torch.save(awake(TinyDiT(input_size=8, num_classes=5, num_super_classes=1), seed).state_dict(), path)
    return path


def statistics(path):
    generator = torch.Generator().manual_seed(0)
    gaussian = Gaussian(9, torch.randn(6, generator=generator).double(), torch.eye(6).double())
    everything = {name: gaussian for name in (None, *THREE_PETS.superclasses)}
    save_statistics(path, everything, {"network": {"name": "x"}, "crop": 8}, THREE_PETS)
    return path


def read_statistics(path):
    found = open_set(path)
    return found.record, {name: (g.n, g.mean.tolist(), g.covariance.tolist()) for name, g in found.gaussians.items()}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(DiT_models, "tiny", TinyDiT)


@pytest.fixture
def whole(tiny, tmp_path):
    """Return {kind: Case} of valid files."""
    base, other = plain(tmp_path / "base.pt"), plain(tmp_path / "other.pt", seed=1)
    here, there = tmp_path / "latents", tmp_path / "others"
    write_latents(here)
    write_latents(there, seed=1)
    latents.write_metadata(there, {"images": 4, "chunk": 3}, NAMES[::-1], torch.tensor([0, 1, 2, 2]), ["", ""], [])
    path = adapter(tmp_path / "adapter.safetensors", base)
    # another run's state is valid; its record of the start gives it away
    strangers = dict(
        seed=dict(settings=dict.fromkeys(DECISIVE_FLAGS, 1)), data=dict(data="xyz"), model=dict(image_size=32)
    )
    others = [state(tmp_path / f"{name}.safetensors", 1, **changes) for name, changes in strangers.items()]

    def read_state(path):
        _, tensors, saved = latest_valid_state([path], log=lambda text: None)
        check_same_run(path, saved, described(step=0), allow_changes=False)
        return tensors

    def read_base(path):
        return load_base_weights(Base(str(base), base_hash), "adapter.safetensors", path)[0]

    base_hash = sha256(base)
    cases = {
        "state": Case(state(tmp_path / "7.safetensors"), read_state, "are damaged|was started with", others),
        "adapter": Case(path, load_adapted, "is damaged", []),
        "base": Case(base, read_base, "is not the base of", [other]),
        "statistics": Case(statistics(tmp_path / "s.npz"), read_statistics, "is damaged", []),
    }
    for name in LATENTS:
        words = "is (damaged|of format)"
        cases[name] = Case(here / name, lambda path: LatentData(path.parent).verify(), words, [there / name])
    return cases


# ---- R3 ------------------------------------------------------------------------------------------


@pytest.mark.reliability("R3", "changed files: training states, adapters, their base, cached latents")
def test_a_changed_file_is_noticed(whole, cases, figure):
    del whole["statistics"]
    count, found, missed = cases(SHORT, full=ALL), Counter(), []
    kinds = [*whole, "state", "adapter"]  # training states and adapters twice as often
    chance = random.Random(0)
    for case in whole.values():
        case.read(case.path)
    for trial in range(count):
        kind = kinds[trial % len(kinds)]
        case = whole[kind]
        content = case.path.read_bytes()
        if case.others and chance.random() < 0.1:
            other, way = chance.choice(case.others).read_bytes(), "another file"
        else:
            other, way = changed(content, chance)
        case.path.write_bytes(other)
        try:
            with refusal(case.words):
                case.read(case.path)
            found[way] += 1
        except (Exception, pytest.fail.Exception) as error:
            missed.append((kind, way, trial, repr(error)[:300]))
        case.path.write_bytes(content)
    assert not missed
    figure(f"{found.total():,} of {count:,} detected: " + ", ".join(f"{n} {way}" for way, n in sorted(found.items())))


@pytest.mark.reliability("R3", "a changed training state: the one before it is used")
def test_the_state_before_a_changed_one_is_used(tiny, tmp_path, cases, figure):
    count, chance = cases(15, full=300), random.Random(1)
    newest, before = state(tmp_path / "8.safetensors", seed=1, step=8), state(tmp_path / "7.safetensors")
    content, expected = newest.read_bytes(), read_weights(before)[0]
    for _ in range(count):
        newest.write_bytes(changed(content, chance)[0])
        said = []
        path, tensors, description = latest_valid_state([newest, before], said.append)
        assert path == before and same(tensors, expected) and description.step == 7
        assert (
            len(said) == 1 and "8.safetensors is damaged" in said[0] and said[0].endswith("Using the state before it.")
        )
    figure(f"{count} of {count}")


def test_a_state_of_another_step_is_taken_as_a_whole(tiny, tmp_path):
    """It belongs to the same run and contains its step number, so weights and step always match."""
    paths = [state(tmp_path / f"{step}.safetensors", seed=step, step=step) for step in (7, 8)]
    expected = read_weights(paths[0])[0]
    paths[0].replace(paths[1])
    _, tensors, description = latest_valid_state([paths[1]])
    assert same(tensors, expected) and description.step == 7


# ---- statistics and foreign files: zip archives with a checksum for each member --------------------


def noticed_or_harmless(case, values, count, chance):
    """Return (changes noticed, changes without effect); a zip has fields that nobody reads, such as dates."""
    expected, content, harmless = values(case.path), case.path.read_bytes(), 0
    for _ in range(count):
        other, way = changed(content, chance)
        case.path.write_bytes(other)
        try:
            assert values(case.path) == expected, way
            harmless += 1
        except ValueError as error:
            assert str(case.path) in str(error) and "\n" not in str(error)
    case.path.write_bytes(content)
    return count - harmless, harmless


@pytest.mark.reliability("R3", "changed statistics of evaluate.py (.npz)")
def test_changed_statistics_are_noticed(whole, cases, figure):
    count = cases(30, full=500)
    noticed, harmless = noticed_or_harmless(whole["statistics"], read_statistics, count, random.Random(2))
    figure(f"{noticed} of {count} refused, {harmless} without effect on any value, 0 others")
    assert noticed > count / 2


@pytest.mark.reliability("R3", "changed third-party checkpoints (.pt) without a known hash")
def test_changed_checkpoints_of_others_are_noticed(whole, cases, figure):
    def values(path):
        return {name: tensor.numpy().tobytes() for name, tensor in read_weights(path)[0].items()}

    count = cases(30, full=500)
    noticed, harmless = noticed_or_harmless(whole["base"], values, count, random.Random(3))
    figure(f"{noticed} of {count} refused, {harmless} without effect on any value, 0 others")
    assert noticed > count / 2


# ---- headers that stay valid ---------------------------------------------------------------------


def with_header(content, change):
    """Return a safetensors file with its JSON header changed by `change(header)` and the same data."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = change(content[8:end])
    return len(header).to_bytes(8, "little") + header + content[end:]


VALID = {  # other contents in a header that safetensors accepts
    "dtype": lambda header: header.replace(b'"F32"', b'"I32"', 1),
    "shape": lambda header: header.replace(b'"shape":[5,32]', b'"shape":[32,5]', 1),
    "name": lambda header: header.replace(b"qkv.bias", b"vkq.bias", 1),
    "step": lambda header: header.replace(b'\\"step\\": 7', b'\\"step\\": 8'),
    "path": lambda header: header.replace(b"base.pt", b"best.pt"),
    "format": lambda header: header.replace(b'"format":"pt"', b'"format":"tf"'),
    "more": lambda header: header.replace(b'"format":"pt"', b'"format":"pt","more":"pt"'),
    "less": lambda header: header.replace(b'"format":"pt",', b"").replace(b',"format":"pt"', b""),
    "no hash": lambda header: header.replace(b'"sha256":', b'"sha265":'),
    "no text": lambda header: header.replace(b'"json":', b'"jsno":'),
}
SPELT = {  # the same contents in another spelling
    "spaces": lambda header: header + b" " * 8,
    "line break": lambda header: header.rstrip() + b"\n",
    "escape": lambda header: header.replace(b'"format":"pt"', b'"format":"\\u0070t"'),
    "twice": lambda header: header.replace(b'"format":"pt"', b'"format":"tf","format":"pt"'),
}


@pytest.mark.parametrize("change", VALID.values(), ids=VALID)
def test_another_content_in_a_valid_header_is_noticed(change, whole):
    case = whole["adapter"]
    content = case.path.read_bytes()
    other = with_header(content, change)
    assert other != content
    case.path.write_bytes(other)
    with refusal("adapter.safetensors is damaged"):
        case.read(case.path)


@pytest.mark.parametrize("change", SPELT.values(), ids=SPELT)
def test_the_same_content_may_be_spelt_otherwise(change, whole):
    path = whole["adapter"].path
    content, (tensors, description) = path.read_bytes(), read_weights(path)
    # copied, since the file they are mapped from is overwritten
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    other = with_header(content, change)
    assert other != content
    path.write_bytes(other)
    again, described = read_weights(path)
    assert same(again, tensors) and described == description


def test_tensors_with_exchanged_places_are_noticed(tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"a": torch.zeros(4), "b": torch.ones(4)}, described(format=ADAPTER))
    read_weights(path)
    places = [b'"data_offsets":[0,16]', b'"data_offsets":[16,32]']

    def swap(header):
        assert all(place in header for place in places)
        return header.replace(places[0], b"?").replace(places[1], places[0]).replace(b"?", places[1])

    path.write_bytes(with_header(path.read_bytes(), swap))
    with refusal("a.safetensors is damaged"):
        read_weights(path)
