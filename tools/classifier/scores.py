"""Accuracy of a classifier on labelled images: overall, by superclass and by class, as JSON and Markdown.

Of a classifier that was trained on generated images alone and is tried on real ones, the accuracy is the classification
accuracy score (Ravuri & Vinyals, arXiv 1905.10887).
"""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader

from hierarchy import Hierarchy
from runtime.files import atomic_write
from runtime.progress import progress_bar
from runtime.text import markdown_table
from tools.classifier.data import CentreCrops, LabelledImages

FORMAT = "finediffusion-classification-1"
TOP = 5  # classes that top-5 accuracy counts
MOST_CLASSES = 100  # rows of classes in the Markdown table; the JSON file has all of them


@torch.no_grad()
def read_images(
    accelerator: Accelerator,
    net: nn.Module,
    images: LabelledImages,
    image_size: int,
    batch_size: int,
    num_workers: int,
) -> np.ndarray | None:
    """Return the most probable classes of each image, int64 (N, TOP or all classes), on the main process; None elsewhere.

    net: uint8 (n, 3, H, W) -> {"logits": (n, classes)}; called by every process
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    rows = range(rank, len(images), world)
    loader = DataLoader(CentreCrops(images, image_size, rows), batch_size, num_workers=num_workers)
    net.eval().to(accelerator.device)
    found = []
    for pixels in progress_bar(loader, unit="batch", desc="testing", disable=rank > 0):
        logits = net(pixels.to(accelerator.device))["logits"].float()
        found.append(logits.topk(min(TOP, logits.shape[1]), dim=1).indices.cpu())
    shares = gather_object([(rank, torch.cat(found).numpy() if found else None)])
    if not accelerator.is_main_process:
        return None
    width = next(share.shape[1] for _, share in shares if share is not None)
    result = np.empty((len(images), width), np.int64)
    for other, share in shares:
        if share is not None:
            result[other::world] = share
    return result


def score(found: np.ndarray, labels: np.ndarray, hierarchy: Hierarchy) -> dict:
    """Return accuracies in 0..1: "overall", by "superclasses" and by "classes".

    found   int64 (N, k), the most probable classes of each image
    labels  int64 (N,)

    "top5" counts an image as right if its class is among the first five; "superclass" if the first is a class of the
    right superclass; it is absent if there are no superclasses. "n" is the number of images. A class also has "mistaken":
    the wrong class that it was most often taken for, None if there is none.
    """
    parents = hierarchy.parents.numpy()
    right = found[:, 0] == labels
    hits = {"top1": right, "top5": (found == labels[:, None]).any(1)}
    if not hierarchy.is_plain:
        hits["superclass"] = parents[found[:, 0]] == parents[labels]

    def row(rows):
        return {"n": int(rows.sum()), **{name: float(hit[rows].mean()) for name, hit in hits.items()}}

    classes = {}
    for label in np.unique(labels):
        rows = labels == label
        wrong = np.bincount(found[rows & ~right, 0], minlength=hierarchy.num_classes)
        mistaken = hierarchy.classes[wrong.argmax()] if wrong.any() else None
        classes[hierarchy.classes[label]] = row(rows) | {"mistaken": mistaken}
    result = {"overall": row(np.ones(len(labels), bool))}
    if not hierarchy.is_plain:
        groups = np.unique(parents[labels])
        result["superclasses"] = {hierarchy.superclasses[s]: row(parents[labels] == s) for s in groups}
    return result | {"classes": classes}


def text_report(report: dict, title: str) -> str:
    """Return the Markdown text of a report of `score`; of many classes it lists the MOST_CLASSES worst."""
    names = {"top1": "top-1, %", "top5": "top-5, %", "superclass": "right superclass, %"}
    kinds = [kind for kind in names if kind in report["overall"]]

    def cells(name, row):
        return [name, row["n"], *(f"{100 * row[kind]:.1f}" for kind in kinds)]

    header = ["", "images", *(names[kind] for kind in kinds)]
    rows = [cells("**all images**", report["overall"])]
    rows += [cells(name, row) for name, row in report.get("superclasses", {}).items()]
    lines = [f"# {title}", "", *markdown_table(header, rows, "l" + "r" * (len(kinds) + 1)), ""]
    worst = sorted(report["classes"].items(), key=lambda item: item[1]["top1"])[:MOST_CLASSES]
    if len(worst) < len(report["classes"]):
        lines += [f"The {len(worst)} worst of {len(report['classes'])} classes; the JSON file has all of them.", ""]
    header = ["class", *header[1:], "most often taken for"]
    lines += markdown_table(
        header, [[*cells(name, row), row["mistaken"] or ""] for name, row in worst], "l" + "r" * (len(kinds) + 1)
    )
    return "\n".join(lines) + "\n"


def write_scores(path: Path, report: dict, title: str):
    """Write a report as JSON to `path`, and as Markdown beside it."""
    atomic_write(path, lambda part: part.write_text(json.dumps(report, indent=1) + "\n"))
    atomic_write(path.with_suffix(".md"), lambda part: part.write_text(text_report(report, title)))
