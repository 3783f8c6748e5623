"""Non-finite numbers: all processes stop at the same step, the message names its images, and no file gets one."""

import json
import math
import random
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.launch import launch
from helpers.tiny_files import tree
from helpers.tiny_runs import SAVING, differences, outcome

import train
from autoencoder import Autoencoder
from checkpoint.format import read_weights
from dataset.images import ImageData
from dataset.latents import NPY_HEADER, chunk_hash, item_bytes, read_sealed, write_sealed
from hierarchy import Hierarchy
from runtime.text import shorten
from tools import encode_latents
from training.batches import StepBatches
from training.folder import list_states
from training.step import GuardedOptimizer, draw_step_noise

FLAGS = [*SAVING, "--preview-images", "0"]
BEGUN, STEPS, SHAPE = 3, 8, (3, 8, 8)
VALUES = math.nan, math.inf, -math.inf


@pytest.fixture(scope="module")
def run(images, base, command, tmp_path_factory):
    """Return run(name, steps, *flags, latents=None, **options of launch), which trains and returns the exit codes."""
    root = tmp_path_factory.mktemp("numbers")
    encode = "--vae", "none", "--image-size", 8, "--num-workers", 0, "--out", root / "latents"
    assert command(encode_latents.main, "--data-path", images, *encode).code == 0

    def run(name, steps, *flags, latents=None, **options):
        data = ("--latents", latents) if latents else ("--data-path", images)
        start = ("--resume", base, "--results-dir", root, "--experiment", name, "--max-steps", steps)
        return launch(train.main, [*FLAGS, *data, *start, *flags], root, **options)

    run.root, run.data = root, ImageData(images, Hierarchy.from_folder(images), 8)
    return run


# ---- one number at one step of one process -------------------------------------------------------


def by_steps(seen, spoil, step):
    """Let train.py record each step (from 0) that it begins in the file `seen`, with `spoil()` active during `step`."""
    one_step = train.train_step

    def stepped(args, run, now, *batch):
        with open(seen, "a") as file:
            file.write(f"{now}\n")
        undo = spoil() if now == step else lambda: None
        one_step(args, run, now, *batch)
        undo()

    train.train_step = stepped


def replaced(owner, name, after):
    """Make a function pass its result through `after`; return the function that undoes this."""
    function = getattr(owner, name)

    def replacement(*arguments, **options):
        result = function(*arguments, **options)
        after(result)
        return result

    setattr(owner, name, replacement)
    return lambda: setattr(owner, name, function)


def put(value, row):
    """Return a function that puts `value` at one place of a row of a tensor."""

    def put(tensor):
        tensor.view(len(tensor), -1)[row, -1] = value

    return put


def spoil_loss(value, row):
    def spoiled(terms):
        terms["loss"] = terms["loss"] + torch.zeros(len(terms["loss"])).index_fill(0, torch.tensor(row), value)

    return replaced(train.DIFFUSION, "training_losses", spoiled)


def spoil_autoencoder(value, row):
    return replaced(Autoencoder, "encode_moments", lambda moments: put(value, row)(moments[0]))


def spoil_gradient(value, row):
    """Spoil the gradient before the all-reduce."""
    forward_backward = train.forward_backward

    def spoiled(accelerator, model, *rest):
        p = next(p for p in model.parameters() if p.requires_grad)
        hook = p.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor(0), value))
        terms = forward_backward(accelerator, model, *rest)
        hook.remove()
        return terms

    train.forward_backward = spoiled
    return lambda: setattr(train, "forward_backward", forward_backward)


def spoil_exchanged(value, row):
    """Spoil the gradient after the all-reduce, on one process alone."""
    norm = torch.nn.utils.get_total_norm

    def spoiled(gradients):
        gradients[0].view(-1)[0] = value
        return norm(gradients)

    torch.nn.utils.get_total_norm = spoiled
    return lambda: setattr(torch.nn.utils, "get_total_norm", norm)


SPOIL = {
    "loss": spoil_loss,
    "gradient": spoil_gradient,
    "autoencoder": spoil_autoencoder,
    "latent": lambda value, row: lambda: None,  # it is spoiled in the cache itself
    "exchanged": spoil_exchanged,
}


def spoiled_latents(source, target, image, value):
    """Copy cached latents with one number of an image replaced, in both flips, and correct hashes."""
    shutil.copytree(source, target)
    info = read_sealed(target / "latents.json")
    moments = np.load(target / "moments.npy", mmap_mode="r+")
    moments[image, :, 0, 3, 3] = value
    moments.flush()
    assert moments.offset == NPY_HEADER and moments[0].nbytes == item_bytes(info)
    hashes = info["hashes"]["moments.npy"]
    hashes[:] = [chunk_hash(target, info, k) for k in range(len(hashes))]
    write_sealed(target / "latents.json", info)
    return target


# ---- all processes stop --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(run):
    """Return begun(world, latents), which returns a run of three steps and the outcome of eight, made on first use."""
    made = {}

    def begun(world, latents):
        key = world, bool(latents)
        if key not in made:
            name = f"begun-{world}-{'latents' if latents else 'images'}"
            for steps in (BEGUN, STEPS):
                assert not any(run(name, steps, latents=latents, world=world).values())
                if steps == BEGUN:
                    shutil.copytree(run.root / name, run.root / f"{name}-template")
            made[key] = run.root / f"{name}-template", outcome(run.root / name)
        return made[key]

    return begun


