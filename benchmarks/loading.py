"""Time the loading of cached latents against the layout of two small .npy files a sample, features and label.

    python -m benchmarks.loading --out benchmarks/loading.md

Both hold random latents of 256 pixels: `LatentData` the moments of image and mirror image, float16 (2, 8, 32, 32), 32 KiB
a sample; the small files one float32 latent (1, 4, 32, 32), 16 KiB, and its label. Each pass reads all samples in a
new order through a DataLoader without workers. Passes alternate, and the ratio is taken within each pair: warm, all
files in the page cache after a first pass; and cold, their pages dropped before each pass.
"""

import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset import latents
from dataset.images import collate
from dataset.latents import LatentData
from hierarchy import Hierarchy
from runtime.cli import Parser, run_command
from runtime.files import atomic_write
from training.batches import StepBatches

GOAL = 1 / 50
CLASSES = 10
INFO = {"flips": 2, "channels": 4, "size": 32, "chunk": 512, "image_list": ""}


class TwoFiles(Dataset):
    """features/i.npy and labels/i.npy, as the scripts that cache latents for DiT read them."""

    def __init__(self, root):
        self.root = root
        self.names = sorted(path.name for path in (root / "features").iterdir())

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        features = np.load(self.root / "features" / self.names[i])
        label = np.load(self.root / "labels" / self.names[i])
        return torch.from_numpy(features), torch.from_numpy(label)


def write_both(root, count):
    """`count` samples in both layouts, below root/latents and root/files."""
    random = np.random.default_rng(0)
    labels = torch.arange(count) % CLASSES
    names = [f"{i:06d}" for i in range(count)]
    hierarchy = Hierarchy([str(i) for i in range(CLASSES)], ["all"], [0] * CLASSES)
    info = INFO | {"images": count, "hierarchy": hierarchy.to_dict()}
    for folder in ("latents", "files/features", "files/labels"):
        (root / folder).mkdir(parents=True)
    latents.create_moments_file(root / "latents", info)
    moments = np.load(root / "latents/moments.npy", mmap_mode="r+")
    for i, name in enumerate(tqdm(names, desc="write", unit="sample")):
        moments[i] = random.standard_normal(moments.shape[1:], dtype=np.float32)
        np.save(root / f"files/features/{name}.npy", random.standard_normal((1, 4, 32, 32), dtype=np.float32))
        np.save(root / f"files/labels/{name}.npy", labels[i : i + 1].numpy())
    moments.flush()
    hashes = [latents.chunk_hash(root / "latents", info, k) for k in range(latents.chunk_count(info))]
    latents.write_metadata(root / "latents", info, names, labels, hashes, [])


def seconds(data, batches):
    """Of one pass: time per sample."""
    start, count = time.perf_counter(), 0
    for x, *_ in DataLoader(data, batch_sampler=batches, collate_fn=collate):
        count += len(x)
    return (time.perf_counter() - start) / count


def drop_pages(root):
    for path in root.rglob("*.npy"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # only clean pages can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(root, count, batch, pairs, cold):
    """[(seconds per sample from the latents, from the small files), ...], one of each pair."""
    layouts = [(LatentData, root / "latents"), (TwoFiles, root / "files")]
    opened = {} if cold else {kind: kind(folder) for kind, folder in layouts}
    found = []
    for pair in range(pairs + 1):
        batches = StepBatches(count, batch, seed=pair, max_steps=count // batch)
        times = []
        for kind, folder in layouts:
            if cold:
                drop_pages(folder)  # while no process has them mapped: those would stay
            times.append(seconds(opened.get(kind) or kind(folder), batches))
        found.append(times)
    return found[1:]  # the first warms up


def table(results):
    lines = [
        "| page cache | latents | two files | ratio: median (least to most) | goal 1/50 |",
        "|---|---:|---:|---:|---|",
    ]
    for name, pairs in results.items():
        mine, theirs = (statistics.median(times) * 1e6 for times in zip(*pairs))
        ratios = sorted(theirs / mine for mine, theirs in pairs)
        middle = statistics.median(ratios)
        met = "met" if middle >= 1 / GOAL else "missed"
        lines.append(
            f"| {name} | {mine:.1f} µs | {theirs:.0f} µs | 1/{middle:.1f} (1/{ratios[0]:.1f} to 1/{ratios[-1]:.1f}) | {met} |"
        )
    return "\n".join(lines)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--samples", type=int, default=4000)
    add("--batch-size", type=int, default=64)
    add("--pairs", type=int, default=5)
    add("--dir", help="write the samples below this folder (default: the system's for temporary files)")
    add("--out", help="write the result there too, as Markdown")
    args = parser.parse_args(argv)
    if not (args.pairs >= 1 and args.samples >= args.batch_size >= 1):
        raise ValueError(
            f"Found --samples {args.samples}, --batch-size {args.batch_size} and --pairs {args.pairs}, expected at least "
            "1 of each and a whole batch: change them."
        )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        root = Path(folder)
        write_both(root, args.samples)
        settings = root, args.samples, args.batch_size, args.pairs
        results = {"warm": compare(*settings, cold=False), "cold": compare(*settings, cold=True)}
    rate = latents.item_bytes(INFO) / statistics.median(mine for mine, _ in results["cold"])
    text = (
        f"# Loading of cached latents\n\n    python -m benchmarks.loading {' '.join(argv or sys.argv[1:])}\n\n"
        f"{args.samples:,} samples in batches of {args.batch_size}, time per sample, median of {args.pairs} passes each; "
        "ratios are those of neighbouring passes. "
        f"{os.cpu_count()} cores ({platform.machine()}), one process, one thread; Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {np.__version__}. Load average of the machine at the end: {os.getloadavg()[0]:.1f} "
        f"(1 is this process).\n\n{table(results)}\n\n"
        "Warm: all files are in the page cache, as in every epoch after the first where they fit in memory, and in the "
        "first too once `LatentData.verify` has read them. Cold: dropped from it before each pass with `posix_fadvise`; a "
        "cache of the disk's own, and the cached names and inodes of the small files, still help. What a cold pass "
        f"takes is the random reads of {latents.item_bytes(INFO) // 1024} KiB from the disk, {rate / 1e9:.1f} GB/s "
        "here, twice the bytes of the small files for the mirror image.\n"
    )
    print(text)
    if args.out:
        atomic_write(args.out, lambda part: part.write_text(text))


if __name__ == "__main__":
    run_command(main)
