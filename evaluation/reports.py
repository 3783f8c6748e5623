"""The report of an evaluation: a table for the terminal, and its files."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from evaluation.bars import bar_figure
from evaluation.memorisation import LEAST_HELD_OUT
from runtime.files import atomic_write
from runtime.text import markdown_table

OVERALL = "overall"


def columns(report: dict) -> list[tuple[str, Callable[[dict], object], str]]:
    """Return the table's columns (title, function of a row, format), those that have a value in some row."""
    candidates = [
        ("real", lambda row: row["n_real"], "{:,}"),
        ("fake", lambda row: row["n_fake"], "{:,}"),
        *distance_columns("FID", "floor", "KID x 1000", "fid", lambda row: row, ("{:.3f}", "{:.2f} ± {:.2f}")),
    ]
    for name in report["overall"].get("features", {}):
        titles = f"FD {name}", f"floor {name}", f"KID x 1000 {name}"
        candidates += distance_columns(
            *titles, "fd", lambda row, name=name: row["features"][name], ("{:.4g}", "{:.4g} ± {:.4g}")
        )
    candidates += [
        ("LPIPS", lambda row: row.get("lpips"), "{:.3f}"),
        ("real LPIPS", lambda row: row.get("lpips_real"), "{:.3f}"),
        ("pooled", lambda row: row.get("lpips_pooled"), "{:.3f}"),
        ("real pooled", lambda row: row.get("lpips_pooled_real"), "{:.3f}"),
        ("top-1", lambda row: row.get("top1"), "{:.1%}"),
        ("real top-1", lambda row: row.get("top1_real"), "{:.1%}"),
        ("superclass", lambda row: row.get("superclass_accuracy"), "{:.1%}"),
        ("real superclass", lambda row: row.get("superclass_accuracy_real"), "{:.1%}"),
        *(
            (name, lambda row, name=name: row.get("at_equal_n", {}).get(name), "{:.3f}")
            for name in ("recall", "density", "coverage")
        ),
    ]
    rows = rows_of(report).values()
    return [column for column in candidates if any(column[1](row) is not None for row in rows)]


def distance_columns(
    title: str, floor: str, kid: str, key: str, values: Callable[[dict], dict], formats: tuple[str, str]
) -> list[tuple[str, Callable[[dict], object], str]]:
    """Return the columns of one network's distances.

    title, floor, kid: titles; key: of the Frechet distance; values: from a row to the network's part of it
    formats: of the Frechet distances and of KID
    """
    return [
        (title, lambda row: values(row).get(key), formats[0]),
        ("floor n", lambda row: values(row).get("floor_n"), "{:,}"),
        (floor, lambda row: values(row).get("floor"), formats[0]),
        (f"{title} at floor n", lambda row: values(row).get(f"{key}_at_floor_n"), formats[0]),
        (kid, lambda row: scaled_kid(values(row)), formats[1]),
    ]


def scaled_kid(values: dict) -> tuple[float, float] | None:
    """Return 1000 x KID, mean and standard deviation; None without KID."""
    return None if values.get("kid") is None else (1000 * values["kid"], 1000 * values["kid_std"])


def rows_of(report: dict) -> dict[str, dict]:
    """Return {name: row}: the superclasses, then all images."""
    return {**report["superclasses"], OVERALL: report["overall"]}


def cells(report: dict) -> list[list[str]]:
    """Return the table as text, row by row, titles first."""
    chosen = columns(report)
    lines = [["", *(title for title, _, _ in chosen)]]
    for name, row in rows_of(report).items():
        values = [get(row) for _, get, _ in chosen]
        texts = [
            "-" if value is None else form.format(*(value if isinstance(value, tuple) else (value,)))
            for value, (_, _, form) in zip(values, chosen)
        ]
        lines.append([name, *texts])
    return lines


