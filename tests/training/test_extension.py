"""Classes added to an adapter: old classes stay bit for bit, patches chain and merge in any order, mistakes are refused."""

import json

import pytest
import torch
from helpers.commands import call
from helpers.tiny_files import CLASSES, write_adapter, write_images
from helpers.tiny_models import refusal
from helpers.tiny_runs import TINY, differences, outcome

import sample
import train
from checkpoint.description import Base
from checkpoint.format import read_digest, read_weights
from checkpoint.loading import TABLE, load_adapted
from checkpoint.rows import row_keys
from hierarchy import Hierarchy
from runtime.files import sha256
from tools import export, merge

CATS, BIRDS = {"cats": ("ocelot",)}, {"birds": ("wren",), "dogs": ("corgi",)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("extensions")
    for name, classes in {"cats": CATS, "birds": BIRDS, "old": {"cats": ("lynx", "ocelot")}, "same": CLASSES}.items():
        write_images(root / "data" / name, 8, classes)
    write_images(root / "data/moved", 8, {"dogs": ("lynx", "ocelot")})
    return root


@pytest.fixture(scope="module")
def extended(root):
    """extended(name, data, adapter, *flags) -> the adapter after two steps on root/data/<data>."""

    def extended(name, data, adapter, *flags, steps=2):
        if not (root / name).is_dir() or steps != 2:
            start = "--extend", "--resume", adapter, "--data-path", root / f"data/{data}", "--max-steps", steps
            place = "--results-dir", root, "--experiment", name
            result = call(train.main, *TINY, "--table-lr", 0.1, "--log-every", 1, *start, *place, *flags)
            assert result.code == 0, result.err
        return root / name / f"adapters/{steps:07d}.safetensors"

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PREVIEW, "steps", 2)
        yield extended


def rows_of(path):
    """Return the rows of the class table by what they mean."""
    model, description = load_adapted(path)
    return dict(zip(row_keys(description), model.state_dict()[TABLE]))


def test_new_rows_alone_are_trained(extended, adapter):
    path = extended("b", "birds", adapter)
    tensors, description = read_weights(path)
    assert description.base == Base(str(adapter), sha256(adapter)) and description.original_classes == 5
    assert description.hierarchy.classes == ("lynx", "manx", "beagle", "pug", "pug_dog", "wren", "corgi")
    assert description.hierarchy.superclasses == ("cats", "dogs", "birds")
    assert tensors.keys() == {TABLE} and description.patch_rows == [5, 6, 9]
    before, after = rows_of(adapter), rows_of(path)
    assert all(after[key].equal(row) for key, row in before.items())
    assert torch.stack([after[key] for key in after.keys() - before.keys()]).sort(0)[0].equal(tensors[TABLE].sort(0)[0])
    # the first step of AdamW has the size of the learning rate, the average after two steps is 0.75 of the first at least
    dogs = torch.stack([before["class", name] for name in ("beagle", "pug", "pug_dog")]).mean(0)
    tiers = torch.stack([before["superclass", name] for name in ("cats", "dogs")]).mean(0)
    classes = torch.stack([row for (kind, _), row in before.items() if kind == "class"]).mean(0)
    for key, start in {("class", "corgi"): dogs, ("superclass", "birds"): tiers, ("class", "wren"): classes}.items():
        moved = (after[key] - start).abs()
        assert moved.max() < 0.21 and (moved.max() > 0.05 or key[0] == "superclass")
    assert "finediffusion, 768 trained parameters" in (path.parents[1] / "log.txt").read_text()  # 3 rows of 256
    # the model computes the same for all old rows
    x, t = torch.linspace(-2, 2, 7 * 3 * 64).view(7, 3, 8, 8), torch.full((7,), 300)
    old, new = load_adapted(adapter)[0], load_adapted(path)[0]
    with torch.no_grad():
        assert old(x, t, torch.arange(7)).equal(new(x, t, torch.tensor([0, 1, 2, 3, 4, 7, 8])))


def test_samples_of_old_classes_are_the_same_files(extended, adapter, tmp_path):
    path = extended("b", "birds", adapter)
    for name, ckpt in {"old": adapter, "new": path}.items():
        result = call(
            sample.main,
            *("--ckpt", ckpt, "--classes", "lynx", "pug_dog", "--sample-dir", tmp_path / name),
            *("--num-sampling-steps", 3, "--per-class", 2),
        )
        assert result.code == 0, result.err
    files = [
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.png")} for n in ("old", "new")
    ]
    assert files[0] == files[1] and len(files[0]) >= 4
    result = call(sample.main, "--ckpt", path, "--guidance", "autoguidance", "--weak", path)
    assert result.code == 2 and "merge it with tools.merge, or choose another guidance" in result.err
    result = call(
        sample.main, "--ckpt", path, "--classes", "wren", "--sample-dir", tmp_path / "wren", "--num-sampling-steps", 2
    )
    assert result.code == 0, result.err


