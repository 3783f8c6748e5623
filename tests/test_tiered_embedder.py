"""The tiered class table: its rows, label dropout, the null row, invalid arguments."""

import pytest
import torch
from helpers.tiny_models import PARENTS, awake, tiny_dit
from torch.testing import assert_close

from tiered_embedder import TieredEmbedder, drop_ids

ROWS = torch.arange(7)  # of 5 classes and 2 superclasses
SUPERCLASS_ROWS = torch.tensor([5, 6, 5, 6, 6, 5, 6])  # for each of ROWS


def embedder(dropout_prob=0.1, parents=PARENTS, num_super_classes=2, null_row=False):
    torch.manual_seed(0)
    return TieredEmbedder(5, num_super_classes, 8, dropout_prob, parents, null_row)


def rows_of(module, vectors):
    """Return the rows of the table (N,) that equal the vectors (N, 8)."""
    equal = (vectors[:, None] == module.embedding_table.weight).all(-1)
    assert (equal.sum(1) == 1).all()
    return equal.int().argmax(1)


def test_a_row_for_each_class_and_superclass():
    module = embedder()
    assert module.embedding_table.weight.shape == (7, 8)
    assert rows_of(module, module(ROWS, train=False)).equal(ROWS)


def test_superclass_rows():
    assert embedder().superclass_rows(ROWS).equal(SUPERCLASS_ROWS)


def test_a_single_superclass_is_the_null_class():
    module = embedder(parents=None, num_super_classes=1)
    assert module.superclass_rows(torch.arange(6)).tolist() == [5] * 6
    assert rows_of(module, module(torch.arange(6), True, torch.ones(6))).tolist() == [5] * 6


def test_the_state_dict_holds_only_the_table():
    module = embedder()
    assert list(module.state_dict()) == ["embedding_table.weight"]
    other = embedder(parents=[1, 1, 0, 0, 1])
    other.load_state_dict(module.state_dict(), strict=True)
    assert other.parents.tolist() == [1, 1, 0, 0, 1]


# ---- dropping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_prob, expected", [(0.0, ROWS), (1.0, SUPERCLASS_ROWS)])
def test_probability_0_drops_no_label_and_1_drops_all(dropout_prob, expected):
    module = embedder(dropout_prob)
    assert rows_of(module, module(ROWS, train=True)).equal(expected)
    assert rows_of(module, module(ROWS, train=False)).equal(ROWS)


@pytest.mark.parametrize("dropout_prob", [0.1, 0.6])
def test_labels_are_dropped_at_the_given_rate(dropout_prob):
    module, labels = embedder(dropout_prob), torch.arange(5).repeat(4000)
    torch.manual_seed(1)
    found = rows_of(module, module(labels, train=True))
    dropped = found != labels
    assert found[dropped].equal(SUPERCLASS_ROWS[labels[dropped]])
    for which in (labels >= 0, *(labels == label for label in range(5))):
        deviation = (dropout_prob * (1 - dropout_prob) / which.sum()) ** 0.5
        assert abs(dropped[which].double().mean() - dropout_prob) < 4 * deviation


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dropout_prob", [0.0, 1.0])
def test_forced_drops_override_chance(train, dropout_prob):
    module, drop = embedder(dropout_prob), torch.tensor([1, 0, 0, 1, 0, 1, 0])
    expected = torch.tensor([5, 1, 2, 6, 4, 5, 6])
    for force in (drop, drop.bool(), drop.float()):
        assert rows_of(module, module(ROWS, train, force)).equal(expected)


def test_the_callers_labels_are_never_modified():
    module, labels = embedder(1.0), ROWS.clone()
    module(labels, True)
    module(labels, True, torch.ones(7))
    dropped = module.token_drop(labels)
    kept = module.token_drop(labels, torch.zeros(7))
    module.superclass_rows(labels)
    assert labels.equal(ROWS) and not dropped.equal(ROWS)
    kept.fill_(0)  # a copy, even if nothing was dropped
    assert labels.equal(ROWS)


