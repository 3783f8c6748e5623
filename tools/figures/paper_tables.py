"""The paper's Tables 1 to 4 in Markdown, ours beside them, and tables of the same metrics for other data sets."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.reports import OVERALL, flatten
from finetune import METHODS
from hierarchy import Hierarchy
from runtime.text import markdown_table
from tools.figures.scores import METRICS, Score

PAPER = Path(__file__).resolve().parent / "paper.json"
ABSENT = "–"
OURS = {"lpips": "lpips_pooled"}  # our metric beside the paper's, if its key differs
OTHER_COLUMNS = "fid", "kid", "lpips", "lpips_pooled", "top1"  # metrics in the table of another data set
LPIPS_NOTE = (
    "The paper does not say which pairs of images its LPIPS compares. Ours beside it is `lpips_pooled`, over all pairs of a "
    "group: the paper's overall LPIPS is above the mean of its superclasses weighted by their classes, as a pooled value is "
    "and a mean over classes is not."
)
TIME_NOTE = (
    "Our training time is per image, relative to Full, and right only if both runs used the same number of GPUs. Our GPU "
    "days are absent because a run does not record its GPUs."
)


@dataclass(frozen=True)
class Row:
    """A row of a table of the paper.

    name, method  of the fine-tuning method
    image_size    pixels per side
    paper         {group: {metric: value}}; the groups are superclasses and "overall"
    """

    name: str
    method: str
    image_size: int
    paper: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Table:
    """A table of the paper: its number and title, the data set, the keys of its metrics, and its rows."""

    number: int
    title: str
    hierarchy: Hierarchy
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def groups(self) -> list[str]:
        """Superclasses and "overall", or "overall" alone."""
        return list(self.rows[0].paper)


def read_paper() -> tuple[list[Table], dict]:
    """Return the tables of paper.json, and its contents."""
    record, tables = json.loads(PAPER.read_text(encoding="utf-8")), []
    for table in record["tables"]:
        columns, rows = tuple(table["columns"]), []
        for row in table["rows"]:
            paper = {group: dict(zip(columns, values, strict=True)) for group, values in row["paper"].items()}
            rows.append(Row(**row | {"paper": paper}))
        hierarchy = Hierarchy.load(table["hierarchy"])
        tables.append(Table(table["number"], table["title"], hierarchy, columns, tuple(rows)))
    return tables, record


# ---- our scores ----------------------------------------------------------------------------------


def same_classes(found: Hierarchy, paper: Hierarchy) -> bool:
    """Return whether two hierarchies agree in everything but the class names, which a built-in one may lack."""
    if (found.num_classes, found.superclasses) != (paper.num_classes, paper.superclasses):
        return False
    return not (found.has_parents and paper.has_parents) or found.parents.equal(paper.parents)


def fits_row(score: Score, table: Table, row: Row) -> bool:
    """Return whether a score has the data set, method, image size and embedder of a row."""
    about = score.description
    expected = row.method, row.image_size, METHODS[row.method].embedder
    return (about.method, about.image_size, about.embedder) == expected and same_classes(
        about.hierarchy, table.hierarchy
    )


def fill_table(table: Table, scores: Sequence[Score]) -> dict[str, Score]:
    """Return {name of a row: score} for a table; raise ValueError if a row has two."""
    found = {}
    for row in table.rows:
        for score in scores:
            if fits_row(score, table, row):
                if row.name in found:
                    raise ValueError(
                        f"{found[row.name].path} and {score.path} are both for {row.name} in Table {table.number}, expected "
                        "one: leave the other out."
                    )
                found[row.name] = score
    return found


def our_metric(score: Score | None, key: str, group: str = OVERALL, full: Score | None = None) -> float | None:
    """Return a metric of a score, overall or of a superclass, in the unit of METRICS; None if it is absent.

    full: the score of full fine-tuning, which "time" divides by
    """
    if score is None:
        return None
    if key == "time":
        mine, other = (each and each.metrics.get("images_per_s") for each in (score, full))
        return other / mine if mine and other else None
    if group == OVERALL:
        value = score.metrics.get(key)
    else:
        value = flatten(score.report["superclasses"].get(group, {})).get(key)
    return value / 1e6 if value is not None and key == "trained_params" else value


def format_metric(value: float | None, key: str) -> str:
    """Return the text of a table cell."""
    return ABSENT if value is None else METRICS[key][1].format(value)


# ---- Markdown ------------------------------------------------------------------------------------


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(markdown_table(titles, rows, align="l" + "r" * (len(titles) - 1)))


def table_text(table: Table, found: dict[str, Score]) -> str:
    """Return a table of the paper in Markdown, each value followed by ours if the table has any of ours."""
    full = next((found.get(row.name) for row in table.rows if row.method == "full"), None)

    def titles(name, key=None):
        return [f"{name}, paper", f"{METRICS[OURS.get(key, key)][0] if key else name}, ours"] if found else [name]

    def cells(row, key, group):
        ours = our_metric(found.get(row.name), OURS.get(key, key), group, full)
        return [format_metric(row.paper[group][key], key), format_metric(ours, key)][: 1 + bool(found)]

    parts = [f"### Table {table.number}: {table.title}"]
    if len(table.groups) > 1:  # a block per metric: a line per superclass, a column per method
        for key in table.columns:
            head = [METRICS[key][0], *(title for row in table.rows for title in titles(row.name))]
            lines = [[group, *(c for row in table.rows for c in cells(row, key, group))] for group in table.groups]
            parts.append(markdown(head, lines))
    else:
        head = ["", *(title for key in table.columns for title in titles(METRICS[key][0], key))]
        lines = [[row.name, *(c for key in table.columns for c in cells(row, key, OVERALL))] for row in table.rows]
        parts.append(markdown(head, lines))
    if found:
        parts += [note for key, note in (("lpips", LPIPS_NOTE), ("time", TIME_NOTE)) if key in table.columns]
        parts.append("\n".join(f"- {text}" for text in sources_of(found)))
    return "\n\n".join(parts)


def other_tables(scores: Sequence[Score]) -> Iterator[str]:
    """Yield a table of ours alone for each hierarchy and image size: a line per evaluation, a column per group."""
    groups = {}
    for score in scores:
        groups.setdefault((score.description.hierarchy, score.description.image_size), []).append(score)
    for (hierarchy, size), several in groups.items():
        parts = [f"### {hierarchy.name} at {size} pixels"]
        superclasses = list(dict.fromkeys(name for score in several for name in score.report["superclasses"]))
        named = {f"{score.run}, {score.step_text}, {score.path}": score for score in several}
        if len({(score.run, score.step) for score in several}) == len(several):  # short names suffice
            named = {f"{score.run}, {score.step_text}": score for score in several}
        for key in OTHER_COLUMNS:
            if all(our_metric(score, key) is None for score in several):
                continue
            lines = [
                [name, *(format_metric(our_metric(score, key, group), key) for group in (OVERALL, *superclasses))]
                for name, score in named.items()
            ]
            parts.append(markdown([METRICS[key][0], OVERALL, *superclasses], lines))
        parts.append("\n".join(f"- {text}" for text in sources_of(named)))
        yield "\n\n".join(parts)


def sources_of(found: dict[str, Score]) -> Iterator[str]:
    """Yield for each of our scores in a table a sentence with its file and settings."""
    for name, score in found.items():
        report, settings = score.report, score.report["sampling"]
        parts = [
            f"{name}: {score.path}, {score.step_text}",
            f"{report['fake']['n']:,} against {report['real']['n']:,} images",
            score.guidance_text,
            f"{settings['num_sampling_steps']} {settings['sampler']} steps",
            *(f"NOT COMPARABLE: {reason}" for reason in report["not_comparable"]),
        ]
        yield ", ".join(parts) + "."


def all_tables(scores: Sequence[Score]) -> str:
    """Return the paper's tables with our scores beside it, and tables of the scores that it has no row for.

    Without scores the paper's values stand alone. Raises ValueError if two scores fit one row.
    """
    tables, record = read_paper()
    filled = [(table, fill_table(table, scores)) for table in tables]
    used = {score.path for _, found in filled for score in found.values()}
    head = f"Paper: {record['source']}. {record['note']}"
    if scores:
        head += f" {ABSENT} under ours: not measured."
    links = [f"- {each['name']}, {each['image_size']} pixels: {each['url']}" for each in record["released"]]
    parts = [
        head,
        *(table_text(table, found) for table, found in filled),
        *other_tables([score for score in scores if score.path not in used]),
        "\n".join(["Released checkpoints:", "", *links]),
    ]
    return "\n\n".join(parts) + "\n"
