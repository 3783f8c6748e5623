"""Which training, which step and what price an evaluation belongs to; and the tables of the paper filled with them."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.description import ModelDescription
from checkpoint.format import read_description
from checkpoint.loading import build_model
from evaluation.reports import flat
from finetune import METHODS, select
from hierarchy import Hierarchy
from runtime.files import sha256
from runtime.text import shorten

FORMATS = {  # key of a figure: its name, how it is written, which way is better
    "fid": ("FID", "{:.3f}", "lower"),
    "kid": ("KID", "{:.5f}", "lower"),
    "lpips": ("LPIPS", "{:.3f}", "higher"),
    "precision": ("precision", "{:.3f}", "higher"),
    "recall": ("recall", "{:.3f}", "higher"),
    "inception_score": ("Inception score", "{:.2f}", "higher"),
    "top1": ("top-1 accuracy", "{:.3f}", "higher"),
    "superclass_accuracy": ("superclass accuracy", "{:.3f}", "higher"),
    "trained_params": ("trained parameters, M", "{:.2f}", "lower"),
    "trained_percent": ("% of all", "{:.2f}", "lower"),
    "speed": ("images/s over full", "{:.2f}", "higher"),
}
# what must be the same for the k-th image to have the same class and noise, and for as many images, in every evaluation
SAME = ("hierarchy", "image_size", "labels", "global_seed", "num_fid_samples", "sampler", "num_sampling_steps")
# of a metrics.json
PARTS = "overall superclasses comparable not_comparable real fake choices sampling".split()


@dataclass(frozen=True)
class Score:
    """run          the name it goes by
    path         of the metrics.json
    report       its content
    description  of the adapter
    figures      {key: number}, those of all images, "trained_params" and "trained_percent", and where metrics.jsonl goes as
                 far as the adapter "hours" of training and "images_per_s"
    """

    run: str
    path: str
    report: dict
    description: ModelDescription
    figures: dict

    @property
    def step(self):
        return self.description.step

    def figure(self, key):
        """ValueError where there is no such number."""
        if not isinstance(self.figures.get(key), int | float):
            known = sorted(name for name, value in self.figures.items() if isinstance(value, int | float))
            raise ValueError(f"{self.path} has no figure {key!r}, expected one of {', '.join(known)}: choose another.")
        return self.figures[key]


# ---- matching --------------------------------------------------------------------------------------------------------


def read_report(path):
    """The content of a metrics.json."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = [key for key in PARTS if not isinstance(report, dict) or key not in report]
        reason = f"it has no {missing[0]!r}" if missing else ""
    except ValueError as error:
        reason = str(error)
    if reason:
        raise ValueError(f"{path} is not what evaluate.py writes ({reason}), expected a metrics.json: name that.")
    return report


def adapters_of(folder):
    paths = sorted(Path(folder).glob("adapters/*.safetensors"))
    if not paths:
        raise ValueError(
            f"{folder} has no adapters/*.safetensors, expected the folder of a run of train.py: name that."
        )
    return paths