def test_gradients_reach_only_the_rows_that_were_looked_up():
    module = embedder(0.0)
    module(torch.tensor([0, 0, 3, 4]), True, torch.tensor([0, 0, 0, 1])).sum().backward()
    assert module.embedding_table.weight.grad[:, 0].tolist() == [2, 0, 0, 1, 0, 0, 1]


# ---- the null row --------------------------------------------------------------------------------


def test_the_null_row_is_the_last_row():
    module = embedder(null_row=True)
    assert module.embedding_table.weight.shape == (8, 8) and list(module.state_dict()) == ["embedding_table.weight"]
    assert module.has_null and module.null_rows(ROWS).tolist() == [7] * 7
    assert module.superclass_rows(torch.arange(8)).tolist() == [*SUPERCLASS_ROWS.tolist(), 7]
    assert rows_of(module, module(torch.tensor([7, 0]), train=False)).tolist() == [7, 0]


def test_the_null_class_of_a_plain_dit_is_its_superclass_row():
    module = embedder(parents=None, num_super_classes=1)
    assert module.has_null and module.null_rows(ROWS[:5]).equal(module.superclass_rows(ROWS[:5]))


def test_labels_become_the_null_row_only_if_forced():
    module, drop = embedder(1.0, null_row=True), torch.tensor([2, 0, 1, 2, 1, 0, 2])
    for train in (True, False):
        assert rows_of(module, module(ROWS, train, drop)).tolist() == [7, 1, 5, 7, 6, 5, 7]
    assert rows_of(module, module(ROWS, True)).equal(SUPERCLASS_ROWS)  # chance chooses superclasses only
    plain = embedder(1.0, parents=None, num_super_classes=1)
    assert rows_of(plain, plain(ROWS[:5], True, drop[:5])).tolist() == [5, 1, 5, 5, 5]


def test_a_null_row_adds_one_row_and_changes_nothing_else():
    plain, with_null = (awake(tiny_dit(null_row=null_row)).eval() for null_row in (False, True))
    state = plain.state_dict()
    shapes = {name: tensor.shape for name, tensor in with_null.state_dict().items()}
    table = "y_embedder.embedding_table.weight"
    assert shapes == {name: tensor.shape for name, tensor in state.items()} | {table: (8, 32)}
    with_null.load_state_dict(state | {table: torch.cat([state[table], torch.ones(1, 32)])})
    x, t = torch.randn(7, 4, 8, 8), torch.arange(7) * 100
    assert with_null(x, t, ROWS).equal(plain(x, t, ROWS))
    drop = torch.tensor([2, 1, 0, 0, 2, 0, 0])
    expected = torch.where(drop == 2, 7, torch.where(drop == 1, SUPERCLASS_ROWS, ROWS))
    assert with_null.train()(x, t, ROWS, force_drop_ids=drop).equal(with_null.eval()(x, t, expected))


def test_null_rows_need_a_null_row():
    module = embedder()
    assert not module.has_null
    with pytest.raises(AssertionError, match="without a null row"):
        module.null_rows(ROWS)


# ---- three tiers ---------------------------------------------------------------------------------

# 5 classes; rows 5, 6: superclasses; 7, 8, 9: orders; 10: the null row
TREE = [PARENTS, [0, 1, 0, 2, 2]]
PATHS = {
    0: [5, 7, 0],
    1: [6, 8, 1],
    2: [5, 7, 2],
    3: [6, 9, 3],
    4: [6, 9, 4],
    5: [5],
    6: [6],
    7: [5, 7],
    9: [6, 9],
    10: [10],
}


def tree(dropout_prob=0.1, path=False):
    torch.manual_seed(0)
    return TieredEmbedder(5, 2, 8, dropout_prob, TREE, null_row=True, ranks=[3], path=path)


