"""Match evaluations to runs, training steps and parameter counts."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.description import ModelDescription
from checkpoint.format import is_adapter, read_description
from checkpoint.loading import build_model
from evaluation.reports import flatten
from finetune import METHODS, select
from guidance import ALL_TIMESTEPS
from hierarchy import Hierarchy
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
FEATURES = {"fd": ("FD {}", "lower"), "kid": ("KID {}", "lower"), "floor": ("floor {}", "lower")}  # of other networks
# sampling settings that must agree between evaluations: with them, image k has the same class and noise in each
SAME = ("hierarchy", "image_size", "labels", "global_seed", "num_fid_samples", "sampler", "num_sampling_steps")
SAME += ("counts_sha256", "init_sha256", "strength")
# settings of the guidance: methods may differ in them, and the legend says how
GUIDANCE = ("guidance", "cfg_scale", "cfg_scale_parent", "cfg_channels", "guidance_interval")
GUIDANCE += ("guide", "cfg_scales", "cfg_intervals")
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

    @property
    def step_text(self) -> str:
        return f"step {self.step:,}" if self.description.format else "a checkpoint"

    @property
    def guidance(self) -> tuple:
        """The settings of the guidance, in the order of GUIDANCE."""
        return tuple(map(str, map(self.report["sampling"].get, GUIDANCE)))

    @property
    def guidance_text(self) -> str:
        """The guidance in words; a model without superclass rows is guided by its null class."""
        settings = self.report["sampling"]
        kind = settings.get("guidance")
        kind = "null" if kind == "superclass" and self.description.embedder == "null" else kind
        parts = [f"{kind} guidance {settings.get('cfg_scale')}"]
        if settings.get("cfg_scale_parent") is not None:
            parts.append(f"{settings['cfg_scale_parent']} to the superclass")
        if settings.get("guide"):
            parts.append(f"by {settings['guide']}")
        parts += [f"{rank} {scale:g}" for rank, scale in settings.get("cfg_scales") or ()]
        parts += ["{}: timesteps {} to {}".format(rank, *ends) for rank, ends in settings.get("cfg_intervals") or ()]
        if settings.get("guidance_interval") not in (None, list(ALL_TIMESTEPS)):
            parts.append("timesteps {} to {}".format(*settings["guidance_interval"]))
        if settings.get("cfg_channels") not in (None, "3"):
            parts.append(f"{settings['cfg_channels']} channels")
        return ", ".join(parts)

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


def weights_of(path: str | os.PathLike) -> list[Path]:
    """Return the adapters of a run, earliest first, or a file itself; raise ValueError if a folder has none."""
    if Path(path).is_file():
        return [Path(path)]
    paths = sorted(Path(path).glob("adapters/*.safetensors"))
    if not paths:
        raise ValueError(
            f"{path} has no adapters/*.safetensors, expected a run folder of train.py, an adapter or a checkpoint: name one."
        )
    return paths


def describe_checkpoint(path: Path, report_path: str, report: dict) -> ModelDescription:
    """Return the description of a checkpoint of FineDiffusion, such as a released one, from the settings of its samples.

    Raises ValueError unless its hierarchy is a built-in one or that of the real images.
    """
    settings, specs = report["sampling"], ["inat2021", report["real"]["path"]]
    for spec in specs:
        try:
            hierarchy = Hierarchy.load(spec)
        except ValueError:
            continue
        if hierarchy.keep().digest() == settings["hierarchy"]:
            size = settings["image_size"]
            return ModelDescription(
                model=settings["model"],
                image_size=size,
                latent_size=size // 8,
                channels=4,
                vae="mse",
                method="finediffusion",
                embedder="tiered",
                hierarchy=hierarchy,
                file=path,
            )
    raise ValueError(
        f"{report_path} evaluates the checkpoint {path}, which does not name its classes, expected those of "
        f"{' or '.join(map(str, specs))}: restore the real images there, or sample with --hierarchy inat2021."
    )


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

    runs: {name: folder of a run, or file of an adapter or a checkpoint}

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
        for path in weights_of(folder)[::-1]:
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
        if is_adapter(adapter):
            description = read_description(adapter)
        else:
            description = describe_checkpoint(adapter, path, reports[path])
        metrics = flatten(reports[path]["overall"]) | count_parameters(description)
        metrics |= training_speed(runs[name], description.step)
        scores.append(Score(name, path, reports[path], description, metrics))
    order = list(runs)
    return sorted(scores, key=lambda score: (order.index(score.run), score.step))


def compared_settings(score: Score) -> dict:
    """Return what two evaluations must have in common; None if a report of an earlier version does not have it."""
    report, settings = score.report, score.report["sampling"]
    return {key: settings.get(key) for key in SAME} | {
        "number of real images": report["real"]["n"],
        "number of generated images": report["fake"]["n"],
        "pixels per side": report["choices"].get("image_size"),
        "real images": report["real"].get("pixels"),
        "networks": report["choices"]["networks"],
    }


def check_alike(scores: list[Score]):
    """Raise ValueError if two scores differ in their images, sampling settings or networks.

    They may differ in guidance, but not within a run.
    """
    first = scores[0]
    expected, guidance = compared_settings(first), {}
    for score in scores:
        for key, value in compared_settings(score).items():
            if value != expected[key] and None not in (value, expected[key]):
                difference = key if key in ("networks", "real images") else f"{key} ({expected[key]} and {value})"
                raise ValueError(
                    f"{first.path} and {score.path} differ in {difference}, expected the same seeds, settings and real images: "
                    "sample and evaluate them alike."
                )
        other = guidance.setdefault(score.run, score)
        if other.guidance != score.guidance:
            raise ValueError(
                f"{other.path} and {score.path} of {score.run} differ in guidance ({other.guidance_text} and "
                f"{score.guidance_text}), expected one for all steps of a run: leave one out."
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


def axis_label(key: str) -> str:
    """Return the label of a metric's axis, such as "FID (lower is better)" or "FD dinov2 (lower is better)"."""
    title, _, better = METRICS.get(key, (key, "", ""))
    prefix, _, rest = key.partition(".")
    name, _, own = rest.rpartition(".")
    if prefix == "features" and own in FEATURES:
        title, better = FEATURES[own][0].format(name), FEATURES[own][1]
    return f"{title} ({better} is better)" if better else title


def legends(runs: dict[str, list[Score]]) -> dict[str, str]:
    """Return the legend of each run: its name, with its guidance if the runs differ in it."""
    differ = len({score.guidance for several in runs.values() for score in several}) > 1
    return {name: f"{name}, {several[0].guidance_text}" if differ else name for name, several in runs.items()}


def comparability_warning(scores: list[Score]) -> str:
    """Return the warning to print on a plot if a score cannot be compared with published ones, or else ""."""
    return "" if all(score.report["comparable"] for score in scores) else "not comparable with published figures"
