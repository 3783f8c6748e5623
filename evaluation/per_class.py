"""Metrics of every class: accuracy, the most frequent wrong class, and LPIPS, of generated and real images."""

import csv
import io
from collections.abc import Sequence

import numpy as np

from evaluation.comparison import ComparedSet, MeasuredSet
from evaluation.image_pass import TOP
from evaluation.metrics import mean_over_pairs
from hierarchy import Hierarchy

CLASSES_FILE = "classes.csv"


def class_rows(
    real: ComparedSet, fake: ComparedSet, hierarchy: Hierarchy, outputs: Sequence[str] | None = None
) -> list[dict[str, object]]:
    """Return a row for each class that a set has images of; values that cannot be had are None.

    class, superclass            names
    n_real, n_fake               images
    top1, top1_real              share of the class's images that the classifier finds right
    top5, top5_real              share whose class is among its five most likely ones, if it has more classes
    mistaken_for, mistaken       the most frequent wrong class of generated images, and its share of them; ties go to the
                                 first class
    lpips, lpips_real            mean over all pairs of the class's images

    outputs: names of the classifier's outputs, for classes that the data lack
    """
    columns = {}  # {name: (classes,)}
    for suffix, each in (("_fake", fake), ("_real", real)):
        if isinstance(each, MeasuredSet):
            columns |= {f"{name}{suffix}": values for name, values in set_columns(each, hierarchy.num_classes).items()}
    counts = [columns[name] for name in ("n_fake", "n_real") if name in columns]
    rows = []
    for c in np.flatnonzero(sum(counts) > 0).tolist() if counts else []:
        row = {"class": hierarchy.classes[c], "superclass": hierarchy.superclasses[hierarchy.parents[c]]}
        values = {name: column[c].item() for name, column in columns.items()}
        wrong = values.get("wrong_fake")
        row |= {"n_real": values.get("n_real"), "n_fake": values.get("n_fake")}
        for name in ("top1", "top5"):
            row |= {name: values.get(f"{name}_fake"), f"{name}_real": values.get(f"{name}_real")}
        row |= {
            "mistaken_for": class_name(wrong, hierarchy, outputs) if values.get("mistaken_fake") else None,
            "mistaken": values.get("mistaken_fake"),
            "lpips": values.get("lpips_fake"),
            "lpips_real": values.get("lpips_real"),
        }
        rows.append({key: None if value != value else value for key, value in row.items()})  # NaN: not known
    return rows


def set_columns(measured: MeasuredSet, classes: int) -> dict[str, np.ndarray]:
    """Return n, top1, top5, wrong, mistaken and lpips of each class of a set, (classes,) each; NaN if unknown."""
    n = np.bincount(measured.plan.labels, minlength=classes)
    columns, found = {"n": n}, measured.predictions(None)
    if found is not None:
        labels, predicted = found
        columns["top1"] = class_means(predicted[:, 0] == labels, labels, n)
        if predicted.shape[1] == TOP:
            columns["top5"] = class_means((predicted == labels[:, None]).any(1), labels, n)
        columns["wrong"], columns["mistaken"] = most_frequent_wrong(labels, predicted[:, 0], n)
    if measured.result.diversity:
        columns["lpips"] = mean_over_pairs(*measured.result.diversity["classes"].T).numpy()
    return columns


def class_means(values: np.ndarray, labels: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return the mean of values (N,) over the images of each class, NaN without images; n: images of each class."""
    sums = np.bincount(labels, weights=values, minlength=len(n))
    return np.divide(sums, n, out=np.full(len(n), np.nan), where=n > 0)


def most_frequent_wrong(labels: np.ndarray, predicted: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the most frequent wrong class of each class's images, int64, and its share of them, 0 if none is wrong.

    labels, predicted: (N,); n: images of each class
    """
    wrong, share = np.zeros(len(n), dtype=np.int64), np.where(n > 0, 0.0, np.nan)
    is_wrong = predicted != labels
    pairs, counts = np.unique(np.stack([labels, predicted])[:, is_wrong], axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    classes, first = np.unique(pairs[0, order], return_index=True)
    wrong[classes] = pairs[1, order][first]
    share[classes] = counts[order][first] / n[classes]
    return wrong, share


def class_name(label: int, hierarchy: Hierarchy, outputs: Sequence[str] | None) -> str:
    """Return the name of a class that a classifier finds, see `PassResult.predicted`."""
    if label >= 0:
        return hierarchy.classes[label]
    return outputs[~label] if outputs else f"output {~label}"


def classes_csv(rows: list[dict[str, object]]) -> str:
    """Return the rows as CSV, one a class; None is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
