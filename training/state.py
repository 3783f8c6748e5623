"""Training states, from which a run resumes exactly.

A state holds all that the rest of a training depends on: the trained parameters, their EMA, AdamW's moments and the
losses of the open row of metrics. Its description holds the step, the epoch, the fp16 gradient scaler, the data and the
settings. It holds no random states: all random draws are functions of the seed and the step.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from checkpoint.description import STATE, ModelDescription
from checkpoint.format import is_adapter, read_description, read_digest, read_weights, save_safetensors
from checkpoint.loading import load_base_weights, load_weights
from finetune import fold_lora
from models import DiT
from runtime.processes import ask_main
from runtime.text import one_line
from training.folder import is_run_or_state, list_states

TENSOR_KINDS = ("now", "average", "exp_avg", "exp_avg_sq")  # tensors of a state, one of each kind per parameter
# the flags that decide a run's numbers; batch splits, the number of processes and the run's length (unless the learning
# rate depends on it) do not
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


def saved_precision(states: list[Path]) -> str:
    """Return the precision of the newest state that can be read, in which its run resumes; "auto" if there is none."""
    for path in states:
        with suppress(ValueError, OSError):  # a damaged state: `latest_valid_state` logs it
            return (read_description(path).settings or {}).get("mixed_precision", "auto")  # an adapter has none
    return "auto"


def choose_state(
    accelerator: Accelerator, states: list[Path]
) -> tuple[Path | None, dict[str, torch.Tensor], ModelDescription | None]:
    """Return the newest intact state as the main process sees it, with the same path and contents on all processes.

    Raises ValueError on all processes if one of them cannot read it or reads another.
    """
    found = None, {}, None

    def choose():
        nonlocal found
        found = latest_valid_state(states)
        return (found[0], read_digest(found[0])) if found[0] else (None, None)

    path, digest = ask_main(accelerator, choose)
    problem = None
    if path and not accelerator.is_main_process:
        try:
            if read_digest(path) != digest:
                raise ValueError(f"{path} has another SHA-256 here")
            found = path, *read_weights(path)
        except (ValueError, OSError) as error:
            problem = one_line(error)
    problems = [text for text in gather_object([problem]) if text]
    if problems:
        raise ValueError(
            f"{len(problems)} of {accelerator.num_processes} processes cannot read {path} as the main process does "
            f"({problems[0]}), expected one results folder for all: put --results-dir on a file system that the nodes share."
        )
    return found


def check_same_run(path: Path, saved: ModelDescription, current: ModelDescription, allow_changes: bool):
    """Raise ValueError if the run that resumes from a state differs from it in model, data or decisive settings.

    path, saved    the state
    current        description of the run that resumes
    allow_changes  accept other data and other settings
    """
    for key in ("model", "image_size", "method", "lora_rank", "lora_targets", "embedder", "hierarchy"):
        before, now = getattr(saved, key), getattr(current, key)
        if before != now:
            raise ValueError(
                f"{path} was started with --{key.replace('_', '-')} {before}, found {now}: resume with the settings it was "
                "started with."
            )
    earlier = saved.settings | {"ema_warmup": saved_warmup(saved)}
    old = "max_steps" not in earlier  # written before the length was recorded
    changes = [
        f"--{name.replace('_', '-')} {earlier.get(name)} (now {value})"
        for name, value in current.settings.items()
        if earlier.get(name) != value and not (name == "max_steps" and old)
    ]
    changes += ["other images or labels"] if saved.data != current.data else []
    if (
        saved.encoder and current.encoder and saved.encoder != current.encoder
    ):  # states of earlier versions have no digest
        changes.append(
            f"latents of another encoder, {saved.encoder[:8]} of --vae {saved.vae} (now {current.encoder[:8]} of {current.vae})"
        )
    if changes and not allow_changes:
        raise ValueError(
            f"{path} was started with {', '.join(changes)}: resume with the settings it was started with, or pass "
            "--allow-changes to use the new ones."
        )


def saved_warmup(saved: ModelDescription) -> int:
    """Return the `warmup` of the EMA of a state; states of earlier versions say whether there is one, which was 10."""
    warmup = saved.settings.get("ema_warmup") or 0
    return 10 if warmup is True else warmup


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
        tensors = fold_lora(load_base_weights(base, path, place)[0], keep=model.state_dict())
        load_weights(model, tensors, base.path, new_table=True)


@torch.no_grad()
def load_state(
    path: Path,
    tensors: dict[str, torch.Tensor],
    description: ModelDescription,
    parameters: dict[str, nn.Parameter],
    frozen: dict[str, torch.Tensor],
    averages: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> dict[str, torch.Tensor]:
    """Restore parameters, EMA and moments from a state, and return the losses of its open row of metrics.

    frozen: the model's other tensors, by name; restored if the run has no base.

    Raises ValueError if the state belongs to another model or method.
    """
    open_row = {name.removeprefix("row/"): t for name, t in tensors.items() if name.startswith("row/")}
    expected = {f"{kind}/{name}": p.shape for name, p in parameters.items() for kind in TENSOR_KINDS}
    if {name: t.shape for name, t in tensors.items() if not name.startswith(("row/", "frozen/"))} != expected:
        raise ValueError(
            f"{path} is not a training state of this model and method: resume with the settings it was started with."
        )
    for name, p in parameters.items():
        p.copy_(tensors[f"now/{name}"])
        averages[name].copy_(tensors[f"average/{name}"])
        moments = {key: tensors[f"{key}/{name}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(float(description.updates), device=p.device), **moments}
    for name, p in frozen.items():
        if f"frozen/{name}" in tensors:  # absent with a base, and from states written before these were kept
            p.copy_(tensors[f"frozen/{name}"])
    return open_row


# ---- writing -------------------------------------------------------------------------------------


@torch.no_grad()
def save_state(
    path: Path,
    parameters: dict[str, nn.Parameter],
    frozen: dict[str, torch.Tensor],
    averages: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    open_row: dict[str, torch.Tensor],
    description: ModelDescription,
):
    """Write a training state.

    frozen       the model's other tensors, by name; written if the run has no base to take them from
    averages     EMA of the parameters, by name
    open_row     losses of the open row of metrics, see `training.logger.LossGuard`
    description  of the run at this step, with epoch and scaler
    """
    tensors = {f"now/{name}": p for name, p in parameters.items()}
    tensors |= {f"average/{name}": average for name, average in averages.items()}
    moments = {name: optimizer.state[p] for name, p in parameters.items()}
    tensors |= {f"{key}/{name}": m[key] for name, m in moments.items() for key in ("exp_avg", "exp_avg_sq")}
    tensors |= {f"row/{name}": t for name, t in open_row.items()}
    tensors |= {} if description.base else {f"frozen/{name}": t for name, t in frozen.items()}
    updates = max(int(m["step"].item()) for m in moments.values())  # fewer than steps, if some were skipped
    save_safetensors(path, tensors, replace(description, format=STATE, updates=updates))


def delete_old_states(path: Path, count: int):
    """Keep the state at `path` and the `count - 1` before it; delete those before them."""
    states = list_states(path.parent.parent)
    for other in states[states.index(path) + count :]:
        os.unlink(other)
