"""Training that is killed anywhere, or whose disk fails, resumes to the values of an uninterrupted run, bit for bit."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
from helpers.launch import die_at, launch, worst
from helpers.tiny_models import ROOT
from helpers.tiny_runs import SAVING, differences, outcome

import train
from checkpoint import format
from training import logger
from training.folder import list_states
from training.state import latest_valid_state

FLAGS = [*SAVING, *"--num-workers 1 --preview-images 2 --keep-states 1".split()]


@pytest.fixture(scope="module")
def run(images, base, tmp_path_factory):
    """Return run(name, steps, *flags, **options of launch), which trains in run.root / name and returns the exit codes."""
    root = tmp_path_factory.mktemp("faults")

    def flags(name, steps, *more):
        start = ("--data-path", images, "--resume", base, "--results-dir", root, "--experiment", name)
        return [*FLAGS, *start, "--max-steps", steps, *more]

    def run(*arguments, **options):
        return launch(train.main, flags(*arguments), root, **options)

    run.root, run.flags = root, flags
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PREVIEW, "steps", 1)
        yield run


# ---- killed at a random moment -------------------------------------------------------------------


def die_in_step(count):
    """Kill this process after the losses of a step (from 0) have been added."""
    add, left = logger.MetricLogger.add_step, [count]

    def added(log, *arguments):
        add(log, *arguments)
        if not left[0]:
            signal.raise_signal(signal.SIGKILL)
        left[0] -= 1

    logger.MetricLogger.add_step = added


def a_kill(draw, world, steps, seconds):
    """Return options of `launch` for a kill at a random moment: by the clock, at a file operation, or in a step."""
    victim, kind = draw.randrange(world), draw.choice(("clock", "clock", "operation", "step"))
    if kind == "clock":
        return {"kill": (draw.choice(([victim], range(world))), draw.random() * seconds)}
    if kind == "operation":  # only the main process has any
        count = draw.randrange(4 * steps)
        return {"prepare": lambda rank: rank == 0 and die_at(count)}
    count = draw.randrange(steps)
    return {"prepare": lambda rank: rank == victim and die_in_step(count)}


@pytest.mark.reliability("R1", "training killed by signal 9 at random moments and restarted, on 1 and 2 processes")
@pytest.mark.parametrize("world, short", [(1, 3), (2, 2)])
def test_kills_at_random_moments(world, short, run, cases, figure):
    wanted, steps, draw, folder = cases(short, full=25), 20, random.Random(world), run.root / f"killed{world}"
    begun = time.monotonic()
    assert worst(run(f"unbroken{world}", steps, world=world)) == 0
    seconds, expected = time.monotonic() - begun, outcome(run.root / f"unbroken{world}")
    kills = starts = finished = 0
    while kills < wanted or folder.exists():
        codes = run(folder.name, steps, world=world, **(a_kill(draw, world, steps, seconds) if kills < wanted else {}))
        starts += 1
        if worst(codes):
            assert -signal.SIGKILL in codes.values() and set(codes.values()) <= {1, -signal.SIGKILL}
            kills += 1
        else:
            changed = differences(folder, expected)
            # a kill after a state and before its preview loses the preview
            assert all(name.endswith(".png") and not (folder / "samples" / name).exists() for name in changed), changed
            shutil.rmtree(folder)
            finished += 1
    processes = f"{world} process{'es' * (world > 1)}"
    figure(
        f"{processes}: {kills} kills in {starts} starts, {finished} of {finished} runs ended with the bits of an uninterrupted "
        "run"
    )


# ---- killed, or failing, at each operation of a save ---------------------------------------------

EVENTS = ["open", *(f"os.{name}" for name in "rename remove mkdir rmdir chmod truncate link symlink".split())]


def at_operations(root, act, step=6):
    """Call `act(name, path)` before each file operation while `step` is logged and saved, and with "end" after the last.

    They are those below `root` that Python itself reports, whoever asks for them, with fsync and the writer of safetensors.
    """
    save, write, armed = train.save_checkpoint, logger.MetricLogger.write_row, []

    def met(name, path=""):
        if armed and (path.startswith(str(root)) or not path):
            armed.clear()  # file operations of `act` itself do not count
            act(name, path)
            armed.append(True)

    def before(function, name):
        def replacement(*arguments, **options):
            met(name, str(arguments[1]) if name == "save_file" else "")
            return function(*arguments, **options)

        return replacement

    def written(log, now, **extra):
        armed.extend([True] * (now == step and log.accelerator.is_main_process))
        write(log, now, **extra)

    def saved(*arguments, **options):
        save(*arguments, **options)
        met("end")
        armed.clear()

    train.save_checkpoint, logger.MetricLogger.write_row = saved, written
    os.fsync, format.save_file = before(os.fsync, "fsync"), before(format.save_file, "save_file")
    sys.addaudithook(lambda event, arguments: event in EVENTS and met(event, str(arguments[0])))


def size(path):
    return os.path.getsize(path) if os.path.isfile(path) else 0


@pytest.fixture(scope="module")
def saving(run):
    """A run just before it saves step 6 (it has the state of step 3), its outcome, and the operations of that save.

    They are [name, path, sizes of the file before and after]; the folder run.root / "at" / number is as it was before it.
    """
    for world in (1, 2):
        assert worst(run(f"whole{world}", 8, world=world)) == 0
        codes = run(f"template{world}", 8, world=world, prepare=lambda rank: rank == 0 and die_in_step(3))
        assert codes[0] == -signal.SIGKILL
    operations = []

    def note(name, path):
        shutil.copytree(run.root / "traced", run.root / "at" / str(len(operations)))
        if operations:
            operations[-1].append(size(operations[-1][1]))
        operations.append([name, path, size(path)])
        if name == "end":
            (run.root / "operations.json").write_text(json.dumps(operations))

    shutil.copytree(run.root / "template1", run.root / "traced")
    assert worst(run("traced", 8, prepare=lambda rank: at_operations(run.root, note))) == 0
    expected = {world: outcome(run.root / f"whole{world}") for world in (1, 2)}
    assert not differences(run.root / "traced", expected[1])
    return SimpleNamespace(expected=expected, operations=json.loads((run.root / "operations.json").read_text()))


def limits(operation):
    """Return sizes at which the written file is cut: the first byte, half, all but the last byte."""
    _, path, before, after = operation
    last = [after - 1] * path.endswith(".part")  # log lines contain times, so their lengths differ
    return sorted({before, (before + after) // 2, *last}) if after > before else []


def strike(root, number, limit, deadly):
    """Kill this process at an operation or, unless `deadly`, let it fail: at once, or when the file exceeds `limit`."""
    met = []

    def act(name, path):
        met.append(name)
        resource.setrlimit(resource.RLIMIT_FSIZE, UNLIMITED)
        if len(met) != number + 1:
            return
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, UNLIMITED[1]))
        elif deadly:
            signal.raise_signal(signal.SIGKILL)
        else:
            raise OSError(errno.EIO, os.strerror(errno.EIO), *[path] * (path != ""))

    at_operations(root, act)


def state_written(saving):
    """Return the number of the operation by which the state appears."""
    names = [(name, "/states/" in path) for name, path, *_ in saving.operations]
    return names.index(("os.rename", True))


UNLIMITED = resource.getrlimit(resource.RLIMIT_FSIZE)


def struck(run, saving, moment, world, deadly):
    """Strike a run at `moment`, (number of the operation, limit or None), and resume it to the end; return the exit codes."""
    folder = run.root / "struck"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run.root / f"template{world}", folder)
    prepare = partial(strike, run.root, *moment, deadly)
    codes = run("struck", 8, world=world, prepare=lambda rank: rank == 0 and prepare(), patience=0 if deadly else 60)
    said = (run.root / "err0").read_text()
    assert deadly or -signal.SIGKILL not in codes.values()  # the others exit by themselves
    path, _, _ = latest_valid_state(list_states(folder), pytest.fail)
    assert path.stem in ("0000003", "0000006") or not worst(codes)
    lost = {"0000006.png"} if moment[0] > state_written(saving) else set()  # the preview is drawn after the state
    assert worst(run("struck", 8, world=world)) == 0 and set(differences(folder, saving.expected[world])) <= lost, (
        moment
    )
    assert not list(folder.rglob(".*"))  # no partial files remain
    return codes, said


@pytest.mark.reliability("R2", "after each file operation of a save: a state that loads, and no incomplete file")
def test_each_operation_of_a_save_leaves_a_state(run, saving, figure):
    names = [operation[0] for operation in saving.operations]
    kinds = Counter(names)  # of the grid, the adapter and the state; the previous state is removed
    assert kinds["os.rename"] == kinds["os.remove"] - 1 == 3 and kinds["fsync"] == 6
    steps, before = [], outcome(run.root / "template1")
    for number in range(len(names)):
        folder = run.root / "at" / str(number)
        path, _, _ = latest_valid_state(list_states(folder), pytest.fail)
        steps.append(int(path.stem))
        found = outcome(folder)
        finished = [name for name in found if not name.startswith("states")]
        assert all(found[name] in (saving.expected[1].get(name), before.get(name)) for name in finished)
    assert steps == sorted(steps) and set(steps) == {3, 6} and steps.index(6) == state_written(saving) + 1
    figure(f"{len(names)} of {len(names)}")


@pytest.mark.reliability(
    "R2", "killed at a file operation of a save or in the middle of a write: the run resumes to the same bits"
)
def test_dying_in_a_save(run, saving, cases, figure):
    moments = [(number, None) for number in range(len(saving.operations))]
    moments += [(number, limit) for number, one in enumerate(saving.operations[:-1]) for limit in limits(one)]
    chosen = random.Random(0).sample(moments, min(len(moments), cases(3, full=len(moments))))
    for i, moment in enumerate(chosen):
        codes, _ = struck(run, saving, moment, 1 + i % 2, deadly=True)
        assert codes[0] == -(signal.SIGKILL if moment[1] is None else signal.SIGXFSZ), moment
    figure(f"{len(chosen)} of {len(chosen)}, of {len(moments)} moments")


@pytest.mark.reliability(
    "R2", "a failed file operation during a save: one sentence, code 2, and the run resumes to the same bits"
)
def test_failing_in_a_save(run, saving, cases, figure):
    moments = [(number, None) for number in range(len(saving.operations) - 1)]
    moments += [
        (number, limit)
        for number, one in enumerate(saving.operations[:-1])
        for limit in limits(one)
        if one[1].endswith(".part")
    ]
    chosen = random.Random(1).sample(moments, min(len(moments), cases(2, full=len(moments))))
    for i, moment in enumerate(chosen):
        codes, said = struck(run, saving, moment, 1 + i % 2, deadly=False)
        if codes[0] == 0:  # the folder existed already, or only the preview failed
            log = (run.root / "struck/log.txt").read_text()
            assert saving.operations[moment[0]][0] == "os.mkdir" or "The preview of step 6 failed" in log, moment
            continue
        assert codes[0] == 2 and said.strip().split("\n")[-1].startswith("train.py: "), (moment, codes, said[-2000:])
    figure(f"{len(chosen)} of {len(chosen)}, of {len(moments)} moments")


# ---- torchrun: interrupts and lost workers -------------------------------------------------------


@contextmanager
def torchrun(run, name, steps, *options, more=()):
    """Start a real torchrun of two processes and end it with the test; its output goes to run.root / "said"."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    command = [*program, "train.py", *map(str, run.flags(name, steps, *more))]
    with open(run.root / "said", "w") as said:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        for number in [process.pid, *running("-P", str(process.pid))] if process.poll() is None else []:
            os.kill(number, signal.SIGKILL)


