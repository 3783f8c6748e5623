"""List the generated images that a classifier takes for their class, to train on these alone.

    python -m tools.filter_images --images samples/fill --classifier resnet50=real.safetensors --top-k 5 --out kept.json

Writes a list for tools.train_classifier --generated. The images stay as they are. Both SaSPA (arXiv 2406.14551) and
DiffuLT (arXiv 2403.05170) filter generated images by a network trained on the real ones; SaSPA keeps an image if its
class is among the most probable ones, as --top-k does.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from dataset.listing import list_files
from evaluation.features import Network
from evaluation.named_networks import named_network
from evaluation.networks import match_outputs
from hierarchy import Hierarchy
from runtime.cli import Parser, check_range, run_command
from runtime.device import best_device, check_gpu
from runtime.files import atomic_write
from runtime.progress import progress_bar
from tools.classifier.data import KEPT_FORMAT, CentreCrops, LabelledImages, find_hierarchy, open_images

EXAMPLES = """
python -m tools.filter_images --images samples/fill --classifier resnet50=real.safetensors --top-k 5 --out kept.json
python -m tools.filter_images --images samples/fill --classifier resnet50=real.safetensors --min-confidence 0.2 --out kept.json
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument_group("images").add_argument
    add("--images", required=True, metavar="DIR", help="folder of generated images; it is only read")
    add("--hierarchy", help="inat2021, vegfru, a .json file or a folder of images; if not given, that of --images")
    add("--image-size", type=int, default=256, help="pixels per side of the centre crops")
    add = parser.add_argument_group("classifier").add_argument
    add("--classifier", required=True, help="MODEL=FILE, MODEL@SIZE=FILE or TorchScript, as for evaluate.py")
    add("--batch-size", type=int, default=64, help="images per forward pass")
    add("--num-workers", type=int, default=4, help="processes that load images")
    add = parser.add_argument_group("choice").add_argument
    add("--top-k", type=int, help="keep an image if its class is among the K most probable ones")
    add("--min-confidence", type=float, metavar="P", help="keep an image if the probability of its class is P or more")
    add("--out", required=True, metavar="FILE", help="list to write, .json")
    return parser.parse_args(argv)


def check_settings(args: argparse.Namespace):
    """Raise ValueError if a flag is invalid or none chooses images."""
    many = (1, 10**9)
    check_range(args, image_size=many, batch_size=many, num_workers=(0, 1024), top_k=many, min_confidence=(0, 1))
    if args.top_k is None and args.min_confidence is None:
        raise ValueError("Nothing says which images to keep, expected --top-k, --min-confidence or both: add one.")
    if Path(args.out).suffix != ".json":
        raise ValueError(f"--out is {args.out}, expected a name that ends in .json: add it.")


@torch.no_grad()
def judge(
    network: Network, images: LabelledImages, hierarchy: Hierarchy, args: argparse.Namespace, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of the class of each image, float64 (N,), and its place among the classes, 0 for the first.

    Raises ValueError if the classifier has other classes.
    """
    blank = torch.zeros(1, 3, args.image_size, args.image_size, dtype=torch.uint8, device=device)
    outputs = match_outputs(network, network(blank)["logits"].shape[1], hierarchy)
    known = outputs >= 0  # a classifier may have further classes
    output_of = torch.empty(hierarchy.num_classes, dtype=torch.int64)
    output_of[outputs[known]] = torch.from_numpy(np.flatnonzero(known))
    loader = DataLoader(
        CentreCrops(images, args.image_size, range(len(images))), args.batch_size, num_workers=args.num_workers
    )
    confidence, place = [], []
    own = output_of[torch.from_numpy(images.labels)].split(args.batch_size)
    for pixels, output in zip(progress_bar(loader, unit="batch", desc="filtering"), own):
        shares = network(pixels.to(device))["logits"].double().softmax(1).cpu()
        mine = shares.gather(1, output[:, None])
        confidence.append(mine[:, 0])
        place.append((shares > mine).sum(1))
    return torch.cat(confidence).numpy(), torch.cat(place).numpy()


def choose(confidence: np.ndarray, place: np.ndarray, top_k: int | None, min_confidence: float | None) -> np.ndarray:
    """Return which images to keep, bool (N,); both conditions hold if both are given."""
    keep = np.ones(len(confidence), bool)
    if top_k is not None:
        keep &= place < top_k
    if min_confidence is not None:
        keep &= confidence >= min_confidence
    return keep


def summary(keep: np.ndarray, images: LabelledImages, hierarchy: Hierarchy, out: str) -> str:
    """Return how many images are kept, and of which class the smallest share."""
    total = images.counts(hierarchy.num_classes)
    kept = np.bincount(images.labels[keep], minlength=hierarchy.num_classes)
    worst = int(np.where(total > 0, kept / np.maximum(total, 1), 2).argmin())
    return (
        f"{out}: {keep.sum():,} of {len(keep):,} images kept ({100 * keep.mean():.0f}%), the fewest of "
        f"{hierarchy.classes[worst]}: {kept[worst]} of {total[worst]}"
    )


def main(argv: Sequence[str] | None = None):
    args = parse_args(argv)
    check_settings(args)
    device = best_device()
    check_gpu(device)
    hierarchy = find_hierarchy(args.hierarchy, [args.images])
    images = open_images([args.images], hierarchy)
    if not len(images):
        raise ValueError(f"{args.images} has no images, expected some: check the path.")
    network = named_network(args.classifier, "logits", device=device)
    confidence, place = judge(network, images, hierarchy, args, device)
    keep = choose(confidence, place, args.top_k, args.min_confidence)

    # Write the list; paths are relative to the folder:
    listing = list_files(args.images, hierarchy, partial=True)
    record = {
        "format": KEPT_FORMAT,
        "folder": str(Path(args.images).resolve()),
        "classifier": {"name": args.classifier, **network.record},
        "top_k": args.top_k,
        "min_confidence": args.min_confidence,
        "images": [name for name, kept in zip(listing.paths, keep) if kept],
    }
    atomic_write(args.out, lambda part: part.write_text(json.dumps(record, indent=1) + "\n"))
    print(summary(keep, images, hierarchy, args.out))


if __name__ == "__main__":
    run_command(main)
