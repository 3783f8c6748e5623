"""A run's folder, and the training states in it that the run resumes from exactly.

A state holds all that the rest of a training depends on: the trained parameters, their EMA, AdamW's moments and the
losses of the open row of metrics. Its description holds the step, the epoch, the fp16 gradient scaler, the data and the
settings. It holds no random states: all random draws are functions of the seed and the step.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from checkpoint.description import STATE, ModelDescription
from checkpoint.format import is_adapter, read_description, read_weights, save_safetensors
from checkpoint.loading import load_base_weights, load_weights
from checkpoint.torch_files import check_file
from models import DiT
from runtime.files import Lock

TENSOR_KINDS = ("now", "average", "exp_avg", "exp_avg_sq")  # tensors of a state, one of each kind per parameter
# the flags that decide a run's numbers; batch splits, the number of processes and the length of the run do not
DECISIVE_FLAGS = (
    "global_seed",
    "global_batch_size",
    "lr",
    "table_lr",
    "lr_schedule",
    "clip_grad",
    "ema_decay",
    "ema_warmup",
    "flip",
    "class_dropout_prob",
    "null_prob",
    "mixed_precision",
)


# ---- the run's folder ----------------------------------------------------------------------------


def resolve_run_dir(
    results_dir: str | os.PathLike, experiment: str | None, resume: str | None, default_name: str
) -> tuple[Path, list[Path]]:
    """Return the run's folder, and its states from new to old.

    resume        --resume; if it is a state or a run folder, that run is resumed
    default_name  name of the folder after its number, if neither --experiment nor --resume decides

    Raises ValueError if --resume is a folder without states, or a state that cannot be read.
    """
    if is_run_or_state(resume):
        path = Path(resume)
        if not path.is_dir():
            check_file(path)
            return path.parent.parent, [path]
        states = list_states(path)
        if not states:
            raise ValueError(f"{path} has no training state, expected the folder of a run: check the path.")
        return path, states
    root = Path(results_dir)
    if experiment:
        return root / experiment, list_states(root / experiment)
    numbers = [int(path.name[:3]) for path in root.glob("[0-9][0-9][0-9]-*")]
    return root / f"{max(numbers, default=-1) + 1:03d}-{default_name}", []


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


# ---- reading -------------------------------------------------------------------------------------


def latest_valid_state(
    states: list[Path], log: Callable[[str], object] = print
) -> tuple[Path | None, dict[str, torch.Tensor], ModelDescription | None]:
    """Return (path, tensors, description) of the first intact state, or (None, {}, None) if there are no states.

    states: from new to old. Damaged ones are logged. Raises ValueError if all are damaged, or for an adapter.
    """
    damaged = []
    for path in states:
        try:
            tensors, description = read_weights(path)
        except ValueError as error:
            damaged.append(path)
            log(f"{error} Using the state before it.")
            continue
        if description is None or description.format != STATE:
            raise ValueError(f"{path} is not a training state, expected one that train.py wrote: choose another file.")
        return path, tensors, description
    if damaged:
        raise ValueError(
            f"All {len(damaged)} training states of {damaged[0].parent.parent} are damaged, expected an intact one: start "
            "from its last adapter with --resume and another --experiment."
        )
    return None, {}, None


def check_same_run(path: Path, saved: ModelDescription, current: ModelDescription, allow_changes: bool):
    """Raise ValueError if the run that resumes from a state differs from it in model, data or decisive settings.

    path, saved    the state
    current        description of the run that resumes
    allow_changes  accept other data and other settings
    """
    for key in ("model", "image_size", "method", "embedder", "hierarchy"):
        before, now = getattr(saved, key), getattr(current, key)
        if before != now:
            raise ValueError(
                f"{path} was started with --{key.replace('_', '-')} {before}, found {now}: resume with the settings it was "
                "started with."
            )
    changes = [
        f"--{name.replace('_', '-')} {saved.settings.get(name)} (now {value})"
        for name, value in current.settings.items()
        if saved.settings.get(name) != value
    ]
    changes += ["other images or labels"] if saved.data != current.data else []
    if changes and not allow_changes:
        raise ValueError(
            f"{path} was started with {', '.join(changes)}: resume with the settings it was started with, or pass "
            "--allow-changes to use the new ones."
        )


def load_run_base(path: Path, description: ModelDescription, model: DiT, resume: str | None = None):
    """Load the base weights of a run into the model; the trained parameters come with `load_state`.

    path, description  a state of the run
    resume             --resume; if it is weights, they must be that base, in any place, or an adapter on it

    Raises ValueError if they are not.
    """
    base, resume = description.base, None if is_run_or_state(resume) else resume
    if resume and (resume == "none") == bool(base):
        raise ValueError(
            f"{path} was started with --resume {base.path if base else 'none'}, found {resume}: resume with the weights it "
            "was started with, or choose another --experiment."
        )
    if base:
        adapter_base = read_description(resume).base if is_adapter(resume) else None
        place = None if adapter_base and adapter_base.sha256 == base.sha256 else resume
        load_weights(model, load_base_weights(base, path, place), base.path, new_table=True)


@torch.no_grad()
def load_state(
    path: Path,
    tensors: dict[str, torch.Tensor],
    description: ModelDescription,
    parameters: dict[str, nn.Parameter],
    averages: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> dict[str, torch.Tensor]:
    """Restore parameters, EMA and moments from a state, and return the losses of its open row of metrics.

    Raises ValueError if the state belongs to another model or method.
    """
    open_row = {name.removeprefix("row/"): t for name, t in tensors.items() if name.startswith("row/")}
    expected = {f"{kind}/{name}": p.shape for name, p in parameters.items() for kind in TENSOR_KINDS}
    if {name: t.shape for name, t in tensors.items() if not name.startswith("row/")} != expected:
        raise ValueError(
            f"{path} is not a training state of this model and method: resume with the settings it was started with."
        )
    for name, p in parameters.items():
        p.copy_(tensors[f"now/{name}"])
        averages[name].copy_(tensors[f"average/{name}"])
        moments = {key: tensors[f"{key}/{name}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(float(description.updates), device=p.device), **moments}
    return open_row


# ---- writing -------------------------------------------------------------------------------------


@torch.no_grad()
def save_state(
    path: Path,
    parameters: dict[str, nn.Parameter],
    averages: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    open_row: dict[str, torch.Tensor],
    description: ModelDescription,
):
    """Write a training state.

    averages     EMA of the parameters, by name
    open_row     losses of the open row of metrics, see `training.logger.LossGuard`
    description  of the run at this step, with epoch and scaler
    """
    tensors = {f"now/{name}": p for name, p in parameters.items()}
    tensors |= {f"average/{name}": average for name, average in averages.items()}
    moments = {name: optimizer.state[p] for name, p in parameters.items()}
    tensors |= {f"{key}/{name}": m[key] for name, m in moments.items() for key in ("exp_avg", "exp_avg_sq")}
    tensors |= {f"row/{name}": t for name, t in open_row.items()}
    updates = max(int(m["step"].item()) for m in moments.values())  # fewer than steps, if some were skipped
    save_safetensors(path, tensors, replace(description, format=STATE, updates=updates))


def delete_old_states(path: Path, count: int):
    """Keep the state at `path`, written last, and the `count - 1` before it; delete the others.

    States of later steps are deleted too: the run was resumed before them.
    """
    states = list_states(path.parent.parent)
    index = states.index(path)
    for other in states[:index] + states[index + count :]:
        os.unlink(other)
