"""Class rows are carried over by what they mean, and all others are drawn."""

from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import PETS, TinyDiT, awake, described, golden, refusal

from checkpoint.description import Base
from checkpoint.format import save_adapter
from checkpoint.loading import TABLE, build_model, init_from
from checkpoint.rows import match_rows, row_keys
from hierarchy import Hierarchy
from models import DiT_models
from runtime.files import sha256

NAMES, TIERS, PARENTS = PETS.classes, PETS.superclasses, PETS.parents.tolist()
NUMBERS = tuple(f"{i:05d}" for i in range(5))
ALL = list(range(7))  # 5 classes and 2 superclasses
KEPT = {  # hierarchy of the new run: the old row of each new row
    "the same": (PETS, ALL),
    "superclasses spelled otherwise": (Hierarchy(NAMES, ("Cats", "Dogs"), PARENTS), ALL),
    "classes reordered": (Hierarchy(NAMES[::-1], TIERS, PARENTS[::-1]), [4, 3, 2, 1, 0, 5, 6]),
    "superclasses reordered": (Hierarchy(NAMES, TIERS[::-1], [1 - p for p in PARENTS]), [0, 1, 2, 3, 4, 6, 5]),
    "numbers for names": (Hierarchy(NUMBERS, TIERS, PARENTS), ALL),
    "numbers, tiers spelled otherwise": (Hierarchy(NUMBERS, ("A", "B"), PARENTS), ALL),
    "numbers with other parents": (Hierarchy(NUMBERS, TIERS, [0, 0, 1, 1, 1]), [None] * 5 + [5, 6]),
    "a class more": (Hierarchy((*NAMES, "tiger"), TIERS, [*PARENTS, 0]), [0, 1, 2, 3, 4, None, 5, 6]),
    "a class less": (Hierarchy(NAMES[1:], TIERS, PARENTS[1:]), [1, 2, 3, 4, 5, 6]),
    "other classes": (Hierarchy(("oak", "elm", "ash"), ("trees",), [0, 0, 0]), [None] * 4),
    "no parents": (Hierarchy(NAMES, ("Cats", "Dogs"), None), [0, 1, 2, 3, 4, None, None]),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(DiT_models, "tiny", TinyDiT)


def description(hierarchy=PETS, **more):
    return described(hierarchy, **dict(model="tiny", latent_size=8, channels=4) | more)


@pytest.mark.reliability("R15", "class rows are carried over by what they mean")
@pytest.mark.parametrize("name", KEPT)
def test_rows_are_matched_by_what_they_mean(name):
    hierarchy, rows = KEPT[name]
    assert match_rows(description(hierarchy), description()) == rows
    if all(row is not None for row in rows) and len(rows) == 7:
        back = match_rows(description(), description(hierarchy))
        assert [rows[row] for row in back] == ALL


def test_the_null_row_is_matched_too():
    plain, both = description(embedder="null"), description(null_row=True)
    assert [key[0] for key in row_keys(both)] == ["class"] * 5 + ["superclass"] * 2 + ["null"]
    assert match_rows(both, description()) == [*ALL, None]  # --null-prob adds a row, and the others stay
    assert match_rows(both, plain) == [0, 1, 2, 3, 4, None, None, 5]
    assert match_rows(plain, both) == [0, 1, 2, 3, 4, 7]
    assert match_rows(both, both) == [*ALL, 7]


@pytest.mark.parametrize("table_init", ["normal", "mean"])
def test_rows_of_an_adapter_are_carried_over(table_init, tmp_path):
    model = awake(build_model(description()))
    save_adapter(tmp_path / "pets.safetensors", model.state_dict(), model, description())
    before = model.state_dict()[TABLE]
    hierarchy, matches = KEPT["a class more"]
    new = build_model(description(hierarchy))
    base, text = init_from(new, [], tmp_path / "pets.safetensors", description(hierarchy), table_init, 0.5, 3)
    drawn = torch.randn(8, 32, generator=torch.Generator().manual_seed(3)) * 0.5
    drawn += before.mean(0) if table_init == "mean" else 0
    expected = torch.stack([drawn[i] if row is None else before[row] for i, row in enumerate(matches)])
    assert new.state_dict()[TABLE].equal(expected)
    assert text == f"class table: 7 rows carried over from {tmp_path}/pets.safetensors, 1 drawn"


@pytest.mark.parametrize("table_init", ["normal", "mean", "keep"])
@pytest.mark.parametrize("embedder", ["null", "tiered"])
def test_a_checkpoint_does_not_say_what_its_rows_mean(table_init, embedder, tmp_path):
    path, state = tmp_path / "dit.pt", golden("plain_dit")[0]
    state = {key.removeprefix("state/"): value for key, value in state.items() if "state/" in key}
    torch.save(state, path)
    about = description(embedder=embedder)
    model = awake(build_model(about))
    if table_init == "keep" and embedder == "tiered":
        with refusal(r"--table-init is keep, but the class table of .*dit.pt is \(6, 32\), expected \(7, 32\)"):
            init_from(model, [], path, about, table_init)
        return
    base, text = init_from(model, [], path, about, table_init, table_std=0.5, seed=3)
    rows = 6 if embedder == "null" else 7
    drawn = torch.randn(rows, 32, generator=torch.Generator().manual_seed(3)) * 0.5
    drawn += state[TABLE].mean(0) if table_init == "mean" else 0
    assert model.state_dict()[TABLE].equal(state[TABLE] if table_init == "keep" else drawn)
    counts = (rows, 0) if table_init == "keep" else (0, rows)
    assert text.endswith(f"{counts[0]} rows carried over from {path}, {counts[1]} drawn")
    assert base == Base(str(path), sha256(path))


def test_random_weights_have_a_random_table():
    model = build_model(description())
    assert init_from(model, [], None, description(), seed=3) == (None, "class table: 7 rows drawn")
    other = build_model(replace(description(), embedder="null"))
    init_from(other, [], None, replace(description(), embedder="null"), seed=3)
    assert other.state_dict()[TABLE].equal(model.state_dict()[TABLE][:6])