def remarks(report: dict) -> list[str]:
    """Return the sentences under the table: warnings, metrics without a column, notes."""
    warnings = [f"NOT COMPARABLE with published metrics: {reason}." for reason in report["not_comparable"]]
    overall, metrics = report["overall"], []
    if overall.get("precision") is not None:
        names = [name for name in ("precision", "recall", "density", "coverage") if name in overall]
        values = ", ".join(f"{name} {overall[name]:.3f}" for name in names)
        metrics.append(f"{values.capitalize()}, on the features of {overall['precision_network']}.")
    if overall.get("inception_score") is not None:
        metrics.append(f"Inception score {overall['inception_score']:.2f} ± {overall['inception_score_std']:.2f}.")
    for key, title in (("lpips", "LPIPS within a class"), ("lpips_pooled", "LPIPS pooled")):
        if overall.get(f"{key}_interval"):
            low, high = overall[f"{key}_interval"]
            metrics.append(f"{title} {overall[key]:.3f}, 95% interval over classes {low:.3f} to {high:.3f}.")
    equal = [row["at_equal_n"]["n"] for row in report["superclasses"].values() if "at_equal_n" in row]
    if equal:
        metrics.append(f"Recall, density and coverage of the rows are of {equal[0]:,} random images in both sets.")
    metrics += rank_remarks(overall)
    if report.get("memorisation"):
        metrics.append(memorisation_remark(report["memorisation"]))
    return warnings + metrics + report["notes"]


def rank_remarks(overall: dict) -> list[str]:
    """Return sentences on the accuracy at every rank and on the ranks at which wrong images are still right."""
    found, real = (overall.get(f"ranks{suffix}") for suffix in ("", "_real"))
    if not found:
        return []

    def listed(shares):
        return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())

    texts = [
        "Right " + listed(found["accuracy"]) + (f"; of the real images {listed(real['accuracy'])}" if real else "")
    ]
    if None not in found["wrong_images"].values():
        texts.append("Finest right rank of the images of a wrong class: " + listed(found["wrong_images"]))
    return [f"{text}." for text in texts]


def memorisation_remark(found: dict) -> str:
    """Return a sentence on the distances to the training images; found: of `Memorisation.metrics`."""
    overall, held, generated = found["overall"], found["held_out"], found["generated"]
    share = f"{overall['closer']:.1%} of the generated images are closer than"
    if held["n"] < LEAST_HELD_OUT:
        share += f" any of them, expected {overall['closer_expected']:.1%}"
    else:
        share += f" 99% of them, expected {overall['closer_expected']:.1%}, and {overall['closer_than_any']:.1%} closer than any"
    return (
        f"Nearest of {found['n']:,} training images, on the features of {found['network']}: median distance "
        f"{generated['median']:.4g}, of held-out images {held['median']:.4g}; {share}."
    )


def text_table(report: dict) -> str:
    """Return the table with aligned columns, and the remarks."""
    lines = cells(report)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        "  ".join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))])
        for line in lines
    ]
    rows.insert(len(rows) - 1, "-" * len(rows[0]))
    return "\n".join([*rows, *(f"  {text}" for text in remarks(report))])


def markdown(report: dict) -> str:
    """Return the table and the remarks as Markdown."""
    titles, *rows = cells(report)
    table = "\n".join(markdown_table(titles, rows, align="l" + "r" * (len(titles) - 1)))
    return table + "\n\n" + "\n".join(f"- {text}" for text in remarks(report)) + "\n"


def flatten(row: dict, prefix: str = "") -> dict[str, object]:
    """Return {"a.b": value} of nested dicts."""
    pairs = {}
    for key, value in row.items():
        pairs |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return pairs


def csv_text(report: dict) -> str:
    """Return every metric of every row as CSV; the last column is False if they do not compare with published ones."""
    rows = {name: flatten(row) for name, row in rows_of(report).items()}
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["superclass", *keys, "comparable"])
    for name, row in rows.items():
        writer.writerow([name, *(row.get(key) for key in keys), report["comparable"]])
    return file.getvalue()


def write_report(folder: Path, report: dict, texts: dict[str, str], figures: dict[str, Figure]):
    """Write metrics.json, metrics.md, metrics.csv, superclasses.png and other files {name: content}, each atomically."""
    texts = {
        "metrics.json": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "metrics.md": markdown(report),
        "metrics.csv": csv_text(report),
        **texts,
    }
    for name, text in texts.items():
        atomic_write(folder / name, lambda part, text=text: part.write_text(text, encoding="utf-8"))
    for name, figure in {"superclasses.png": bar_figure(report), **figures}.items():
        atomic_write(folder / name, lambda part, figure=figure: figure.savefig(part, dpi=200, format="png"))