def pace(folder, step):
    """{"hours", "images_per_s"} of the training up to `step`, by metrics.jsonl; {} where that does not go so far.

    Time is that of training: what writing and sampling took is not in it.
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


def price(description):
    """How many parameters the method of a description trains, and their share in per cent."""
    with torch.device("meta"):
        model = build_model(description)
    trained = sum(p.numel() for p in select(model, METHODS[description.method]).values())
    total = sum(p.numel() for p in model.parameters())
    return {"trained_params": trained, "trained_percent": 100 * trained / total}


def match(runs, paths):
    """`Score`s of metrics.json files, by run and step; `runs`: {name: folder}.

    An evaluation belongs to the adapter whose SHA-256 is in the settings of its samples, which sample_ddp.py writes.
    """
    reports = {str(path): read_report(path) for path in paths}
    digests = {path: (report["sampling"] or {}).get("ckpt_sha256") for path, report in reports.items()}
    for path, digest in digests.items():
        if digest is None:
            raise ValueError(
                f"{path} does not say which adapter made its images, expected images of sample_ddp.py: sample and evaluate "
                "again."
            )
    wanted, adapters = set(digests.values()), {}
    for name, folder in runs.items():
        for path in adapters_of(folder)[::-1]:
            if wanted - adapters.keys():  # large files: no more are read than must be
                adapters[sha256(path)] = name, path
    scores = []
    for path, digest in digests.items():
        if digest not in adapters:
            raise ValueError(
                f"{path} is of images of an adapter with the SHA-256 {digest[:12]}…, expected one in {shorten(runs.values())}: "
                "name its run too."
            )
        name, adapter = adapters[digest]
        description = read_description(adapter)
        figures = flat(reports[path]["overall"]) | price(description) | pace(runs[name], description.step)
        scores.append(Score(name, path, reports[path], description, figures))
    order = list(runs)
    return sorted(scores, key=lambda score: (order.index(score.run), score.step))


def check_alike(scores):
    """ValueError where the samples of two scores differ in what they are of, or were compared with other real images."""

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
            what = f"{key} ({a} and {b})" if key != "networks" else key
            raise ValueError(
                f"{first.path} and {other.path} differ in {what}, expected the same samples' seeds and the same measure: sample "
                "and evaluate them alike."
            )


def by_run(scores):
    """{run: its scores by step}; ValueError where two are of one step."""
    runs = {}
    for score in scores:
        runs.setdefault(score.run, []).append(score)
    for several in runs.values():
        for a, b in zip(several, several[1:]):
            if a.step == b.step:
                raise ValueError(f"{a.path} and {b.path} are both of step {a.step} of {a.run}: leave one out.")
    return runs


def stamp(scores):
    """What must stand on a figure of evaluations that compare with no published ones."""
    return "" if all(score.report["comparable"] for score in scores) else "not comparable with published figures"


# ---- the paper's tables ----------------------------------------------------------------------------------------------

ABSENT = "–"


def belongs(score, table, hierarchy):
    found, method = score.description.hierarchy, score.description.method
    counts = found.num_classes, found.num_super_classes
    return (
        counts == (hierarchy.num_classes, hierarchy.num_super_classes)
        and score.description.image_size == table["image_size"]
        and score.description.embedder == METHODS[method].embedder
    )


def fill(table, scores, methods):
    """{method: its `Score`} of a table; ValueError where there are two for one."""
    hierarchy, found = Hierarchy.load(table["hierarchy"]), {}
    for score in scores:
        method = score.description.method
        if method in methods and belongs(score, table, hierarchy):
            if method in found:
                raise ValueError(
                    f"{found[method].path} and {score.path} are both for {methods[method]} in Table {table['number']}, expected "
                    "one: leave the other out."
                )
            found[method] = score
    return found


def cell(value, key):
    if value is None or isinstance(value, str):
        return value or ABSENT
    return FORMATS[key][1].format(value / 1e6 if key == "trained_params" else value)


def ours(found, method, key, superclass=None):
    """The figure of a method's score, overall or of a superclass; None where there is none."""
    score = found.get(method)
    if score is None:
        return None
    if superclass:
        return flat(score.report["superclasses"].get(superclass, {})).get(key)
    if key == "speed":
        full, mine = (found[m].figures.get("images_per_s") if m in found else None for m in ("full", method))
        return mine / full if full and mine else None
    return score.figures.get(key)


def markdown(titles, rows):
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_text(table, found, methods):
    """A table of the paper in Markdown, its figures beside ours."""
    hierarchy, shown = Hierarchy.load(table["hierarchy"]), table["columns"]
    pair = ["paper", "ours"]

    def cells(method, key, superclass=None):
        theirs = None if superclass else table["paper"].get(method, {}).get(key)
        return [cell(theirs, key), cell(ours(found, method, key, superclass), key)]

    parts = [f"### Table {table['number']}: {table['title']}"]
    if table.get("by_superclass"):
        for key in shown:
            titles = [FORMATS[key][0], *(f"{name}, {which}" for name in methods.values() for which in pair)]
            groups = [*hierarchy.superclasses, None]
            rows = [[group or "overall", *(c for m in methods for c in cells(m, key, group))] for group in groups]
            parts.append(markdown(titles, rows))
    else:
        titles = ["", *(f"{FORMATS[key][0]}, {which}" for key in shown for which in pair)]
        rows = [[name, *(c for key in shown for c in cells(m, key))] for m, name in methods.items()]
        parts.append(markdown(titles, rows))
    parts.append("\n".join(f"- {text}" for text in provenance(found, methods)))
    return "\n\n".join(filter(None, parts))


def provenance(found, methods):
    """What our figures of a table are of, a sentence for each."""
    for method, score in found.items():
        report, settings = score.report, score.report["sampling"]
        parts = [
            f"{methods[method]}: {score.path}, step {score.step:,}",
            f"{report['fake']['n']:,} against {report['real']['n']:,} images",
            f"{settings['guidance']} guidance {settings['cfg_scale']}",
            f"{settings['num_sampling_steps']} {settings['sampler']} steps",
            *(f"NOT COMPARABLE: {reason}" for reason in report["not_comparable"]),
        ]
        yield ", ".join(parts) + "."


def paper_tables(paper, scores):
    """All tables of `paper` (tools/paper.json), in Markdown; ValueError where a score is in none of them."""
    methods = paper["methods"]
    filled = [(table, fill(table, scores, methods)) for table in paper["tables"]]
    used = {score.path for _, found in filled for score in found.values()}
    for score in scores:
        if score.path not in used:
            about = score.description
            raise ValueError(
                f"{score.path} is in no table of the paper ({about.method}, {about.embedder} embedder, "
                f"{about.hierarchy!r}, {about.image_size} pixels): leave it out."
            )
    head = f'{paper["paper"]}, beside ours. {ABSENT} under "paper": not at hand; under "ours": not measured. {paper["note"]}'
    sources = "\n".join(["The paper's figures:", "", *(f"- {text}." for text in paper["sources"])])
    return "\n\n".join([head, *(table_text(table, found, methods) for table, found in filled), sources]) + "\n"
