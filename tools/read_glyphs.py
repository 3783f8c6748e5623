"""Let a small classifier, trained on real glyphs, read generated ones.

    python -m tools.read_glyphs --train data/train --real data/held-out --generated "w = 2=samples/w2" --out grid.png

Prints, for the real held-out faces and for every folder of generated images, the share read as the right class and as
a class of the right superclass, and draws a grid of real above generated glyphs. The superclass rows of `--train` are
the hierarchy.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from data import list_images
from hierarchy import Hierarchy
from pictures import labelled_grid
from runtime import run_command

STEPS, BATCH, SHIFT = 350, 64, 3  # of the classifier's training; its images are moved by up to SHIFT of 32 pixels
PER_BLOCK = 12  # classes of a superclass in the grid


def load(folder, hierarchy):
    """Images of a folder: float32 (N, 1, 32, 32) in [0, 1], and labels (N,)."""
    paths, labels = list_images(folder, hierarchy)
    images = [np.asarray(Image.open(path).convert("L").resize((32, 32), Image.Resampling.BOX)) for path in paths]
    return torch.from_numpy(np.stack(images))[:, None].float() / 255, labels


def network(classes):
    def stage(before, after):
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *stage(1, 32), *stage(32, 64), *stage(64, 128), nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, classes)
    )


def train(images, labels, classes, seed):
    """A classifier of images (N, 1, 32, 32), in eval mode."""
    torch.manual_seed(seed)
    net = network(classes)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(labels), (BATCH,))
        dy, dx = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
        x = images[rows].roll((dy, dx), (2, 3))
        x = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
        loss = F.cross_entropy(net(x), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def read(net, images):
    return torch.cat([net(part).argmax(1) for part in images.split(256)])


def shares(net, folder, hierarchy):
    """Of the images in `folder`: the share read rightly, and the share read as a class of the right superclass."""
    images, labels = load(folder, hierarchy)
    found, parents = read(net, images), hierarchy.parents
    return {
        "images": len(labels),
        "class": (found == labels).float().mean().item(),
        "superclass": (parents[found] == parents[labels]).float().mean().item(),
    }


def first_images(folder, hierarchy, labels):
    """The first image of each label: uint8 (n, 3, H, W)."""
    paths, found = list_images(folder, hierarchy)
    first = {label: path for path, label in zip(reversed(paths), reversed(found.tolist()))}
    pictures = [np.array(Image.open(first[label]).convert("RGB")) for label in labels]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def grid(real, generated, hierarchy):
    """Per superclass a row of real glyphs above a row of each folder of `generated` ({title: folder})."""
    images, captions, titles = [], [], []
    for parent, block in enumerate(hierarchy.superclasses):
        labels = (hierarchy.parents == parent).nonzero().flatten().tolist()[:PER_BLOCK]
        blank = PER_BLOCK - len(labels)
        for title, folder in {"real": real, **generated}.items():
            row = first_images(folder, hierarchy, labels)
            images.append(torch.cat([row, torch.full((blank, *row.shape[1:]), 255, dtype=torch.uint8)]))
            names = [hierarchy.classes[label].split("_")[0] for label in labels] if title == "real" else []
            captions += [f"U+{name}" for name in names] + [""] * (PER_BLOCK - len(names))
            titles.append(f"{block.replace('_', ' ')}, real" if title == "real" else title)
    return labelled_grid(torch.cat(images), captions, PER_BLOCK, cell=64, row_titles=titles)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", required=True, help="real glyphs to learn to read, superclass/class/*.png")
    parser.add_argument("--real", required=True, help="real glyphs of other faces")
    parser.add_argument("--generated", nargs="+", required=True, metavar="TITLE=FOLDER")
    parser.add_argument("--out", required=True, help="the grid to draw; the figures go beside it as .json")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    untitled = [entry for entry in args.generated if "=" not in entry]
    if untitled:
        raise ValueError(f"--generated has {untitled[0]}, expected TITLE=FOLDER: give it a title, such as w=2.")
    generated = dict(entry.rsplit("=", 1) for entry in args.generated)
    hierarchy = Hierarchy.from_folder(args.train)
    for folder in (args.real, *generated.values()):
        list_images(folder, hierarchy)  # what is wrong with them is said before the training
    net = train(*load(args.train, hierarchy), hierarchy.num_classes, args.seed)
    figures = {"real, other faces": shares(net, args.real, hierarchy)}
    figures |= {title: shares(net, folder, hierarchy) for title, folder in generated.items()}
    print(f"{'':24}{'images':>8}{'right class':>14}{'right superclass':>18}")
    for title, row in figures.items():
        print(f"{title:24}{row['images']:8d}{row['class']:14.1%}{row['superclass']:18.1%}")
    grid(args.real, generated, hierarchy).save(args.out)
    Path(args.out).with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
