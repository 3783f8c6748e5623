"""The table of classes and superclasses: its rows, and which of them a label stands for."""

import pytest
import torch
from helpers.tiny_models import PARENTS, awake, tiny_dit

from tiered_embedder import TieredEmbedder

EVERY = torch.arange(7)  # 5 classes, 2 superclasses
THEIRS = torch.tensor([5, 6, 5, 6, 6, 5, 6])  # the rows of their superclasses


def embedder(dropout_prob=0.1, parents=PARENTS, num_super_classes=2, null_row=False):
    torch.manual_seed(0)
    return TieredEmbedder(5, num_super_classes, 8, dropout_prob, parents, null_row)


def rows_of(module, vectors):
    """Which rows of the table the vectors (N, 8) are."""
    equal = (vectors[:, None] == module.embedding_table.weight).all(-1)
    assert (equal.sum(1) == 1).all()
    return equal.int().argmax(1)


def test_a_row_for_each_class_and_superclass():
    module = embedder()
    assert module.embedding_table.weight.shape == (7, 8)
    assert rows_of(module, module(EVERY, train=False)).equal(EVERY)


def test_superclass_rows():
    assert embedder().superclass_rows(EVERY).equal(THEIRS)


def test_a_single_superclass_is_the_null_class():
    module = embedder(parents=None, num_super_classes=1)
    assert module.superclass_rows(torch.arange(6)).tolist() == [5] * 6
    assert rows_of(module, module(torch.arange(6), True, torch.ones(6))).tolist() == [5] * 6


def test_the_state_dict_is_the_table():
    module = embedder()
    assert list(module.state_dict()) == ["embedding_table.weight"]
    other = embedder(parents=[1, 1, 0, 0, 1])
    other.load_state_dict(module.state_dict(), strict=True)
    assert other.parents.tolist() == [1, 1, 0, 0, 1]


# ---- dropping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_prob, expected", [(0.0, EVERY), (1.0, THEIRS)])
def test_none_or_all_are_dropped(dropout_prob, expected):
    module = embedder(dropout_prob)
    assert rows_of(module, module(EVERY, train=True)).equal(expected)
    assert rows_of(module, module(EVERY, train=False)).equal(EVERY)


@pytest.mark.parametrize("dropout_prob", [0.1, 0.6])
def test_the_rate(dropout_prob):
    module, labels = embedder(dropout_prob), torch.arange(5).repeat(4000)
    torch.manual_seed(1)
    found = rows_of(module, module(labels, train=True))
    dropped = found != labels
    assert found[dropped].equal(THEIRS[labels[dropped]])
    for which in (labels >= 0, *(labels == label for label in range(5))):
        deviation = (dropout_prob * (1 - dropout_prob) / which.sum()) ** 0.5
        assert abs(dropped[which].double().mean() - dropout_prob) < 4 * deviation


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dropout_prob", [0.0, 1.0])
def test_forced_drops_come_before_chance(train, dropout_prob):
    module, drop = embedder(dropout_prob), torch.tensor([1, 0, 0, 1, 0, 1, 0])
    expected = torch.tensor([5, 1, 2, 6, 4, 5, 6])
    for force in (drop, drop.bool(), drop.float()):
        assert rows_of(module, module(EVERY, train, force)).equal(expected)


def test_the_callers_labels_never_change():
    module, labels = embedder(1.0), EVERY.clone()
    module(labels, True)
    module(labels, True, torch.ones(7))
    dropped = module.token_drop(labels)
    kept = module.token_drop(labels, torch.zeros(7))
    module.superclass_rows(labels)
    assert labels.equal(EVERY) and not dropped.equal(EVERY)
    kept.fill_(0)  # a copy, even where nothing was dropped
    assert labels.equal(EVERY)


def test_gradients_reach_the_rows_that_were_looked_up_alone():
    module = embedder(0.0)
    module(torch.tensor([0, 0, 3, 4]), True, torch.tensor([0, 0, 0, 1])).sum().backward()
    assert module.embedding_table.weight.grad[:, 0].tolist() == [2, 0, 0, 1, 0, 0, 1]


