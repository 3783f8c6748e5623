"""Properties of any hierarchy, any order of training and any file of weights. Those of guidance: test_guidance.py."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from helpers.tiny_models import described
from hypothesis import example, given, settings
from hypothesis import strategies as st

from checkpoint.description import ADAPTER, STATE
from checkpoint.format import read_weights, save_safetensors
from dataset.listing import list_files
from hierarchy import Hierarchy, archive
from hierarchy.layouts import RESERVED_NAMES, folder_names
from training.batches import StepBatches

# ---- hierarchies ------------------------------------------------------------------------------------------------------

WORD = st.text("ab_ \r\udce9\u2028\u00e9/:0", max_size=6) | st.text(max_size=12)


@st.composite
def hierarchies(draw):
    count = draw(st.integers(1, 30))
    names = draw(st.lists(WORD, min_size=count, max_size=count, unique=True))
    if draw(st.booleans()):
        names = [f"{i:05d}_{name}" for i, name in enumerate(names)]
    superclasses = draw(st.lists(WORD, min_size=1, max_size=min(count, 8), unique=True))
    rest = st.integers(0, len(superclasses) - 1)
    parents = [*range(len(superclasses)), *draw(st.lists(rest, min_size=count, max_size=count))][:count]
    return Hierarchy(names, superclasses, draw(st.permutations(parents)), draw(WORD))


@given(hierarchies())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_hierarchy_comes_back_as_it_was(h):
    assert h.parents.min() == 0 and h.parents.max() == h.num_super_classes - 1 and len(h.parents) == h.num_classes
    record = h.to_dict()
    for again in (json.loads(json.dumps(record)), archive.unpack_hierarchy(archive.pack_hierarchy(record))):
        assert again == record
        other = Hierarchy.from_dict(again)
        assert other == h and other.name == h.name and other.classes == h.classes and other.parents.equal(h.parents)
    names = record | {"classes": list(h.classes), "parents": [h.superclasses[p] for p in h.parents]}
    assert Hierarchy.from_dict(names) == h
    ranges = {}
    for label in reversed(range(h.num_classes)):  # in any order
        ranges.setdefault(h.superclasses[h.parents[label]], []).append([label, label])
    assert Hierarchy.from_dict(names | {"parents": ranges}) == h


@given(hierarchies(), st.data())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_another_order_of_classes_changes_labels_and_nothing_else(h, data):
    order = data.draw(st.permutations(range(h.num_classes)))
    other = Hierarchy([h.classes[i] for i in order], h.superclasses, h.parents[order], h.name)
    assert other.parents.equal(h.parents[order]) and (other == h) == (list(order) == list(range(h.num_classes)))
    assert archive.unpack_hierarchy(archive.pack_hierarchy(other.to_dict())) == other.to_dict()


LABELLED = (
    st.text("ab/:.-01", max_size=5) | st.sampled_from(RESERVED_NAMES) | WORD
)  # many look like others with a label


@given(st.lists(LABELLED, min_size=1, max_size=12, unique=True))
@example(["a/b", "a:b", "a_b-0"])
@example(["rows", "rows-0", "a", "a/", "rows-0-0"])
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_class_has_a_folder_of_its_own(names):
    folders = folder_names(names)
    assert len(set(folders)) == len(names) and not set(folders) & set(RESERVED_NAMES)
    for label, folder in enumerate(folders):
        assert folder and folder.strip(". ") == folder and not set(folder) & set("/\\:\0")
        assert folder not in names or names[label] == folder  # the name of another class would be read as that class
    plain = ["".join("_" if c in "/\\:\0" else c for c in name).strip(". ") or "_" for name in names]
    for label, (folder, name) in enumerate(zip(folders, plain)):
        earlier = f"{name}-{label}" if plain.count(name) > 1 else name  # as before names were unique for any list
        if earlier not in RESERVED_NAMES and (earlier == name or earlier not in plain):
            assert folder == earlier


FOLDERS = ["cats/10", "cats/9", "cats/Manx", "dogs/manx_2", "dogs/a b", "dogs/\u00e9"]


@given(st.permutations(FOLDERS), st.permutations(FOLDERS))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_folders_in_any_order_are_labelled_by_name(tmp_path_factory, made, classes):
    """In whatever order they were made, and whatever the hierarchy's order of classes."""
    root = tmp_path_factory.mktemp("folders")
    for folder in made:
        (root / folder).mkdir(parents=True)
        for i in (1, 0):
            (root / folder / f"{i}.jpg").touch()
    own = Hierarchy.from_folder(root)
    assert own.classes == tuple(Path(folder).name for folder in sorted(FOLDERS)) and own.superclasses == (
        "cats",
        "dogs",
    )
    for h in (own, Hierarchy([Path(c).name for c in classes], own.superclasses, [int(c > "d") for c in classes])):
        listing = list_files(root, h)
        assert [h.classes[label] for label in listing.labels] == [Path(path).parent.name for path in listing.paths]
        assert listing.labels == sorted([*range(6)] * 2) and sorted(listing.paths) == sorted(
            f"{folder}/{i}.jpg" for folder in FOLDERS for i in (0, 1)
        )