def waited(process, function, *arguments, count):
    """Wait until function(*arguments) has `count` items, and return them."""
    end = time.monotonic() + 120
    while len(found := function(*arguments)) < count:
        assert process.poll() is None and time.monotonic() < end, (function.__name__, arguments)
        time.sleep(0.01)
    return found


def lines(path):
    return path.read_text().splitlines() if path.is_file() else []


def running(*flags):
    """Return the ids of the processes that pgrep finds with these flags."""
    return [int(number) for number in subprocess.run(["pgrep", *flags], capture_output=True, text=True).stdout.split()]


def workers_of(process, before):
    """Return the ids of the workers of a torchrun that are not in `before`."""
    return [number for number in running("-P", str(process.pid), "-f", "train.py") if number not in before]


@pytest.mark.reliability("R5", "signals to torchrun with 2 processes: saved, at most one step lost, no process left")
def test_signals_to_torchrun(run, cases, figure):
    signals, draw, folder, step = ("SIGUSR1", "SIGTERM", "SIGINT", "SIGUSR2"), random.Random(0), run.root / "asked", 0
    handled = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
    seldom = "--ckpt-every", 9999
    count, rows = cases(1, full=20), folder / "metrics.jsonl"
    for number in range(count):
        with torchrun(run, "asked", 9999, "--signals-to-handle", handled, more=seldom) as process:
            waited(process, lines, rows, count=len(lines(rows)) + draw.randrange(1, 9))
            process.send_signal(getattr(signal, signals[number % 4]))
            assert process.wait(timeout=60) != 0
        (path,) = list_states(folder)
        step, before = int(path.stem), step
        assert (
            f"state of step {step} saved; run the same command to resume" in (run.root / "said").read_text()
            and step > before
        )
        assert step - json.loads(lines(rows)[-1])["step"] in (0, 1)  # rows are written every two steps
        assert not running("-f", f"{run.root}.*--experiment asked")
    for name in ("asked", "never asked"):
        assert worst(run(name, step + 2, *seldom, world=2)) == 0
    assert not differences(folder, outcome(run.root / "never asked"))
    figure(f"{count} of {count}; the run resumes to the bits of an uninterrupted run")


