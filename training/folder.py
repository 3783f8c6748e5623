"""A run's folder: which one a command trains in, and which of its states it resumes from.

results/NAME/
    states/STEP.safetensors     training states, the newest few
    adapters/STEP.safetensors   adapters, all of them
    samples/STEP.png            previews
    args.json, log.txt, metrics.jsonl
    launch.json                 the launch that began a folder with an automatic name, see `launch_ids`
    aside-STEP/                 what was later than the state that a run went back to
"""

import json
import os
import re
import socket
import sys
from pathlib import Path

from checkpoint.torch_files import check_file
from runtime.files import Lock, atomic_write

AUTOMATIC = re.compile(r"(\d{3,})-(.+)")  # such as 007-DiT-XL-2-finediffusion
KINDS = ("adapters", "samples", "states")  # of files named by their step; states move last, so that a kill loses none


def resolve_run_dir(
    results_dir: str | os.PathLike, experiment: str | None, resume: str | None, default_name: str
) -> tuple[Path, list[Path]]:
    """Return the run's folder, and the states to resume from, best first.

    With --experiment the folder is results_dir/experiment. It resumes from its own states; if it has none, --resume may
    name a state or another run to branch from. Without --experiment, --resume RUN or --resume RUN/states/STATE resumes
    in that run's folder. Otherwise the folder gets a number and `default_name`; a restarted launch finds the folder that
    it began.

    Raises ValueError if --resume is a folder without states, or a state that cannot be read.
    """
    source, states = None, []
    if is_run_or_state(resume):
        path = Path(resume)
        source, states = (path, list_states(path)) if path.is_dir() else (path.parent.parent, [path])
        if not path.is_dir():
            check_file(path)
        if not states:
            raise ValueError(f"{path} has no training state, expected the folder of a run: check the path.")
    root = Path(results_dir)
    if experiment:
        folder = root / experiment
        if source and folder.absolute() == source.absolute():
            return source, states
        return folder, list_states(folder) or states  # a branch, or one that has begun
    if source:
        return source, states
    found = [match for path in root.glob("*-*") if (match := AUTOMATIC.fullmatch(path.name))]
    restarted = restarted_run([root / match[0] for match in found if match[2] == default_name])
    if restarted:
        return restarted, list_states(restarted)
    return root / f"{max((int(match[1]) for match in found), default=-1) + 1:03d}-{default_name}", []


def is_run_or_state(resume: str | None) -> bool:
    """Return whether --resume is a run folder or a training state, not weights to start from."""
    return bool(resume) and (Path(resume).is_dir() or Path(resume).parent.name == "states")


def list_states(folder: Path) -> list[Path]:
    """Return the states of a run from new to old."""
    return sorted(folder.glob("states/*.safetensors"), reverse=True)


def lock_run_dir(folder: Path) -> Lock:
    """Keep other launches out of the folder, and delete unfinished files that a killed run left there.

    Raises ValueError if another process trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder, "training in", "--experiment")
    for part in (*folder.rglob(".*.part"), *folder.rglob(".tmp??????")):  # of `atomic_write`, of safetensors
        part.unlink()
    return lock


def move_aside(folder: Path, step: int) -> str | None:
    """Move states, adapters and previews of later steps than `step` to aside-STEP, if a state is among them.

    Returns a sentence about it, or None if there was nothing to move.
    """
    later = {kind: [path for path in sorted(folder.glob(f"{kind}/[0-9]*")) if step_of(path) > step] for kind in KINDS}
    if not later["states"]:
        return None
    place = folder / f"aside-{step:07d}"
    while place.exists():
        place = place.with_name(place.name + "+")
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        text = metrics.read_text()
        atomic_write(place / metrics.name, lambda part: part.write_text(text))
    for kind in KINDS:
        for path in later[kind]:
            (place / kind).mkdir(parents=True, exist_ok=True)
            os.replace(path, place / kind / path.name)
    count = len(later["states"])
    return f"The run goes back to step {step}: {count} later states, their adapters and metrics are now in {place}."


def step_of(path: Path) -> int:
    """Return the step that a file is named by, or -1 if its name is not a number."""
    return int(path.stem) if path.stem.isdecimal() else -1


# ---- restarted launches --------------------------------------------------------------------------


def launch_ids() -> dict[str, str]:
    """Return what stays the same if this launch is restarted: by torchrun its agent, by Slurm the job."""
    ids = {}
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        agent = os.getppid()
        stat = Path(f"/proc/{agent}/stat")
        begun = stat.read_text().rpartition(")")[2].split()[19] if stat.is_file() else ""  # its start time, in ticks
        ids["torchrun"] = f"{socket.gethostname()} {agent} {begun}"
    if "SLURM_JOB_ID" in os.environ:
        ids["slurm"] = os.environ["SLURM_JOB_ID"]
    return ids


def restarted_run(folders: list[Path]) -> Path | None:
    """Return the newest of the folders that this very command began before its launch was restarted."""
    counts = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "slurm": "SLURM_RESTART_COUNT"}
    ids = {kind: value for kind, value in launch_ids().items() if int(os.environ.get(counts[kind], 0)) > 0}
    for folder in sorted(folders, reverse=True):
        path = folder / "launch.json"
        try:
            began = json.loads(path.read_text()) if path.is_file() else {}
        except ValueError:
            continue
        same = isinstance(began, dict) and any(began.get(kind) == value for kind, value in ids.items())
        if same and began.get("command") == sys.argv[1:]:
            return folder
    return None


def write_launch(folder: Path):
    """Record the launch that begins a folder, if it may be restarted."""
    ids, path = launch_ids(), folder / "launch.json"
    if ids and not path.exists():
        text = json.dumps(ids | {"command": sys.argv[1:]}) + "\n"
        atomic_write(path, lambda part: part.write_text(text))
