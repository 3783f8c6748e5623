"""Training runs of a few steps: flags and outcomes."""

import json

from checkpoint.format import read_weights
from training.folder import list_states

DEFAULT_AVERAGE = "--model DiT-Ti/2 --vae none --image-size 8 --global-batch-size 4 --num-workers 0 --lr 1e-3".split()
# the default warm-up depends on the length of a run, and tests stop runs by other lengths:
TINY = [*DEFAULT_AVERAGE, *"--ema-decay 0.5 --ema-warmup 0".split()]
SAVING = [*TINY, *"--log-every 2 --ckpt-every 3".split()]  # two steps to a row of metrics, three to a state
SPEEDS = ("steps_per_s", "images_per_s", "memory_gb")


def outcome(folder):
    """Return the results of a run by name, without times: last state, adapters, sample grids and rows of metrics."""
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
    """Return the names of the results that differ from an earlier `outcome`."""
    found = outcome(folder)
    return [name for name in sorted(found | expected) if found.get(name) != expected.get(name)]
