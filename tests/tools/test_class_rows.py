"""Separation of class rows by superclass, and the table of an adapter or checkpoint."""

import json

import numpy as np
import pytest
import torch
from helpers.tiny_files import CLASSES
from helpers.tiny_models import refusal

from checkpoint.format import read_weights
from checkpoint.loading import TABLE
from hierarchy import Hierarchy
from tools.figures import class_rows

NAMES = [name for names in CLASSES.values() for name in names]


def slow_separation(rows, groups, k):
    """Compute purity and silhouette of each row by their definitions."""
    purity, silhouette = [], []
    for i in range(len(rows)):
        distance = [torch.dist(rows[i], other).item() for other in rows]
        near = sorted((j for j in range(len(rows)) if j != i), key=distance.__getitem__)[:k]
        purity.append(np.mean([groups[j] == groups[i] for j in near]))
        means = {
            g: np.mean([d for j, d in enumerate(distance) if groups[j] == g and j != i] or [np.nan])
            for g in set(groups)
        }
        a, b = means[groups[i]], min(mean for g, mean in means.items() if g != groups[i])
        silhouette.append(0.0 if np.isnan(a) else (b - a) / max(a, b))
    return purity, silhouette


def test_separation_follows_the_definitions():
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([0, 1, 1, 3, 0, 1, 3, 3, 0, 4, 1])  # group 2 is empty, group 4 has one row
    rows = torch.randn(len(groups), 3, generator=generator, dtype=torch.float64) + groups[:, None] * 0.5
    wanted = slow_separation(rows, groups.tolist(), 3)
    for block in (1024, 4, 1):
        found = class_rows.separation(rows, groups, 3, block)
        for mine, theirs in zip(found, wanted):
            torch.testing.assert_close(mine, torch.tensor(theirs), rtol=1e-9, atol=1e-12)


def test_separation_of_distant_and_of_equal_groups():
    groups = torch.arange(40) % 2
    noise = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    purity, silhouette = class_rows.separation(noise + 100 * groups[:, None], groups)
    assert (purity == 1).all() and silhouette.min() > 0.97
    purity, silhouette = class_rows.separation(torch.ones(40, 4), groups)
    assert (silhouette == 0).all()


def test_summary_has_the_purity_expected_by_chance():
    hierarchy = Hierarchy([f"{i}" for i in range(300)], ["a", "b"], [0] * 200 + [1] * 100)
    rows = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    found = class_rows.summary(rows, hierarchy, 10)
    assert found["purity_by_chance"] == pytest.approx((200 * 199 + 100 * 99) / (300 * 299))
    assert found["purity"] == pytest.approx(found["purity_by_chance"], abs=0.03) and abs(found["silhouette"]) < 0.02
    parts = found["superclasses"]
    assert [part["classes"] for part in parts.values()] == [200, 100] and list(parts) == ["a", "b"]
    for key in ("purity", "silhouette"):
        assert found[key] == pytest.approx((200 * parts["a"][key] + 100 * parts["b"][key]) / 300)


def test_the_table_of_an_adapter_and_of_a_checkpoint(adapter, official, images, base, tmp_path):
    rows, tops, hierarchy = class_rows.read_class_table(adapter)
    table = read_weights(adapter)[0][TABLE]
    assert rows.equal(table[:5]) and tops.equal(table[5:]) and hierarchy.classes == tuple(NAMES)
    dogs_first = Hierarchy(NAMES, ["dogs", "cats"], [0, 0, 0, 1, 1], "turned")  # of the same counts
    (tmp_path / "turned.json").write_text(json.dumps(dogs_first.to_dict()))
    with refusal("--hierarchy is .*turned.*, expected .*, on which the adapter was trained"):
        class_rows.read_class_table(adapter, tmp_path / "turned.json")
    assert class_rows.read_class_table(adapter, images)[2].classes == tuple(NAMES)
    rows, tops, _ = class_rows.read_class_table(official, images)
    assert rows.shape[0] == 5 and tops.shape[0] == 2
    with refusal("does not contain the superclasses", "pass --hierarchy"):
        class_rows.read_class_table(official)
    with refusal("a class table of 10 rows, expected one for"):
        class_rows.read_class_table(base, images)


def test_tsne_of_scikit_learn():
    pytest.importorskip("sklearn.manifold")
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(60) % 2
    rows = torch.randn(60, 8, generator=generator) + 20 * groups[:, None]
    first, again = class_rows.tsne(rows), class_rows.tsne(rows)
    assert first.equal(again) and first.shape == (60, 2)
    assert (class_rows.separation(first, groups)[0] == 1).all()
