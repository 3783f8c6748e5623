"""A run's folder, and the training states in it that let the run go on exactly where it was.

A state holds all that the rest of a training depends on: the trained parameters, their averages, AdamW's moments, the
losses of the row of metrics that was begun, and in its description the step, the epoch, the gradient scaler, the data
and the settings. There are no random states to keep: everything random is a function of the seed and the step.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint.description import STATE
from checkpoint.format import is_adapter, read_description, read_weights, save_safetensors
from checkpoint.loading import load_base_weights, load_weights
from checkpoint.torch_files import check_file
from runtime.files import Lock

TENSOR_KINDS = ("now", "average", "exp_avg", "exp_avg_sq")  # tensors of a state, each by parameter name
# flags that decide the numbers of a run; another batch split, number of processes or length gives the same ones
DECISIVE_FLAGS = (
    "global_seed global_batch_size lr table_lr lr_schedule clip_grad ema_decay ema_warmup flip class_dropout_prob null_prob "
    "mixed_precision"
).split()


# ---- the folder ----------------------------------------------------------------------------------


def resolve_run_dir(results_dir, experiment, resume, default_name):
    """(folder of the run, its states from new to old); `resume`: --resume, where it names a state or a run folder."""
    resume = Path(resume) if is_run_or_state(resume) else None
    if resume and resume.is_dir():
        if not list_states(resume):
            raise ValueError(f"{resume} has no training state, expected a run folder of ours: check the path.")
        return resume, list_states(resume)
    if resume:
        check_file(resume)
        return resume.parent.parent, [resume]
    root = Path(results_dir)
    if experiment:
        return root / experiment, list_states(root / experiment)
    taken = [int(path.name[:3]) for path in root.glob("[0-9][0-9][0-9]-*")]
    return root / f"{max(taken, default=-1) + 1:03d}-{default_name}", []


def is_run_or_state(resume):
    """Whether --resume is a run folder or a state, and not weights to start from."""
    return bool(resume) and (Path(resume).is_dir() or Path(resume).parent.name == "states")


def list_states(folder):
    return sorted(folder.glob("states/*.safetensors"), reverse=True)


def lock_run_dir(folder):
    """Keep other launches out of the folder, see `Lock`, and clear away what a kill left half-written in it."""
    folder.mkdir(parents=True, exist_ok=True)
    held = Lock(folder / "log.txt", "training in", "--experiment")
    for part in (*folder.rglob(".*.part"), *folder.rglob(".tmp??????")):  # ours, and those of safetensors' writer
        part.unlink()
    return held


# ---- reading -------------------------------------------------------------------------------------


def latest_valid_state(states, say=print):
    """(path, tensors, description) of the first of `states`, new to old, that is whole; (None, {}, None) of none.

    Says which are damaged; ValueError where all of them are.
    """
    damaged = []
    for path in states:
        try:
            tensors, description = read_weights(path)
        except ValueError as error:
            damaged.append(path)
            say(f"{error} The state before it is used.")
            continue
        if description is None or description.format != STATE:
            raise ValueError(f"{path} is no training state, expected one that train.py wrote: name another file.")
        return path, tensors, description
    if damaged:
        raise ValueError(
            f"All {len(damaged)} training states of {damaged[0].parent.parent} are damaged, expected a whole one: start anew "
            "from its last adapter with --resume and another --experiment."
        )
    return None, {}, None


def check_same_run(path, saved, now, allow_changes):
    """ValueError where the descriptions of a state and of the run that would go on from it differ in what decides the numbers."""
    for key in ("model", "image_size", "method", "embedder", "hierarchy"):
        if getattr(now, key) != getattr(saved, key):
            raise ValueError(
                f"{path} was begun with --{key.replace('_', '-')} {getattr(saved, key)}, found {getattr(now, key)}: continue with the "
                "settings it was begun with."
            )
    changes = [
        f"--{name.replace('_', '-')} {saved.settings.get(name)} (now {value})"
        for name, value in now.settings.items()
        if saved.settings.get(name) != value
    ]
    changes += ["other images or labels"] if saved.data != now.data else []
    if changes and not allow_changes:
        raise ValueError(
            f"{path} was begun with {', '.join(changes)}: continue with the settings it was begun with, or pass "
            "--allow-changes to go on with the new ones."
        )


def load_base_of(path, description, model, resume=None):
    """Fill the model with the base that the state at `path` was begun from; its own parameters come with `load_state`.

    `resume`: --resume. Where it names weights they must be that base, wherever it lies now, or an adapter on it.
    """
    base, resume = description.base, None if is_run_or_state(resume) else resume
    if resume and (resume == "none") == bool(base):
        raise ValueError(
            f"{path} was begun with --resume {base.path if base else 'none'}, found {resume}: continue with the weights it "
            "was begun with, or choose another --experiment."
        )
    if base:
        on = read_description(resume).base if is_adapter(resume) else None
        place = None if on and on.sha256 == base.sha256 else resume
        load_weights(model, load_base_weights(base, path, place), base.path, new_table=True)


@torch.no_grad()
def load_state(path, tensors, description, parameters, averages, optimizer):
    """Put a state back -> the losses of the row of metrics it had begun. ValueError where it is of another model."""
    kept = {name.removeprefix("row/"): t for name, t in tensors.items() if name.startswith("row/")}
    expected = {f"{kind}/{name}": p.shape for name, p in parameters.items() for kind in TENSOR_KINDS}
    if {name: t.shape for name, t in tensors.items() if not name.startswith("row/")} != expected:
        raise ValueError(
            f"{path} is no training state of this model and method: continue with the settings it was begun with."
        )
    for name, p in parameters.items():
        p.copy_(tensors[f"now/{name}"])
        averages[name].copy_(tensors[f"average/{name}"])
        moments = {key: tensors[f"{key}/{name}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(float(description.updates), device=p.device), **moments}
    return kept


# ---- writing -------------------------------------------------------------------------------------


@torch.no_grad()
def save_state(path, parameters, averages, optimizer, kept, description):
    """`kept`: the losses of the row of metrics that has begun; `description`: of the run, with "step"."""
    tensors = {f"now/{name}": p for name, p in parameters.items()}
    tensors |= {f"average/{name}": a for name, a in averages.items()}
    moments = {name: optimizer.state[p] for name, p in parameters.items()}
    tensors |= {f"{key}/{name}": m[key] for name, m in moments.items() for key in ("exp_avg", "exp_avg_sq")}
    tensors |= {f"row/{name}": t for name, t in kept.items()}
    updates = max(int(m["step"].item()) for m in moments.values())  # fewer than steps, where some were passed over
    save_safetensors(path, tensors, replace(description, format=STATE, updates=updates))


def delete_old_states(path, count):
    """Beside the state at `path`, the last to be written, keep the `count - 1` before it.

    Those of later steps go, too: the run was taken up again before them.
    """
    states = list_states(path.parent.parent)
    mine = states.index(path)
    for other in states[:mine] + states[mine + count :]:
        os.unlink(other)
