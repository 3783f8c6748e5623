"""Let a small classifier, trained on real glyphs, read generated ones.

    python -m examples.glyphs.read --train data/train --real data/held-out --generated "w = 2=samples/w2" --out reading

Prints, for the real held-out faces and for every folder of generated images, the share read as the right class and as
a class of the right superclass. Writes to `--out` these figures, a grid of real above generated glyphs, and the
classifier and its features as TorchScript, for `evaluate.py --classifier` and `--features`. The superclass rows of
`--train` are the hierarchy.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from dataset.listing import list_images
from hierarchy import Hierarchy
from runtime.cli import Parser, run_command
from runtime.files import atomic_write
from sampling.grid import labelled_grid

STEPS, BATCH, SHIFT = 350, 64, 3  # of the classifier's training; its images are moved by up to SHIFT of SIDE pixels
SIDE, FEATURES = 32, 64
PER_BLOCK = 12  # classes of a superclass in the grid


def load(folder, hierarchy):
    """Images of a folder: uint8 (N, 3, H, W), and labels (N,)."""
    paths, labels = list_images(folder, hierarchy)
    images = [np.array(Image.open(path).convert("RGB")) for path in paths]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), labels


class Grey(nn.Module):
    """uint8 (N, 3, H, W) -> float32 (N, 1, side, side) in [0, 1]."""

    def __init__(self, side):
        super().__init__()
        self.side = side

    def forward(self, x):
        return F.adaptive_avg_pool2d(x.float().mean(1, keepdim=True) / 255, (self.side, self.side))


def network(classes):
    """(features, head): Grey images -> (N, FEATURES) -> (N, classes)."""

    def stage(before, after):
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]

    convolutions = [*stage(1, 32), *stage(32, 64), *stage(64, 128)]
    dense = [nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, FEATURES), nn.LayerNorm(FEATURES)]
    return nn.Sequential(*convolutions, *dense), nn.Linear(FEATURES, classes)


def train(images, labels, classes, seed=0):
    """(features, logits): networks of uint8 images (N, 3, H, W), in eval mode."""
    torch.manual_seed(seed)
    features, head = network(classes)
    net, grey = nn.Sequential(features, head), Grey(SIDE)
    images = grey(images)
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
    return nn.Sequential(grey, features).eval(), nn.Sequential(grey, features, head).eval()


@torch.no_grad()
def apply(net, images):
    return torch.cat([net(part) for part in images.split(256)])


def shares(logits, labels, parents):
    """Shares of images read as the right class, and as a class of the right superclass."""
    found = logits.argmax(1)
    right = {"class": found == labels, "superclass": parents[found] == parents[labels]}
    return {name: share.double().mean().item() for name, share in right.items()}


def save_script(net, path):
    """A network as TorchScript, which evaluate.py reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is old, but every torch reads it
        atomic_write(path, lambda part: torch.jit.script(net).save(str(part)))


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
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", required=True, help="real glyphs to learn to read, superclass/class/*.png")
    parser.add_argument("--real", required=True, help="real glyphs of other faces")
    parser.add_argument("--generated", nargs="+", required=True, metavar="TITLE=FOLDER")
    parser.add_argument("--out", required=True, help="folder for figures.json, grid.png, reader.pt and features.pt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    untitled = [entry for entry in args.generated if "=" not in entry]
    if untitled:
        raise ValueError(f"--generated has {untitled[0]}, expected TITLE=FOLDER: give it a title, such as w=2.")
    generated = dict(entry.rsplit("=", 1) for entry in args.generated)
    hierarchy = Hierarchy.from_folder(args.train)
    sets = {title: load(folder, hierarchy) for title, folder in {"real, other faces": args.real, **generated}.items()}
    features, reader = train(*load(args.train, hierarchy), hierarchy.num_classes, args.seed)
    figures = {}
    print(f"{'':24}{'images':>8}{'right class':>14}{'right superclass':>18}")
    for title, (images, labels) in sets.items():
        row = figures[title] = {"images": len(labels), **shares(apply(reader, images), labels, hierarchy.parents)}
        print(f"{title:24}{row['images']:8d}{row['class']:14.1%}{row['superclass']:18.1%}")
    out = Path(args.out)
    save_script(reader, out / "reader.pt")
    save_script(features, out / "features.pt")
    grid(args.real, generated, hierarchy).save(out / "grid.png")
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