# ---- the order of a training ------------------------------------------------------------------------------------------

SEED = st.integers(0, 2**32 - 1)


@st.composite
def runs(draw):
    """(images, global batch, seed, [(first step of a part, its processes), ...], steps)"""
    batch = draw(st.sampled_from((1, 2, 4, 6, 12, 24)))
    n = draw(st.integers(batch, 200))
    steps = draw(st.integers(1, 3 * (n // batch)))
    starts = sorted({0, *draw(st.lists(st.integers(0, steps - 1), max_size=4))})
    worlds = st.sampled_from([world for world in range(1, batch + 1) if batch % world == 0])
    return n, batch, draw(SEED), [(start, draw(worlds)) for start in starts], steps


@given(runs())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_image_comes_twice_or_is_missed(run):
    """A run may stop at any step and resume on any number of processes: its steps are those of one uninterrupted process.
    Within an epoch each image comes at most once, and as many come as fill whole batches."""
    n, batch, seed, parts, steps = run
    found = []
    for (start, world), end in zip(parts, [*(start for start, _ in parts[1:]), steps]):
        ranks = [StepBatches(n, batch, seed, rank, world, start, end) for rank in range(world)]
        assert {len(rank) for rank in ranks} == {end - start}
        for rows in zip(*ranks, strict=True):
            assert {len(mine) for mine in rows} == {batch // world}
            found.append(sum(rows, []))
    whole = StepBatches(n, batch, seed, max_steps=steps)
    assert found == list(whole) and len(found) == steps
    for epoch in range(0, steps, whole.steps_per_epoch):
        seen = sum(found[epoch : epoch + whole.steps_per_epoch], [])
        assert len(set(seen)) == len(seen) == batch * min(whole.steps_per_epoch, steps - epoch)
        assert set(seen) <= set(range(n)) and (len(seen) == n or n % batch or steps - epoch < whole.steps_per_epoch)


@given(st.integers(1, 300), SEED, st.integers(0, 10**6))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_an_epoch_of_whole_batches_shows_every_image_once(n, seed, epoch):
    whole, single = StepBatches(n, n, seed).rows(epoch).tolist(), StepBatches(n, 1, seed)
    assert sorted(whole) == list(range(n))
    assert [single.rows(epoch * n + k).item() for k in range(n)] == whole  # the order does not depend on the batch size


# ---- files of weights -------------------------------------------------------------------------------------------------

TYPES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool".split()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
FIXED = described(Hierarchy(("manx",), ("cats",), [0]))
FORMS = ({"format": ADAPTER}, {"format": STATE, "data": "abc", "settings": {"lr": 1e-4}, "updates": 7})


@st.composite
def tensors(draw, finite=True):
    """Draw any bits of any type and shape; floating-point numbers are finite unless allowed otherwise."""
    dtype = getattr(torch, draw(st.sampled_from(TYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(SEED))
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        return bits.squeeze(-1) > 127
    tensor = bits.view(dtype).squeeze(-1)
    if finite and dtype.is_floating_point:
        tensor = torch.where(tensor.double().isfinite(), tensor.double(), 0.0).to(dtype)
    return tensor.transpose(0, -1) if len(shape) > 1 else tensor  # not contiguous


NAME = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
RESERVED = {"hierarchy", "__metadata__"}
WEIGHTS = st.dictionaries(NAME.filter(lambda n: n not in RESERVED and not n.startswith(("row/", "exp_avg"))), tensors())
LOSSES = st.dictionaries(NAME.map(lambda name: f"row/{name}"), tensors(finite=False), max_size=2)


@given(WEIGHTS, LOSSES, hierarchies(), st.sampled_from(FORMS))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_file_of_weights_comes_back_bit_for_bit(tmp_path_factory, weights, losses, hierarchy, form):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    description = replace(FIXED, hierarchy=hierarchy, **form)
    save_safetensors(path, weights | losses, description)
    found, again = read_weights(path)
    assert again == description and found.keys() == (weights | losses).keys()
    for name, tensor in (weights | losses).items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