def test_an_error_nobody_foresaw_ends_the_process(run):
    """Although the DataLoader's workers ignore SIGTERM, torchrun can restart."""
    fault = "import train; train.train_step = None; train.run_command(train.main)"
    command = [sys.executable, "-c", fault, *map(str, run.flags("fault", 4))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "TypeError: 'NoneType' object is not callable" in result.stderr


@pytest.mark.reliability("R6", "workers killed under torchrun --max-restarts 3: the run finishes, same bits")
def test_lost_workers(run, cases, figure):
    wanted, draw, lost, launches, steps = cases(1, full=20), random.Random(0), 0, 0, 80
    plain = "--preview-images", 0
    assert worst(run("undisturbed", steps, *plain, world=2)) == 0
    expected = outcome(run.root / "undisturbed")
    while lost < wanted:
        folder, workers = run.root / f"lost{launches}", []
        log = folder / "log.txt"
        with torchrun(run, folder.name, steps, "--max-restarts=3", more=plain) as process:
            for _ in range(min(3, wanted - lost)):
                workers = waited(process, workers_of, process, workers, count=2)
                if draw.random() < 0.5:
                    time.sleep(8 * draw.random())  # during startup
                else:  # after this many rows of metrics
                    waited(process, lines, log, count=len(lines(log)) + draw.randrange(1, 11))
                os.kill(draw.choice(workers), signal.SIGKILL)
                lost += 1
            assert process.wait(timeout=120) == 0, (run.root / "said").read_text()[-3000:]
        assert not differences(folder, expected)
        launches += 1
    figure(f"{lost} workers lost in {launches} launches, {launches} of {launches} with the bits of an undisturbed run")