def sentence(data, what, step, rows):
    """Return the start of the message about rows of the batch of a step (from 0)."""
    images, t = StepBatches(len(data), 4, 0).rows(step), draw_step_noise(0, step, 4, SHAPE, True, 0.1, 0.0, "cpu")["t"]
    names = shorten(f"{data.paths[int(images[i])]} at timestep {t[i]}" for i in rows)
    return f"train.py: At step {step + 1} the {what} is non-finite (images {names}), expected finite numbers: "


def check_finite(folder):
    """Assert that all numbers in all files of a run are finite."""
    for path in folder.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in read_weights(path)[0].values()), path
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))


def check_stop(run, begun, kind, value, world, step, row):
    """Spoil one number in a row of the batch of a step (from 0); check how the run ends, and that it resumes.

    The step is one of the first epoch, which shows every image once: the cached latents are spoiled in the file.
    """
    name, share, latents = f"{kind}-{value}-{world}", 4 // world, run.root / "latents" if kind == "latent" else None
    template, expected = begun(world, latents)
    folder = run.root / name
    shutil.copytree(template, folder)
    before = tree(folder)

    def prepare(rank):
        spoil = partial(SPOIL[kind], value, row % share) if rank == row // share else lambda: lambda: None
        by_steps(run.root / f"{name}-seen{rank}", spoil, step)

    if latents:
        image = int(StepBatches(len(run.data), 4, 0).rows(step)[row])
        latents = spoiled_latents(latents, run.root / f"{name}-latents", image, value)
    codes = run(name, STEPS, latents=latents, world=world, prepare=prepare, patience=60)
    assert codes == dict.fromkeys(range(world), 2)
    of_all = kind in ("gradient", "exchanged")
    begins = sentence(run.data, "gradient" if of_all else "loss", step, range(4) if of_all else [row])
    last = step + (step + 1) % 2  # losses are checked every two steps
    for rank in range(world):
        said = (run.root / f"err{rank}").read_text()
        line = said.split("\r")[-1].strip().split("\n")[-1]
        assert line.startswith(begins) and line.endswith(".") and "Traceback" not in said, said
        assert (run.root / f"{name}-seen{rank}").read_text().split() == [str(now) for now in range(BEGUN, last + 1)]
    after = tree(folder)
    logs = {str(folder / "log.txt"), str(folder / "metrics.jsonl")}
    assert {path for path in before | after if before.get(path) != after.get(path)} <= logs | {
        str(folder / "args.json")
    }
    check_finite(folder)
    latents = latents and run.root / "latents"
    assert not any(run(name, STEPS, latents=latents, world=world).values())  # without the fault
    assert not differences(folder, expected)
    check_finite(folder)


@pytest.mark.reliability(
    "R10", "NaN and infinity in loss, gradient, autoencoder and latents, on one of 1 or 2 processes"
)
def test_all_processes_stop_at_one_step(run, begun, cases, figure):
    chances = [(kind, value, world) for kind in SPOIL for value in VALUES for world in (1, 2)]
    chances = [chance for chance in chances if chance[0] != "exchanged" or chance[2] == 2]
    draw = random.Random(0)
    short = [
        ("exchanged", math.nan, 2),
        *(draw.choice([c for c in chances if c[0] == kind]) for kind in list(SPOIL)[:4]),
    ]
    tried = cases(short, full=chances)
    for chance in tried:
        check_stop(run, begun, *chance, step=draw.randrange(BEGUN, 5), row=draw.randrange(4))
    figure(f"{len(tried)} of {len(tried)}")


# ---- --on-nonfinite skip -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_can_be_passed_over(kind, run):
    def prepare(rank):
        by_steps(run.root / f"skipped-{kind}", partial(SPOIL[kind], math.nan, 0) if rank else lambda: lambda: None, 4)

    flags = "--on-nonfinite", "skip", "--ckpt-every", 1, "--keep-states", 9
    assert not any(run(f"skip-{kind}", STEPS, *flags, world=2, prepare=prepare).values())
    said = (run.root / "out0").read_text()
    assert f"At step 5 the {kind} is non-finite" in said and "the step was skipped" in said
    states = [read_weights(path) for path in reversed(list_states(run.root / f"skip-{kind}"))]
    before, after = states[3][0], states[4][0]
    kept = [name for name in before if name.startswith(("now/", "exp_avg/", "exp_avg_sq/"))]
    assert all(before[name].equal(after[name]) for name in kept) and states[4][1].updates == 4
    assert not any(before[name].equal(states[5][0][name]) for name in kept)
    rows = [json.loads(line) for line in (run.root / f"skip-{kind}/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 0] and rows[2]["loss"] > 0
    for tensors, _ in states:  # except the losses of the current row, which count the skipped steps
        assert all(tensor.isfinite().all() for name, tensor in tensors.items() if not name.startswith("row/"))


def test_after_a_bad_step_nothing_moves_until_the_run_stops():
    """The optimizer holds all later steps back on the device, without asking the host."""
    p = torch.nn.Parameter(torch.ones(3))
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.AdamW([p], lr=0.1, fused=True))
    update = GuardedOptimizer(accelerator, optimizer, [p], sticky=True)
    values = []
    for gradient in (1.0, math.nan, 1.0):
        p.grad = torch.full((3,), gradient)
        update.step()
        values.append(p.detach().clone())
    assert not values[0].equal(torch.ones(3)) and values[1].equal(values[0]) and values[2].equal(values[0])
    assert optimizer.state[p]["step"] == 1
