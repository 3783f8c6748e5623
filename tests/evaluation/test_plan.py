"""The plan of a pass: which features are kept, and how images are split into halves."""

import numpy as np
import pytest

from evaluation import plan
from evaluation.plan import KEPT_BYTES, make_plan

PARENTS = np.array([0, 0, 1, 1])


@pytest.mark.parametrize("dims, kept", [(1, 40), (KEPT_BYTES // 160, 40), (KEPT_BYTES // 160 + 1, None)])
def test_all_features_are_kept_if_they_fit_in_memory(monkeypatch, dims, kept):
    labels = np.repeat(np.arange(4), 10)
    monkeypatch.setattr(plan, "PER_SUPERCLASS", 5)
    monkeypatch.setattr(plan, "SAMPLE", 12)
    found = make_plan(labels, PARENTS, "auto", dims)
    assert found.sampled.sum() == 12 and (found.kept >= found.sampled).all()
    assert found.kept.sum() == kept or kept is None and 12 <= found.kept.sum() <= 20
    assert all(found.kept[found.superclass == s].sum() >= 5 for s in (0, 1))


@pytest.mark.parametrize("half_sizes, sizes", [([100, 100], (5, 4)), ([3, 100], (3, 4))])
def test_halves_split_pairs_of_a_class(half_sizes, sizes):
    labels = np.repeat(np.arange(4), [7, 4, 1, 9])
    found = make_plan(labels, PARENTS, half_sizes=half_sizes, seed=3)
    for s, size in enumerate(sizes):
        first, second = (np.sort(labels[(found.superclass == s) & (found.half == half)]) for half in (0, 1))
        assert len(first) == size and (first == second).all()
    assert not np.array_equal(found.half, make_plan(labels, PARENTS, half_sizes=half_sizes, seed=4).half)
