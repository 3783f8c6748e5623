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


def test_one_half_is_spread_over_the_classes():
    labels = np.repeat(np.arange(4), [8, 4, 0, 6])
    found = make_plan(labels, PARENTS, half_sizes=[6, 3], one_half=True, seed=3)
    assert np.bincount(labels[found.half == 0], minlength=4).tolist() == [4, 2, 0, 3] and not (found.half == 1).any()
    few = make_plan(np.repeat(np.arange(4), 5), np.zeros(4, int), half_sizes=[2], one_half=True, seed=3)
    assert (few.half == 0).sum() == 2


def test_small_groups_need_no_sums_if_their_features_are_kept(monkeypatch):
    """Sums of 90 superclasses with 2 images each would take 33.6 MB each for Inception."""
    labels = np.repeat(np.arange(90), 2)
    assert make_plan(labels, np.arange(90), dims=2048).large_groups(2048) == []
    labels = np.repeat(np.arange(4), 10)
    monkeypatch.setattr(plan, "PER_SUPERCLASS", 5)
    monkeypatch.setattr(plan, "SAMPLE", 12)
    found = make_plan(labels, PARENTS, "sample", 8)
    assert found.large_groups(100) == [(0, plan.NEITHER), (1, plan.NEITHER)]  # 20 images each, of which a few are kept
    found = make_plan(labels, PARENTS, "all", 8, half_sizes=[2, 20])
    assert found.large_groups(8) == [(0, plan.NEITHER), (1, 0), (1, 1)]


def test_a_plan_without_some_images():
    labels = np.array([3, 0, 0, 2, 1, 3])
    full = make_plan(labels, PARENTS, half_sizes=[1, 1])
    left = full.without(np.array([False, True, False, False, False, True]))
    assert left.labels.tolist() == [3, 0, 2, 1] and left.order.tolist() == [1, 3, 2, 0]
    assert left.half.tolist() == full.half[[0, 2, 3, 4]].tolist() and left.block is full.block


def test_blocks_of_classes_fit_in_memory():
    lpips_256, lpips_512 = 635_000, 2_620_000  # values per image
    assert plan.most_blocks(11, lpips_256) == plan.most_blocks(11, lpips_512) == plan.BLOCKS
    assert plan.most_blocks(1_103, lpips_256) == 1 and plan.most_blocks(1, 0) == plan.BLOCKS
