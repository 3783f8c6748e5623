"""Full and read-only disks, missing permissions, two launches into one folder: one sentence, and no partial files."""

import json
import os
import random
import resource
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.launch import launch, without_privileges, worst
from helpers.sampling_runs import files
from helpers.tiny_files import tree
from helpers.tiny_runs import SAVING, differences, outcome

import sample_ddp
import train
from checkpoint.format import read_weights
from dataset.latents import LatentData
from tools import encode_latents
from training import setup
from training.folder import list_states
from training.state import latest_valid_state

FLAGS = [*SAVING, "--preview-images", "2"]
PAGE, PATIENT = 4096, {"patience": 60}  # if one process fails, the others must exit by themselves
FULL = "No space left on device", "File too large"


# ---- disks -----------------------------------------------------------------------------------------


@contextmanager
def mounted(folder, *commands):
    """Return the path of a new mount as another process sees it, or None if mounting is not allowed."""
    folder.mkdir()
    if not shutil.which("unshare"):
        yield None
        return
    script = " && ".join([*(f"{command} {folder}" for command in commands), "echo", "exec cat"])
    program = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with subprocess.Popen(program, **pipes) as process:
        yield Path(f"/proc/{process.pid}/root{folder}") if process.stdout.readline() else None
        process.stdin.close()


class Disk:
    """A file system of 16 MB or, if none can be mounted, a folder with a limit on the size of each file."""

    def __init__(self, path, folder):
        self.path, self.limited = path or folder, path is None
        self.ballast, self.limit = self.path / "ballast", resource.RLIM_INFINITY

    def free(self):
        space = os.statvfs(self.path)
        return space.f_bavail * space.f_frsize

    def leave(self, room):
        """Leave this many bytes free, or limit each file to them."""
        if self.limited:
            self.limit = max(room, 4 * PAGE)  # the program's output is a file too
        elif self.free() > room:
            with open(self.ballast, "w") as file:
                os.posix_fallocate(file.fileno(), 0, self.free() - room)

    def clear(self):
        self.limit = resource.RLIM_INFINITY
        self.ballast.unlink(missing_ok=True)

    def prepare(self, rank):
        """Return options of `launch`."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


@pytest.fixture
def disk(tmp_path):
    with mounted(tmp_path / "disk", "mount -t tmpfs -o size=16m none") as path:
        yield Disk(path, tmp_path / "disk")


def used(folder):
    """Return the disk space that the files below a folder take."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


def said(folder, rank=0):
    """Return the last line on stderr, below the progress bar."""
    text = (folder / f"err{rank}").read_text()
    assert "Traceback" not in text, text
    return text.split("\r")[-1].strip().split("\n")[-1]


def check_refusal(codes, folder, program, *words):
    """Assert that every process exited with code 2 and one sentence that has one of the words."""
    assert set(codes.values()) == {2}, [(folder / f"err{rank}").read_text()[-2000:] for rank in codes]
    for rank in codes:
        line = said(folder, rank)
        assert line.startswith(f"{program}: ") and line.endswith(".") and any(word in line for word in words), line


# ---- training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(images, base, tmp_path_factory):
    """Return run(folder, steps, *flags, **options of launch), which trains there and returns the exit codes."""
    root = tmp_path_factory.mktemp("disk")

    def run(folder, steps, **options):
        start = ("--data-path", images, "--resume", base, "--results-dir", folder.parent, "--experiment", folder.name)
        return launch(train.main, [*FLAGS, *start, "--max-steps", steps], root, **PATIENT | options)

    run.root = root
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PREVIEW, "steps", 1)
        yield run


@pytest.fixture(scope="module")
def whole(run):
    """Return whole(world), which returns the folder and the outcome of a run of eight steps, made on first use."""
    made = {}

    def whole(world):
        if world not in made:
            folder = run.root / f"whole{world}"
            assert worst(run(folder, 8, world=world)) == 0
            made[world] = folder, outcome(folder)
        return made[world]

    return whole


def begin(folder, finished):
    """Reset the folder to that of a run killed after its first state."""
    shutil.copytree(finished, folder)
    for path in folder.rglob("*"):
        if path.stem in ("0000006", "0000008"):
            path.unlink()


def check_whole(folder, expected):
    """Assert that all files of a run equal those of the undisturbed run; logs may end within a line."""
    assert not list(folder.rglob(".*"))
    for path in folder.rglob("*.safetensors"):
        tensors, description = read_weights(path)
        name = f"{path.parent.name} {path.stem}"
        known = expected if name in expected else {}  # the last state only
        assert all(known.get(f"{name} {key}", content) == content for key, content in numbers(tensors))
        assert description == known.get(name, description)
    for path in folder.glob("samples/*"):
        assert path.read_bytes() == expected[path.name]
    if (folder / "args.json").exists():
        json.loads((folder / "args.json").read_text())
    rows = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
    assert all(json.loads(row)["step"] in (2, 4, 6, 8) for row in rows.split("\n")[:-1])
    states = list_states(folder)
    return states and latest_valid_state(states, pytest.fail)[0]