def test_rows_of_further_ranks_follow_the_superclasses():
    module, rows = tree(), torch.arange(11)
    assert module.embedding_table.weight.shape == (11, 8) and module.parents.tolist() == PARENTS
    assert module.superclass_rows(rows).tolist() == [5, 6, 5, 6, 6, 5, 6, 5, 6, 6, 10]
    assert module.tier_rows(rows, 1).tolist() == [7, 8, 7, 9, 9, 5, 6, 7, 8, 9, 10]
    assert module.null_rows(rows).tolist() == [10] * 11
    force = torch.tensor([0, 1, 2, 3, 3])  # keep, superclass, null row, order
    assert rows_of(module, module(torch.arange(5), True, force)).tolist() == [0, 6, 10, 9, 9]


def test_dropped_labels_become_ancestors_of_all_tiers_equally():
    module, labels = tree(0.5), torch.arange(5).repeat(4000)
    torch.manual_seed(1)
    found = rows_of(module, module(labels, train=True))
    for tier in (0, 1):
        share = (found == module.tier_rows(labels, tier)).double().mean()
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / len(labels)) ** 0.5
    assert ((found == labels).double().mean() - 0.5).abs() < 0.02
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    one, three = (drop_ids(u, 0.3, 0.1, tiers) for tiers in (1, 3))
    assert torch.where(three > 2, 1, three).equal(one)  # the same labels are dropped, whatever the number of tiers
    assert abs(three.bincount() / len(u) - torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1])).max() < 0.01


def test_a_label_is_the_sum_of_the_rows_on_its_path():
    module = tree(path=True)
    table = module.embedding_table.weight
    for row, path in PATHS.items():
        assert_close(module(torch.tensor([row]), train=False)[0], table[path].sum(0))
    dropped = module(torch.tensor([3, 3, 3]), True, torch.tensor([3, 1, 2]))  # a drop cuts the path
    assert_close(dropped, torch.stack([table[[6, 9]].sum(0), table[6], table[10]]))


# ---- without a superclass map, invalid arguments -------------------------------------------------


def test_without_a_superclass_map_labels_can_be_embedded_but_not_dropped():
    module = embedder(parents=None)
    assert rows_of(module, module(ROWS, train=False)).equal(ROWS)
    for call in (lambda: module(ROWS, train=True), lambda: module.superclass_rows(ROWS)):
        with pytest.raises(AssertionError, match="without a superclass map"):
            call()
    module = embedder(0.0, parents=None)
    assert rows_of(module, module(ROWS, train=True)).equal(ROWS)


def test_the_superclass_map_has_values_under_a_meta_device():
    with torch.device("meta"):
        modules = embedder(), embedder(parents=None, num_super_classes=1)
    assert [module.parents.tolist() for module in modules] == [PARENTS, [0] * 5]
    assert all(module.embedding_table.weight.is_meta for module in modules)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((5, 2, 8, 1.1, PARENTS), "label dropout is 1.1, expected a probability"),
        ((5, 2, 8, -0.1, PARENTS), "label dropout is -0.1"),
        ((5, 2, 8, float("nan"), PARENTS), "label dropout is nan"),
        ((0, 2, 8, 0.1, []), "Found 0 classes and 2 superclasses, expected at least one"),
        ((5, 0, 8, 0.1, PARENTS), "Found 5 classes and 0 superclasses"),
        ((4, 2, 8, 0.1, PARENTS), r"has shape \(1, 5\), expected \(1, 4\)"),
        ((5, 2, 8, 0.1, [PARENTS, PARENTS]), r"has shape \(2, 5\), expected \(1, 5\)"),
        ((5, 2, 8, 0.1, [0, 1, 2, 1, 1]), r"has values 0\.\.2, expected 0\.\.1"),
        ((5, 2, 8, 0.1, [0, 1, -1, 1, 1]), r"has values -1\.\.1, expected 0\.\.1"),
        ((5, 1, 8, 0.1, PARENTS), r"has values 0\.\.1, expected 0\.\.0"),
    ],
)
def test_invalid_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        TieredEmbedder(*arguments)