# ---- the null row -----------------------------------------------------------------------------------------------------


def test_a_null_row_comes_last():
    module = embedder(null_row=True)
    assert module.embedding_table.weight.shape == (8, 8) and list(module.state_dict()) == ["embedding_table.weight"]
    assert module.has_null and module.null_rows(EVERY).tolist() == [7] * 7
    assert module.superclass_rows(torch.arange(8)).tolist() == [*THEIRS.tolist(), 7]
    assert rows_of(module, module(torch.tensor([7, 0]), train=False)).tolist() == [7, 0]


def test_the_null_class_of_a_plain_dit_is_its_superclass():
    module = embedder(parents=None, num_super_classes=1)
    assert module.has_null and module.null_rows(EVERY[:5]).equal(module.superclass_rows(EVERY[:5]))


def test_labels_drop_to_the_null_row_where_they_are_forced_to():
    module, drop = embedder(1.0, null_row=True), torch.tensor([2, 0, 1, 2, 1, 0, 2])
    for train in (True, False):
        assert rows_of(module, module(EVERY, train, drop)).tolist() == [7, 1, 5, 7, 6, 5, 7]
    assert rows_of(module, module(EVERY, True)).equal(THEIRS)  # chance drops to superclasses alone
    plain = embedder(1.0, parents=None, num_super_classes=1)
    assert rows_of(plain, plain(EVERY[:5], True, drop[:5])).tolist() == [5, 1, 5, 5, 5]


def test_a_dit_with_a_null_row_has_one_row_more_and_is_the_same():
    plain, rooted = (awake(tiny_dit(null_row=null_row)).eval() for null_row in (False, True))
    state = plain.state_dict()
    shapes = {name: tensor.shape for name, tensor in rooted.state_dict().items()}
    table = "y_embedder.embedding_table.weight"
    assert shapes == {name: tensor.shape for name, tensor in state.items()} | {table: (8, 32)}
    rooted.load_state_dict(state | {table: torch.cat([state[table], torch.ones(1, 32)])})
    x, t = torch.randn(7, 4, 8, 8), torch.arange(7) * 100
    assert rooted(x, t, EVERY).equal(plain(x, t, EVERY))
    drop = torch.tensor([2, 1, 0, 0, 2, 0, 0])
    expected = torch.where(drop == 2, 7, torch.where(drop == 1, THEIRS, EVERY))
    assert rooted.train()(x, t, EVERY, force_drop_ids=drop).equal(rooted.eval()(x, t, expected))


def test_without_a_null_row_there_is_none_to_ask_for():
    module = embedder()
    assert not module.has_null
    with pytest.raises(AssertionError, match="without a null row"):
        module.null_rows(EVERY)


# ---- without a map, mistakes ------------------------------------------------------------------------------------------


def test_without_a_map_rows_can_be_looked_up_and_nothing_dropped():
    module = embedder(parents=None)
    assert rows_of(module, module(EVERY, train=False)).equal(EVERY)
    for call in (lambda: module(EVERY, train=True), lambda: module.superclass_rows(EVERY)):
        with pytest.raises(AssertionError, match="without a map"):
            call()
    module = embedder(0.0, parents=None)
    assert rows_of(module, module(EVERY, train=True)).equal(EVERY)


def test_the_map_is_real_under_a_meta_device():
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
        ((4, 2, 8, 0.1, PARENTS), r"has shape \(5,\), expected \(4,\)"),
        ((5, 2, 8, 0.1, [PARENTS]), r"has shape \(1, 5\), expected \(5,\)"),
        ((5, 2, 8, 0.1, [0, 1, 2, 1, 1]), r"has values 0\.\.2, expected 0\.\.1"),
        ((5, 2, 8, 0.1, [0, 1, -1, 1, 1]), r"has values -1\.\.1, expected 0\.\.1"),
        ((5, 1, 8, 0.1, PARENTS), r"has values 0\.\.1, expected 0\.\.0"),
    ],
)
def test_impossible_embedders_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        TieredEmbedder(*arguments)
