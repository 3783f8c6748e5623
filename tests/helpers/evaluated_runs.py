"""Run folders with adapters, metrics.jsonl and evaluations, for the tests of tools.figures."""

import json
from dataclasses import replace

import torch
from helpers.tiny_models import described

from checkpoint.description import ADAPTER
from checkpoint.format import save_safetensors
from hierarchy import Hierarchy
from runtime.files import sha256

SETTINGS = {
    "global_seed": 0,
    "num_fid_samples": 100,
    "sampler": "ddpm",
    "num_sampling_steps": 250,
    "guidance": "superclass",
    "cfg_scale": 4.0,
    "labels": "balanced",
    "hierarchy": "h",
    "image_size": 8,
}
LETTERS = Hierarchy(["a", "b", "c"], ["x", "y"], [0, 1, 1])


class EvaluatedRuns:
    """Write runs below `root`; `files[name]` lists the metrics.json of a run."""

    def __init__(self, root):
        self.root, self.files = root, {}

    def write(self, name, method="finediffusion", fids=None, speed=2.0, hierarchy=LETTERS, settings=None, **changes):
        """Write a run and return it as NAME=FOLDER.

        fids: {step: FID}; speed: steps per second, half of it in the later half of each interval
        settings: sampling settings other than SETTINGS; changes: fields of the adapters' description
        """
        folder, rows = self.root / "results" / name, []
        self.files[name] = []
        for step, fid in (fids or {100: 20.0, 200: 10.0}).items():
            adapter = folder / f"adapters/{step:07d}.safetensors"
            tensors = {"x": torch.tensor([float(step), float(len(self.files))])}
            description = replace(described(hierarchy, method, step=step, format=ADAPTER), **changes)
            adapter.parent.mkdir(parents=True, exist_ok=True)
            save_safetensors(adapter, tensors, description)
            report = {
                "overall": {"fid": fid, "kid": fid / 1000, "lpips": 0.5, "features": {"dino": {"fd": 3.0}}},
                "superclasses": {each: {"fid": fid + 1 + i} for i, each in enumerate(hierarchy.superclasses)},
                "comparable": True,
                "not_comparable": [],
                "real": {"n": 90, "pixels": "a" * 64},
                "fake": {"n": 100},
                "choices": {"networks": [{"name": "inception"}], "image_size": 8},
                "sampling": SETTINGS | {"ckpt_sha256": sha256(adapter)} | (settings or {}),
            }
            file = self.root / f"evaluation/{name}-{step}/metrics.json"
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(report))
            self.files[name].append(file)
            rows.append({"step": step - 50, "steps_per_s": speed, "images_per_s": 64 * speed})
            rows.append({"step": step, "steps_per_s": speed / 2, "images_per_s": 32 * speed})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"{name}={folder}"


def change(path, **changes):
    """Change keys of a JSON file; a dict changes the keys of the dict there."""
    record = json.loads(path.read_text())
    for key, value in changes.items():
        record[key] = record[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(record))