def numbers(tensors):
    return ((key, tensor.numpy().tobytes()) for key, tensor in tensors.items())


@pytest.mark.reliability("R12", "train.py, 1 and 2 ranks, on a full disk: last state intact, code 2, and it resumes")
def test_training_on_a_full_disk(run, whole, disk, cases, figure):
    count, draw, rooms = cases(3, full=10), random.Random(0), []
    for case in range(count):
        world, begun = 2 - case % 2, case % 4 in (1, 2)
        finished, expected = whole(world)
        folder, state = disk.path / f"run{case}", None
        if begun:
            begin(folder, finished)
            state = list_states(folder)[0]
        need = used(finished) - used(folder) if not disk.limited else list_states(finished)[0].stat().st_size
        share = ((case + draw.random()) / count) ** 4  # mostly small ones, at which even the logs do not fit
        rooms.append(int(share * (need - PAGE)) // PAGE * PAGE)
        disk.leave(rooms[-1])
        before = state and state.read_bytes()
        check_refusal(run(folder, 8, world=world, prepare=disk.prepare), run.root, "train.py", *FULL)
        last = check_whole(folder, expected)
        assert not state or last >= state and state.read_bytes() == before
        disk.clear()
        assert worst(run(folder, 8, world=world)) == 0 and not differences(folder, expected), rooms
        shutil.rmtree(folder)
    figure(f"{count} of {count} budgets of {rooms[0] // 1024} to {rooms[-1] // 1024} KB{' a file' * disk.limited}")


# ---- sampling and encoding -------------------------------------------------------------------------


def grown(disk):
    """Return options of `launch` for a disk that fills up after the program has checked for space."""

    def prepare(rank):
        disk.prepare(rank)
        shutil.disk_usage = lambda path: SimpleNamespace(free=1e12)

    return dict(prepare=prepare, **PATIENT)


@pytest.mark.reliability(
    "R12", "sample_ddp.py, 1 and 2 ranks, on a disk that fills up: no incomplete file, and it resumes"
)
def test_sampling_on_a_full_disk(adapter, tmp_path, disk, cases, figure):
    if disk.limited:
        pytest.skip("nothing can be mounted here, and all its files are small")
    flags = "--ckpt", adapter, "--num-fid-samples", 11, "--num-sampling-steps", 2, "--format", "both"

    def run(root, **options):
        return launch(sample_ddp.main, [*flags, "--sample-dir", root, "--name", "x"], tmp_path, **options)

    assert worst(run(tmp_path)) == 0
    reference, count, draw = files(tmp_path, "x"), cases(2, full=10), random.Random(0)
    need = used(tmp_path / "x") + PAGE  # the npz and, beside it, rows and digests
    for case in range(count):
        world = 1 + case % 2
        disk.leave(int((case + draw.random()) / count * need) // PAGE * PAGE)
        codes = run(disk.path, world=world, **grown(disk))
        first = next(rank for rank in codes if codes[rank])  # the others lose contact with it
        check_refusal({first: codes[first]}, tmp_path, "sample_ddp.py", *FULL)
        found = files(disk.path, "x")
        assert all(found[path] == reference[path] for path in found if path not in ("/rows", "/digests"))
        disk.clear()
        assert worst(run(disk.path, world=world)) == 0 and files(disk.path, "x") == reference
        shutil.rmtree(disk.path / "x")
        (disk.path / "x.npz").unlink()
    figure(f"{count} of {count} budgets")


@pytest.mark.reliability(
    "R12", "tools.encode_latents on a disk that fills up: nothing incomplete is accepted, and it resumes"
)
def test_encoding_on_a_full_disk(images, tmp_path, disk, cases, figure, monkeypatch):
    monkeypatch.setattr(encode_latents, "CHUNK", 2)
    flags = "--vae", "none", "--image-size", 8, "--num-workers", 0, "--data-path", images, "--out"

    def run(out, **options):
        return launch(encode_latents.main, [*flags, out], tmp_path, **options)

    assert worst(run(tmp_path / "x")) == 0
    reference, count, draw, out = tree(tmp_path / "x"), cases(2, full=10), random.Random(0), disk.path / "x"
    for case in range(count):
        need = max(map(len, reference.values())) if disk.limited else used(tmp_path / "x")
        disk.leave(int((case + draw.random()) / count * need) // PAGE * PAGE)
        check_refusal(run(out, **grown(disk)), tmp_path, "encode_latents.py", *FULL)
        assert not (out / "latents.json").exists() and not list(out.rglob(".*"))
        disk.clear()
        assert worst(run(out)) == 0 and list(tree(out).values()) == list(reference.values())
        LatentData(out).verify()
        shutil.rmtree(out)
    figure(f"{count} of {count} budgets")


# ---- folders that cannot be written ----------------------------------------------------------------


def check_left_alone(run, folder, world, words, **options):
    before = tree(folder.parent)
    check_refusal(run(folder, 9, world=world, **options), run.root, "train.py", words)
    assert tree(folder.parent) == before


@pytest.mark.reliability("R12", "results on a read-only file system: code 2, nothing changed")
@pytest.mark.parametrize("world", [1, 2])
def test_a_read_only_file_system(world, run, whole, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(whole(world)[0], results / "begun")
    with mounted(tmp_path / "disk", f"mount --bind {results}", "mount -o remount,ro,bind") as path:
        if path is None:
            pytest.skip("nothing can be mounted here")
        for name in ("begun", "new"):
            check_left_alone(run, path / name, world, "Read-only file system")


@pytest.mark.reliability("R12", "a results folder without write permission: code 2, nothing changed")
@pytest.mark.parametrize("world", [1, 2])
def test_no_permission(world, run, whole, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(whole(world)[0], results / "begun")
    for path in (results, *results.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for name in ("begun", "new"):
        check_left_alone(run, results / name, world, "Permission denied", prepare=without_privileges)
    for path in (results, *results.rglob("*")):
        path.chmod(0o755)


@pytest.mark.reliability(
    "R12", "a state without read permission: code 2, nothing changed, the state before it is not used"
)
def test_a_state_that_may_not_be_read(run, whole, tmp_path):
    folder = shutil.copytree(whole(1)[0], tmp_path / "results/begun")
    before, state = tree(folder), list_states(folder)[0]
    state.chmod(0)
    codes = run(folder, 9, prepare=without_privileges)
    state.chmod(0o644)
    check_refusal(codes, run.root, "train.py", "0000008.safetensors cannot be used (Permission denied)")
    assert tree(folder) == before


# ---- two launches at the same moment ---------------------------------------------------------------


def together(folder, owner, name):
    """Make each of two processes a launch of its own, and let both call owner.name at the same moment."""

    def prepare(rank):
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[variable]
        function = getattr(owner, name)

        def waits(*arguments):
            (folder / f"here{rank}").touch()
            end = time.monotonic() + 60
            while not (folder / f"here{1 - rank}").exists() and time.monotonic() < end:
                pass
            return function(*arguments)

        setattr(owner, name, waits)

    return dict(world=2, prepare=prepare, **PATIENT)


def check_one_refused(codes, folder, program, words):
    assert sorted(codes.values()) == [0, 2], codes
    refused = next(rank for rank in codes if codes[rank])
    check_refusal({refused: 2}, folder, program, words)


@pytest.mark.reliability("R12", "two launches of train.py into one folder: one is refused, the other is unaffected")
def test_two_trainings(run, whole, tmp_path, cases, figure):
    count = cases(2, full=10)
    for case in range(count):
        folder = tmp_path / f"run{case}"
        finished, expected = whole(1)
        if case % 2:
            begin(folder, finished)
            (folder / "states/.0000006.safetensors.1.part").touch()  # left by the kill
        codes = run(folder, 8, **together(tmp_path, setup, "lock_run_dir"))
        check_one_refused(codes, run.root, "train.py", "Another process is training in")
        assert not differences(folder, expected) and not list(folder.rglob(".*"))
        for path in tmp_path.glob("here*"):
            path.unlink()
    figure(f"{count} of {count}")


@pytest.mark.reliability(
    "R12", "two launches of sample_ddp.py into one folder: one is refused, the other is unaffected"
)
def test_two_samplings(adapter, tmp_path, cases, figure):
    count = cases(2, full=10)
    flags = "--ckpt", adapter, "--num-fid-samples", 11, "--num-sampling-steps", 9, "--sample-dir", tmp_path, "--name"
    assert worst(launch(sample_ddp.main, [*flags, "alone"], tmp_path)) == 0
    for case in range(count):
        codes = launch(sample_ddp.main, [*flags, case], tmp_path, **together(tmp_path, sample_ddp.Store, "prepare"))
        check_one_refused(codes, tmp_path, "sample_ddp.py", "Another process is sampling into")
        assert files(tmp_path, str(case)) == files(tmp_path, "alone")
        for path in tmp_path.glob("here*"):
            path.unlink()
    figure(f"{count} of {count}")


@pytest.mark.reliability(
    "R12", "two launches of tools.encode_latents into one folder: one is refused, the other is unaffected"
)
def test_two_encodings(images, tmp_path, cases, figure):
    count = cases(2, full=10)
    flags = "--vae", "none", "--image-size", 8, "--num-workers", 1, "--data-path", images, "--out"
    assert worst(launch(encode_latents.main, [*flags, tmp_path / "alone"], tmp_path)) == 0
    for case in range(count):
        out = tmp_path / str(case)
        codes = launch(encode_latents.main, [*flags, out], tmp_path, **together(tmp_path, encode_latents, "prepare"))
        check_one_refused(codes, tmp_path, "encode_latents.py", "Another process is encoding into")
        assert list(tree(out).values()) == list(tree(tmp_path / "alone").values())
        for path in tmp_path.glob("here*"):
            path.unlink()
    figure(f"{count} of {count}")
