"""Trainings of a few steps: their flags, and all that they leave."""

import json

from checkpoint.format import read_weights
from training.state import list_states

TINY = (
    "--model DiT-Ti/2 --vae none --image-size 8 --global-batch-size 4 --num-workers 0 --lr 1e-3 --ema-decay 0.5".split()
)
SAVING = [*TINY, *"--log-every 2 --ckpt-every 3".split()]  # two steps to a row of metrics, three to a state
SPEEDS = ("steps_per_s", "images_per_s", "memory_gb")


def outcome(folder):
    """All that a run leaves but for the times, by name: its last state, its adapters, its grids and the rows of losses."""
    found = {path.name: path.read_bytes() for path in folder.glob("samples/[0-9]*")}
    for path in (list_states(folder)[0], *folder.glob("adapters/[0-9]*")):
        tensors, description = read_weights(path)
        name = f"{path.parent.name} {path.stem}"
        found |= {name: description} | {f"{name} {key}": tensor.numpy().tobytes() for key, tensor in tensors.items()}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert f"row {row['step']}" not in found
        found[f"row {row['step']}"] = {key: value for key, value in row.items() if key not in SPEEDS}
    return found


def differences(folder, expected):
    found = outcome(folder)
    return [name for name in sorted(found | expected) if found.get(name) != expected.get(name)]