def test_the_order_of_extensions_does_not_matter(extended, adapter, tmp_path):
    a, b = extended("a", "cats", adapter), extended("b", "birds", adapter)
    ab, ba = extended("ab", "birds", a), extended("ba", "cats", b)
    assert read_weights(ab)[1].patch_rows == [6, 7, 10] and read_weights(ab)[1].original_classes == 5
    found = [rows_of(path) for path in (ab, ba)]
    assert found[0].keys() == found[1].keys() and all(found[0][key].equal(found[1][key]) for key in found[0])
    for i, patches in enumerate([(a, b), (b, a), (ab,), (ba, a)]):
        result = call(merge.main, *patches, "--out", tmp_path / f"{i}.safetensors")
        assert result.code == 0 and "3 rows" not in result.out and "4 rows added" in result.out
    assert len({read_digest(tmp_path / f"{i}.safetensors") for i in range(4)}) == 1
    merged, expected = rows_of(tmp_path / "0.safetensors"), found[0]
    assert merged.keys() == expected.keys() and all(merged[key].equal(expected[key]) for key in expected)
    description = read_weights(tmp_path / "0.safetensors")[1]
    assert description.base == read_weights(adapter)[1].base and not description.patch_rows
    result = call(export.main, "--ckpt", ab, "--format", "finediffusion", "--out", tmp_path / "all.pt")
    assert result.code == 0, result.err
    table = torch.load(tmp_path / "all.pt", weights_only=True)["ema"][TABLE]
    assert table.equal(load_adapted(ab)[0].state_dict()[TABLE]) and len(table) == 8 + 3


def test_an_interrupted_extension_is_the_unbroken_one(extended, adapter, root):
    expected = outcome(root / "b") if extended("b", "birds", adapter) else None
    extended("resumed", "birds", adapter, steps=1)
    (root / "resumed/samples/0000001.png").unlink()
    (root / "resumed/adapters/0000001.safetensors").unlink()
    extended("resumed", "birds", adapter)
    call(
        train.main,
        *(*TINY, "--table-lr", 0.1, "--log-every", 1, "--extend", "--resume", adapter, "--max-steps", 2),
        *("--data-path", root / "data/birds", "--results-dir", root, "--experiment", "resumed"),
    )
    assert not differences(root / "resumed", expected)


def test_all_parameters_of_the_method_can_be_trained(extended, adapter):
    """The old rows are carried over, images of old classes may be among the data, and the base is the adapter's."""
    path = extended("all", "old", adapter, "--train", "all")
    tensors, description = read_weights(path)
    assert description.base == read_weights(adapter)[1].base and not description.patch_rows
    assert tensors.keys() == read_weights(adapter)[0].keys() and description.original_classes == 5
    before, after = rows_of(adapter), rows_of(path)
    moved = {key for key in before if not after[key].equal(before[key])}
    assert ("class", "lynx") in moved and {("class", "manx"), ("class", "pug")}.isdisjoint(moved)
    assert description.hierarchy.classes[-1] == "ocelot" and len(after) == len(before) + 1


def test_dry_run_counts_the_new_rows(adapter, root):
    result = call(
        train.main,
        *(*TINY, "--extend", "--resume", adapter, "--data-path", root / "data/birds", "--experiment", "x", "--dry-run"),
    )
    assert result.code == 0, result.err
    settings = json.loads(result.out)
    assert (settings["num_classes"], settings["num_super_classes"], settings["trainable_params"]) == (7, 3, 3 * 256)


REFUSED = [
    ("--data-path @same", "no class that .* lacks"),
    ("--data-path @old", r"1 classes that .* has already \(lynx\)"),
    ("--data-path @moved --train all", "Class lynx is in superclass dogs here, expected cats"),
    ("--data-path @birds --method full", "--method is full, expected finediffusion"),
    ("--data-path @birds --image-size 16", "--image-size is 16, expected 8"),
    ("--data-path @birds --resume none", "--resume is none, expected the adapter"),
]


@pytest.mark.parametrize("flags, words", REFUSED)
def test_an_extension_that_does_not_fit_is_refused(flags, words, adapter, root):
    flags = [root / f"data/{flag[1:]}" if flag.startswith("@") else flag for flag in flags.split()]
    result = call(
        train.main, *TINY, "--extend", "--resume", adapter, "--results-dir", root, "--experiment", "refused", *flags
    )
    assert result.code == 2 and not (root / "refused").exists()
    with refusal(words):
        raise ValueError(result.err.strip().removeprefix("train.py: "))


def test_a_table_with_a_null_row_is_extended_and_merged_too(extended, base, images, tmp_path):
    """A new superclass then has no row, but a place in the hierarchy."""
    plain = write_adapter(tmp_path / "plain.safetensors", base, Hierarchy.from_folder(images), "bitfit")
    path = extended("plain", "birds", plain)
    result = call(merge.main, path, "--out", tmp_path / "all.safetensors")
    assert result.code == 0 and "2 rows added" in result.out, result.err
    merged, expected = rows_of(tmp_path / "all.safetensors"), rows_of(path)
    assert merged.keys() == expected.keys() and all(merged[key].equal(expected[key]) for key in expected)
    assert read_weights(tmp_path / "all.safetensors")[1].hierarchy.superclasses == ("cats", "dogs", "birds")


def test_patches_that_differ_are_not_merged(extended, adapter, base, images, root, tmp_path):
    a, other = extended("a", "cats", adapter), extended("a2", "cats", adapter, "--global-seed", 1)
    alone = write_adapter(tmp_path / "alone.safetensors", base, Hierarchy.from_folder(images), seed=4)
    foreign = extended("foreign", "birds", alone)
    for patches, words in {
        (a, other): "has another class ocelot than a patch before it",
        (a, foreign): "extends",
        (adapter,): "is not a patch",
    }.items():
        result = call(merge.main, *patches, "--out", tmp_path / "out.safetensors")
        assert result.code == 2 and words in result.err and not (tmp_path / "out.safetensors").exists()
    result = call(merge.main, a, "--out", tmp_path / "out")
    assert result.code == 2 and "expected a name that ends in .safetensors" in result.err
