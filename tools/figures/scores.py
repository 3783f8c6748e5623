"""Match evaluations to runs, training steps and parameter counts."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.description import ModelDescription
from checkpoint.format import read_description
from checkpoint.loading import build_model
from evaluation.reports import flatten
from finetune import METHODS, select
from runtime.files import sha256
from runtime.text import one_line, shorten

METRICS = {  # key: title, format, which direction is better
    "fid": ("FID", "{:.3f}", "lower"),
    "kid": ("KID", "{:.5f}", "lower"),
    "lpips": ("LPIPS", "{:.3f}", "higher"),
    "lpips_pooled": ("LPIPS pooled", "{:.3f}", "higher"),
    "precision": ("precision", "{:.3f}", "higher"),
    "recall": ("recall", "{:.3f}", "higher"),
    "inception_score": ("Inception score", "{:.2f}", "higher"),
    "top1": ("top-1 accuracy", "{:.3f}", "higher"),
    "superclass_accuracy": ("superclass accuracy", "{:.3f}", "higher"),
    "trained_params": ("trained parameters, M", "{:.2f}", "lower"),
    "trained_percent": ("% of all", "{:.2f}", "lower"),
    "gpu_days": ("GPU days", "{:.2f}", "lower"),
    "time": ("training time", "{:.3f}", "lower"),
}
# sampling settings that must agree between evaluations: with them, image k has the same class and noise in each
SAME = ("hierarchy", "image_size", "labels", "global_seed", "num_fid_samples", "sampler", "num_sampling_steps")
# keys that every metrics.json has
REPORT_KEYS = (
    "overall",
    "superclasses",
    "comparable",
    "not_comparable",
    "real",
    "fake",
    "choices",
    "sampling",
)


@dataclass(frozen=True)
class Score:
    """An evaluation of an adapter.

    run          name of the run
    path         the metrics.json
    report       its contents
    description  of the adapter
    metrics      {key: value}: the metrics over all images; "trained_params" and "trained_percent"; "hours" of training
                 and "images_per_s" if metrics.jsonl reaches the adapter's step
    """

    run: str
    path: str
    report: dict
    description: ModelDescription
    metrics: dict

    @property
    def step(self) -> int:
        return self.description.step

    def metric(self, key: str) -> float:
        """Return a metric; raise ValueError if it is absent or not a number."""
        if not isinstance(self.metrics.get(key), int | float):
            known = sorted(name for name, value in self.metrics.items() if isinstance(value, int | float))
            raise ValueError(f"{self.path} has no metric {key!r}, expected one of {', '.join(known)}: choose another.")
        return self.metrics[key]


# ---- matching ------------------------------------------------------------------------------------


def read_report(path: str | os.PathLike) -> dict:
    """Return the contents of a metrics.json; raise ValueError if it is another file."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = [key for key in REPORT_KEYS if not isinstance(report, dict) or key not in report]
        reason = f"it has no {missing[0]!r}" if missing else ""
    except ValueError as error:
        reason = one_line(error)
    if reason:
        raise ValueError(f"{path} is not a metrics.json of evaluate.py ({reason}): name such a file.")
    return report


def adapters_of(folder: str | os.PathLike) -> list[Path]:
    """Return the adapters of a run, earliest first; raise ValueError if it has none."""
    paths = sorted(Path(folder).glob("adapters/*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} has no adapters/*.safetensors, expected a run folder of train.py: name one.")
    return paths


def training_speed(folder: str | os.PathLike, step: int) -> dict[str, float]:
    """Return {"hours", "images_per_s"} of the training up to `step`, from metrics.jsonl; {} if that ends earlier.

    Only training counts: the time to save and to sample is left out.
    """
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    before, seconds, images = 0, 0.0, 0.0
    for row in map(json.loads, lines):
        steps = min(row["step"], step) - before
        seconds += steps / row["steps_per_s"]
        images += steps * row["images_per_s"] / row["steps_per_s"]
        before += steps
        if before == step:
            return {"hours": seconds / 3600, "images_per_s": images / seconds}
    return {}


def count_parameters(description: ModelDescription) -> dict[str, float]:
    """Return how many parameters the method of a description trains, and their share in per cent."""
    with torch.device("meta"):
        model = build_model(description)
    trained = sum(p.numel() for p in select(model, METHODS[description.method]).values())
    total = sum(p.numel() for p in model.parameters())
    return {"trained_params": trained, "trained_percent": 100 * trained / total}


def match(runs: dict[str, str], paths: Sequence[str | os.PathLike]) -> list[Score]:
    """Return the scores of metrics.json files, sorted by run and step.

    runs: {name: folder}

    sample_ddp.py records the SHA-256 of the adapter in the settings of its samples; by it an evaluation finds its
    adapter. Raises ValueError if there is no such record, or no run has the adapter.
    """
    reports = {str(path): read_report(path) for path in paths}
    digests = {path: (report["sampling"] or {}).get("ckpt_sha256") for path, report in reports.items()}
    for path, digest in digests.items():
        if digest is None:
            raise ValueError(
                f"{path} does not record which adapter made its images, expected images of sample_ddp.py: sample and evaluate "
                "again."
            )
    wanted, adapters = set(digests.values()), {}
    for name, folder in runs.items():
        for path in adapters_of(folder)[::-1]:
            if wanted - adapters.keys():  # stop hashing these large files once all are found
                adapters[sha256(path)] = name, path
    scores = []
    for path, digest in digests.items():
        if digest not in adapters:
            raise ValueError(
                f"{path} evaluates an adapter with the SHA-256 {digest[:12]}…, expected one in {shorten(runs.values())}: add "
                "its run to --runs."
            )
        name, adapter = adapters[digest]
        description = read_description(adapter)
        metrics = flatten(reports[path]["overall"]) | count_parameters(description)
        metrics |= training_speed(runs[name], description.step)
        scores.append(Score(name, path, reports[path], description, metrics))
    order = list(runs)
    return sorted(scores, key=lambda score: (order.index(score.run), score.step))


def check_alike(scores: list[Score]):
    """Raise ValueError if two scores differ in their sampling settings, real images or networks."""

    def choices(score):
        report, settings = score.report, score.report["sampling"]
        real = {"real images": report["real"]["n"], "networks": report["choices"]["networks"]}
        return {key: settings.get(key) for key in SAME} | real

    first, *others = scores
    for other in others:
        pairs = zip(choices(first).items(), choices(other).values())
        unlike = [(key, a, b) for (key, a), b in pairs if a != b]
        if unlike:
            key, a, b = unlike[0]
            difference = f"{key} ({a} and {b})" if key != "networks" else key
            raise ValueError(
                f"{first.path} and {other.path} differ in {difference}, expected the same seeds and settings: sample and "
                "evaluate them alike."
            )


def by_run(scores: list[Score]) -> dict[str, list[Score]]:
    """Return {run: its scores by step}; raise ValueError if a run has two at one step."""
    runs = {}
    for score in scores:
        runs.setdefault(score.run, []).append(score)
    for several in runs.values():
        for a, b in zip(several, several[1:]):
            if a.step == b.step:
                raise ValueError(f"{a.path} and {b.path} are both of step {a.step} of {a.run}: leave one out.")
    return runs


def comparability_warning(scores: list[Score]) -> str:
    """Return the warning to print on a plot if a score cannot be compared with published ones, or else ""."""
    return "" if all(score.report["comparable"] for score in scores) else "not comparable with published figures"
