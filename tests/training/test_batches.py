"""The data order: a function of seed and step, whatever the number of processes and wherever a run resumes."""

import pytest

from training.batches import StepBatches


def test_an_epoch_is_a_permutation_without_the_incomplete_batch():
    steps = list(StepBatches(n=23, global_batch=4, seed=1, max_steps=15))
    assert len(steps) == 15 and {len(rows) for rows in steps} == {4}
    epochs = [sum(steps[e * 5 : e * 5 + 5], []) for e in range(3)]
    for rows in epochs:
        assert len(set(rows)) == 20 and set(rows) <= set(range(23))
    assert epochs[0] != epochs[1] != epochs[2]


def test_resumed_runs_and_other_numbers_of_processes_see_the_same_steps():
    steps = list(StepBatches(50, 12, seed=3, max_steps=11))
    assert list(StepBatches(50, 12, 3, start_step=6, max_steps=11)) == steps[6:]
    for world in (2, 3, 4):
        parts = [StepBatches(50, 12, 3, rank, world, max_steps=11) for rank in range(world)]
        assert [sum(rows, []) for rows in zip(*parts)] == steps
    endless = iter(StepBatches(50, 12, 3))
    assert [next(endless) for _ in range(11)] == steps


def test_seed_and_epoch_give_distinct_orders():
    orders = [
        next(iter(StepBatches(100, 100, seed, start_step=epoch))) for seed in (0, 1, 2, 2**32 - 1) for epoch in (0, 1)
    ]
    assert len({tuple(rows) for rows in orders}) == len(orders)
    assert all(sorted(rows) == list(range(100)) for rows in orders)


def test_the_order_is_the_same_in_all_releases():
    assert list(StepBatches(10, 5, seed=0, max_steps=3)) == [[6, 3, 1, 5, 8], [7, 0, 2, 9, 4], [4, 8, 5, 0, 7]]


def test_length():
    assert len(StepBatches(10, 5, 0, start_step=3, max_steps=7)) == 4
    with pytest.raises(TypeError):
        len(StepBatches(10, 5, 0))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(n=3, global_batch=4, seed=0), "has 3 images, fewer than --global-batch-size 4"),
        (dict(n=99, global_batch=10, seed=0, world=4), "is 10, .* of processes \\(4\\): pass 8"),
        (dict(n=99, global_batch=3, seed=0, world=8), "is 3, .* of processes \\(8\\): pass 8"),
        (dict(n=99, global_batch=0, seed=0), "is 0, expected a multiple"),
        (dict(n=99, global_batch=9, seed=-1), "--global-seed is -1"),
        (dict(n=99, global_batch=9, seed=2**32), "expected 0 to 4294967295"),
    ],
)
def test_impossible_batches_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        StepBatches(**arguments)
