"""Which folder a command trains in, which state it resumes from, and that nothing of another run is changed."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.launch import launch
from helpers.tiny_files import tree
from helpers.tiny_runs import SAVING, differences, outcome

import train
from checkpoint.format import read_weights
from training import folder as run_folder
from training import state
from training.folder import list_states, resolve_run_dir

OWN = pytest.mark.reliability("R13", "branches and going back: no other run is changed, and no state is deleted")
ONE = pytest.mark.reliability("R14", "one state for all processes, or all are refused")
FLAGS = [*SAVING, *"--preview-images 0 --max-steps 12".split()]


@pytest.fixture(scope="module")
def flags(images, base, tmp_path_factory):
    """flags(*more) -> those of a run of 12 steps with a state every 3."""
    root = tmp_path_factory.mktemp("folders")

    def flags(*more, start=base):
        return [*FLAGS, "--data-path", images, "--resume", start, "--results-dir", root, *more]

    flags.root = root
    return flags


@pytest.fixture(scope="module")
def finished(command, flags):
    result = command(train.main, *flags("--experiment", "finished", "--keep-states", 9))
    assert result.code == 0, result.err
    return flags.root / "finished"


def steps(folder):
    return [int(path.stem) for path in reversed(list_states(folder))]


def rows(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- branches and going back ---------------------------------------------------------------------


@OWN
def test_a_branch_leaves_the_run_as_it_is(command, flags, finished):
    before, state = tree(finished), finished / "states/0000006.safetensors"
    branch = "--experiment", "branch", "--lr", "0.5", "--allow-changes"
    assert command(train.main, *flags(*branch, "--max-steps", 8, start=state)).code == 0
    assert tree(finished) == before
    folder = flags.root / "branch"
    assert steps(folder) == [8] and rows(folder) == [8]
    # the same command resumes the branch, not the state that it left
    assert command(train.main, *flags(*branch, "--max-steps", 10, start=state)).code == 0
    assert steps(folder) == [8, 9, 10] and rows(folder) == [8, 10] and tree(finished) == before


@OWN
def test_a_branch_with_the_same_settings_has_the_run_s_numbers(command, flags, finished):
    branch = "--experiment", "twin", "--keep-states", 9
    assert command(train.main, *flags(*branch, start=finished / "states/0000006.safetensors")).code == 0
    twin, expected = outcome(flags.root / "twin"), outcome(finished)
    later = {name for name in expected if int(name.split()[1].split(".")[0]) > 6}
    assert twin.keys() == later and all(twin[name] == expected[name] for name in later)


@OWN
def test_going_back_moves_later_states_aside(command, flags, finished):
    folder = flags.root / "back"
    shutil.copytree(finished, folder)
    again = flags("--keep-states", 9, start=folder / "states/0000006.safetensors")
    result = command(train.main, *again, "--max-steps", 8)
    assert (
        result.code == 0
        and f"2 later states, their adapters and metrics are now in {folder}/aside-0000006" in result.out
    )
    assert steps(folder) == [3, 6, 8] and rows(folder) == [2, 4, 6, 8]
    aside = folder / "aside-0000006"
    for kind in ("states", "adapters"):
        for step in (9, 12):
            name = f"{kind}/{step:07d}.safetensors"
            assert (aside / name).read_bytes() == (finished / name).read_bytes()
    assert rows(aside) == [2, 4, 6, 8, 10, 12]
    assert command(train.main, *again).code == 0  # a second time
    assert steps(folder) == [3, 6, 9, 12] and not differences(folder, outcome(finished))
    assert (folder / "aside-0000006+/states/0000008.safetensors").is_file()


def test_automatic_folders_are_numbered_beyond_999(tmp_path):
    for number in ("000", "998", "999", "1000", "12-no-number", "abc"):
        (tmp_path / f"{number}-DiT").mkdir()
    assert resolve_run_dir(tmp_path, None, None, "DiT") == (tmp_path / "1001-DiT", [])


# ---- one state for all processes -----------------------------------------------------------------


@ONE
def test_all_processes_take_the_main_process_s_state(flags, finished, tmp_path):
    """A stale listing on another node decides nothing."""
    folder = flags.root / "stale"
    shutil.copytree(finished, folder)

    def prepare(rank):
        if rank == 1:
            run_folder.list_states = lambda folder: pytest.fail("asked the file system")

    more = flags("--experiment", "stale", "--keep-states", 9, "--max-steps", 14)
    assert launch(train.main, more, tmp_path, world=2, prepare=prepare) == {0: 0, 1: 0}
    assert steps(folder) == [3, 6, 9, 12, 14]


@ONE
@pytest.mark.parametrize("problem", ["another file", "no file"])
def test_processes_that_read_something_else_are_all_refused(problem, flags, finished, tmp_path):
    folder = flags.root / problem.replace(" ", "-")
    shutil.copytree(finished, folder)
    before = tree(folder)

    def prepare(rank):
        if rank == 1:
            path = folder / "states/0000009.safetensors" if problem == "another file" else folder / "lost.safetensors"
            read = state.read_digest
            state.read_digest = lambda _: read(path)

    codes = launch(
        train.main, flags("--experiment", folder.name, "--max-steps", 14), tmp_path, world=2, prepare=prepare
    )
    assert codes == {0: 2, 1: 2} and tree(folder) == before
    said = [(tmp_path / f"err{rank}").read_text() for rank in range(2)]
    assert all("1 of 2 processes cannot read" in text and "file system that the nodes share" in text for text in said)


# ---- restarted launches --------------------------------------------------------------------------


def test_a_restarted_launch_finds_the_folder_that_it_began(command, flags, finished, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    start = [flag if flag != flags.root else tmp_path for flag in flags()]
    command_line = [*start, "--max-steps", 3]
    assert command(train.main, *command_line).code == 0
    first = tmp_path / "000-DiT-Ti-2-finediffusion"
    assert steps(first) == [3] and json.loads((first / "launch.json").read_text())["slurm"] == "17"
    assert command(train.main, *command_line).code == 0  # not restarted: another run
    assert steps(tmp_path / "001-DiT-Ti-2-finediffusion") == [3]
    shutil.rmtree(tmp_path / "001-DiT-Ti-2-finediffusion")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert command(train.main, *command_line).code == 0 and steps(first) == [3]
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert command(train.main, *command_line).code == 0  # another job
    assert (tmp_path / "001-DiT-Ti-2-finediffusion").is_dir()


@pytest.mark.parametrize(
    "experiment, resume, words",
    [("a", None, "run the same command to resume"), (None, "x.pt", "with --resume results/a to resume")],
)
def test_how_to_resume_is_said(experiment, resume, words):
    args, run = SimpleNamespace(experiment=experiment, resume=resume), SimpleNamespace(folder="results/a")
    assert train.how_to_resume(args, run).endswith(words)


# ---- settings that decide numbers ----------------------------------------------------------------


def test_the_length_is_decisive_with_a_cosine_schedule(command, flags):
    cosine = "--experiment", "cosine", "--lr-schedule", "cosine"
    assert command(train.main, *flags(*cosine, "--max-steps", 3)).code == 0
    result = command(train.main, *flags(*cosine, "--max-steps", 6))
    assert result.code == 2 and "--max-steps 3 (now 6)" in result.err
    assert command(train.main, *flags(*cosine, "--max-steps", 6, "--allow-changes")).code == 0


@pytest.mark.parametrize("batch", [8, 2])
def test_another_batch_size_from_a_state_within_a_row(batch, command, flags, finished):
    folder = flags.root / f"batch{batch}"
    shutil.copytree(finished, folder)
    start = folder / "states/0000003.safetensors"  # rows have 2 steps
    more = "--allow-changes", "--global-batch-size", batch, "--max-steps", 5
    assert command(train.main, *flags(*more, start=start)).code == 0
    assert rows(folder) == [2, 4, 5]


def test_a_state_without_a_base_holds_the_frozen_weights(command, flags):
    """Another seed would draw others."""
    random = "--experiment", "random", "--method", "bitfit"
    assert command(train.main, *flags(*random, "--max-steps", 3, start="none")).code == 0
    more = "--max-steps", 4, "--global-seed", 1, "--allow-changes"
    assert command(train.main, *flags(*random, *more, start="none")).code == 0
    first, second = (read_weights(flags.root / f"random/adapters/000000{step}.safetensors")[0] for step in (3, 4))
    frozen = [name for name in first if name.endswith("mlp.fc1.weight")]
    assert frozen and all(torch.equal(first[name], second[name]) for name in frozen)
    state, _ = read_weights(flags.root / "random/states/0000004.safetensors")
    assert all(torch.equal(state[f"frozen/{name}"], first[name]) for name in frozen)
    with_base, _ = read_weights(flags.root / "cosine/states/0000003.safetensors")
    assert not any(name.startswith("frozen/") for name in with_base)
