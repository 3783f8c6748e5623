"""Train a small classifier on real glyphs and let it read generated ones.

    python -m examples.glyphs.read --train data/train --real data/held-out --generated "w = 2=samples/w2" --out reading

For the real held-out faces and for every folder of generated images, it prints the share read as the right class and as
a class of the right superclass. It writes to `--out` these shares, a grid of real above generated glyphs, and the
classifier and its features as TorchScript for `evaluate.py --classifier` and `--features`. The folders of `--train` are
the hierarchy.
"""

import argparse
import json
import os
import warnings
from collections.abc import Sequence
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
from runtime.progress import progress_bar
from sampling.grid import labelled_grid
from tools.figures.gallery import real_images

STEPS, BATCH = 350, 64  # of the classifier's training
SIDE, SHIFT = 32, 3  # pixels per side of its images, and how far they are shifted in training
FEATURES = 64
PER_BLOCK = 12  # classes per superclass in the grid
EXAMPLES = """
    python -m examples.glyphs.read --train data/train --real data/held-out --generated w1=samples/w1 w2=samples/w2 --out reading
    python -m examples.glyphs.read --train data/train --real data/held-out --generated "w = 2=samples/w2" --out reading
"""


# ---- the classifier ------------------------------------------------------------------------------


def stack(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Stack images uint8 (H, W, 3) into a tensor (N, 3, H, W)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def load_images(folder: str | os.PathLike, hierarchy: Hierarchy) -> tuple[torch.Tensor, torch.Tensor]:
    """Load the images of a folder, uint8 (N, 3, H, W), and their labels (N,)."""
    paths, labels = list_images(folder, hierarchy)
    bar = progress_bar(paths, unit="image", desc=f"reading {folder}")
    return stack([np.array(Image.open(path).convert("RGB")) for path in bar]), labels


class Grey(nn.Module):
    """Convert images uint8 (N, 3, H, W) to grey, float32 (N, 1, side, side) in [0, 1]."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(x.float().mean(1, keepdim=True) / 255, (self.side, self.side))


def make_network(classes: int) -> tuple[nn.Module, nn.Module]:
    """Return two networks: grey images -> features (N, FEATURES), and features -> logits (N, classes)."""

    def stage(before, after):
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]

    convolutions = [*stage(1, 32), *stage(32, 64), *stage(64, 128)]
    dense = [nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, FEATURES), nn.LayerNorm(FEATURES)]
    return nn.Sequential(*convolutions, *dense), nn.Linear(FEATURES, classes)


def train_reader(
    images: torch.Tensor, labels: torch.Tensor, classes: int, seed: int = 0
) -> tuple[nn.Module, nn.Module]:
    """Train the classifier; return the networks of its features and its logits, for images uint8 (N, 3, H, W)."""
    torch.manual_seed(seed)
    features, head = make_network(classes)
    net, grey = nn.Sequential(features, head), Grey(SIDE)
    images = grey(images)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS)
    for _ in progress_bar(range(STEPS), unit="step", desc="training the classifier"):
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
def run_network(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the outputs of a network for all images, computed in parts."""
    return torch.cat([net(part) for part in images.split(256)])


def accuracies(logits: torch.Tensor, labels: torch.Tensor, parents: torch.Tensor) -> dict[str, float]:
    """Return the shares of images read as the right class, and as a class of the right superclass."""
    found = logits.argmax(1)
    right = {"class": found == labels, "superclass": parents[found] == parents[labels]}
    return {name: share.double().mean().item() for name, share in right.items()}


def save_script(net: nn.Module, path: str | os.PathLike):
    """Save a network as TorchScript, for evaluate.py."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, but every torch version loads it
        atomic_write(path, lambda part: torch.jit.script(net).save(str(part)))


# ---- the command ---------------------------------------------------------------------------------


def make_grid(real: str, generated: dict[str, str], hierarchy: Hierarchy) -> Image.Image:
    """Draw, for each superclass, a row of real glyphs above a row per folder of `generated` ({title: folder})."""
    images, captions, titles = [], [], []
    for parent, block in enumerate(hierarchy.superclasses):
        labels = (hierarchy.parents == parent).nonzero().flatten().tolist()[:PER_BLOCK]
        blank = PER_BLOCK - len(labels)
        for title, folder in {"real": real, **generated}.items():
            row = stack(real_images(folder, hierarchy, labels))
            images.append(torch.cat([row, torch.full((blank, *row.shape[1:]), 255, dtype=torch.uint8)]))
            names = [hierarchy.classes[label].split("_")[0] for label in labels] if title == "real" else []
            captions += [f"U+{name}" for name in names] + [""] * (PER_BLOCK - len(names))
            titles.append(f"{block.replace('_', ' ')}, real" if title == "real" else title)
    return labelled_grid(torch.cat(images), captions, PER_BLOCK, cell=64, row_titles=titles)


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument
    add("--train", required=True, help="real glyphs to train on, superclass/class/*.png")
    add("--real", required=True, help="real glyphs in other faces")
    add("--generated", nargs="+", required=True, metavar="TITLE=FOLDER", help="folders of generated glyphs")
    add("--out", required=True, help="folder for figures.json, grid.png, reader.pt and features.pt")
    add("--seed", type=int, default=0, help="seed of the classifier's training")
    return parser.parse_args()


def main():
    args = parse_args()
    untitled = [entry for entry in args.generated if "=" not in entry]
    if untitled:
        raise ValueError(f"--generated has {untitled[0]}, expected TITLE=FOLDER: give it a title, such as w=2.")
    generated = dict(entry.rsplit("=", 1) for entry in args.generated)
    hierarchy = Hierarchy.from_folder(args.train)
    folders = {"real, other faces": args.real, **generated}
    for folder in folders.values():  # refuse a wrong folder before the work begins
        list_images(folder, hierarchy)
    sets = {title: load_images(folder, hierarchy) for title, folder in folders.items()}
    features, reader = train_reader(*load_images(args.train, hierarchy), hierarchy.num_classes, args.seed)

    rows = {}
    print(f"{'':24}{'images':>8}{'right class':>14}{'right superclass':>18}")
    for title, (images, labels) in sets.items():
        found = accuracies(run_network(reader, images), labels, hierarchy.parents)
        row = rows[title] = {"images": len(labels), **found}
        print(f"{title:24}{row['images']:8d}{row['class']:14.1%}{row['superclass']:18.1%}")
    out = Path(args.out)
    save_script(reader, out / "reader.pt")
    save_script(features, out / "features.pt")
    make_grid(args.real, generated, hierarchy).save(out / "grid.png")
    (out / "figures.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"real above generated glyphs: {out / 'grid.png'}, the table: {out / 'figures.json'}")


if __name__ == "__main__":
    run_command(main)
