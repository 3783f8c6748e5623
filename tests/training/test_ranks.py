"""Equal results on any number of processes, in several forward passes, and after resuming on other processes."""

import itertools
import json
import random

import pytest
from helpers.launch import launch, worst
from helpers.tiny_runs import TINY

import train
from checkpoint.format import read_weights
from training import logger

STEPS, EPOCH = 20, 5  # 20 images in batches of 4: an epoch has all of them


@pytest.fixture(scope="module")
def run(images, base, tmp_path_factory):
    """run(name, *flags, world=1) -> the folder of a run of 20 steps, with the file `shown` that `record` writes."""
    root = tmp_path_factory.mktemp("ranks")

    def run(name, *flags, world=1):
        start = ["--data-path", images, "--resume", base, "--results-dir", root, "--experiment", name]
        start += [*TINY, *f"--lr 1e-4 --preview-images 0 --log-every 1 --ckpt-every 1 --keep-states {STEPS}".split()]
        codes = launch(train.main, [*start, "--max-steps", STEPS, *flags], root, world, record(root / name))
        assert worst(codes) == 0, (root / "err0").read_text()
        return root / name

    return run


@pytest.fixture(scope="module")
def one(run):
    return run("one")


def record(folder):
    """Make each process add a line to the file `shown` at every step: step, rank, and the images that it trained on."""

    def prepare(rank):
        add, steps = logger.MetricLogger.add_step, itertools.count(1)

        def added(log, terms, norm, requested, shown):
            add(log, terms, norm, requested, shown)
            names = [log.data.paths[i] for i in shown.tolist()]
            with open(folder / "shown", "a") as file:
                file.write(json.dumps([log.batches.start_step + next(steps), rank, names]) + "\n")

        logger.MetricLogger.add_step = added

    return prepare


def shown(folder):
    """Return {step: names of its images, in the order of ranks}."""
    lines = sorted(json.loads(line) for line in (folder / "shown").read_text().splitlines())
    return {step: sum((names for _, _, names in ranks), []) for step, ranks in itertools.groupby(lines, lambda x: x[0])}


def state(folder, step, kind):
    """Return {name: tensor} of one kind, of training.state.TENSOR_KINDS, in the state of a step.

    Biases of keys are set to 0. The softmax is invariant to them: their gradient is a rounding error, which AdamW scales
    up to a full step.
    """
    tensors = read_weights(folder / f"states/{step:07d}.safetensors")[0]
    for name, tensor in tensors.items():
        if name.endswith("qkv.bias"):
            tensor.view(3, -1)[1] = 0
    return {name.removeprefix(f"{kind}/"): t.double() for name, t in tensors.items() if name.startswith(f"{kind}/")}


def pairs(ours, theirs):
    """Return pairs of tensors with the same name; all must be non-zero."""
    assert ours.keys() == theirs.keys() and all(tensor.norm() > 0 for tensor in theirs.values())
    return [(ours[name], theirs[name]) for name in theirs]


def gradient_error(ours, theirs):
    """Return the largest relative error of a parameter's gradient at the first step of two runs.

    The gradients come from AdamW's first moment, which is a tenth of them after the first step.
    """
    both = pairs(state(ours, 1, "exp_avg"), state(theirs, 1, "exp_avg"))
    return max(((a - b).norm() / b.norm()).item() for a, b in both)


def weight_error(ours, theirs):
    """Return the largest difference of a single weight, or of its EMA, after the last step."""
    return max(
        (a - b).abs().max().item()
        for kind in ("now", "average")
        for a, b in pairs(state(ours, STEPS, kind), state(theirs, STEPS, kind))
    )


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row[key] for row in rows for key in ("loss", "mse", "vb", "grad_norm")]


@pytest.mark.reliability("R7", "gradients and weights after 20 steps on 2 and 4 ranks, compared with one")
def test_results_do_not_depend_on_the_number_of_processes(run, one, cases, figure):
    gradient = weight = 0
    for seed in range(cases(1, full=5)):
        one = run(f"seed{seed}", "--global-seed", seed) if seed else one
        for world in (2, 4):
            folder = run(f"seed{seed}-{world}", "--global-seed", seed, world=world)
            log = (folder / "log.txt").read_text()
            assert f"{world} processes" in log and f"exchanged in a step: {23_064 * 4 / 1e6:.1f} MB" in log
            gradient, weight = max(gradient, gradient_error(folder, one)), max(weight, weight_error(folder, one))
            assert losses(folder) == pytest.approx(losses(one), rel=1e-5) and shown(folder) == shown(one)
    assert gradient <= 1e-6 and weight <= 5e-6
    figure(f"gradients within {gradient:.1e}, weights within {weight:.1e}")


@pytest.mark.reliability("R7", "2 -> 1 -> 4 ranks on resume, and other orders, interrupted within epochs")
def test_a_run_resumes_on_another_number_of_processes(run, one, images, cases, figure):
    everything, weight = sorted(str(path.relative_to(images)) for path in images.rglob("*.png")), 0
    orders, draw = [(2, 1, 4), (1, 4, 2), (4, 2, 1), (2, 4, 1), (4, 1, 2), (1, 2, 4)], random.Random(0)
    orders = orders[: cases(1, full=6)]
    for order in orders:
        name, first = "-".join(map(str, order)), draw.randrange(1, EPOCH)
        second = draw.choice([step for step in range(first + 1, STEPS) if step % EPOCH])
        for world, step in zip(order, (first, second, STEPS)):
            folder = run(name, "--max-steps", step, world=world)
        seen = shown(folder)
        assert list(seen) == list(range(1, STEPS + 1)) and seen == shown(one)
        for epoch in range(0, STEPS, EPOCH):
            assert sorted(sum((seen[step + 1] for step in range(epoch, epoch + EPOCH)), [])) == everything
        weight = max(weight, weight_error(folder, one))
        assert losses(folder) == pytest.approx(losses(one), rel=1e-5)
    assert weight <= 5e-6
    figure(f"{len(orders)} orders, {STEPS // EPOCH} epochs: every image once per epoch, weights within {weight:.1e}")


def test_several_forward_passes_give_the_result_of_one(run, one):
    passes = run("passes", "--grad-accum", 3)
    assert gradient_error(passes, one) <= 1e-6 and weight_error(passes, one) <= 5e-6
    assert losses(passes) == pytest.approx(losses(one), rel=1e-5)
