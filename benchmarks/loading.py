"""Time the loading of cached latents against two small .npy files per sample, one for features and one for the label.

    python -m benchmarks.loading --out benchmarks/loading.md

Both contain random latents of 256 pixels: `LatentData` the moments of the image and its mirror image, float16
(2, 8, 32, 32), 32 KiB per sample; the small files one float32 latent (1, 4, 32, 32), 16 KiB, and its label. Each pass
reads all samples in a new order through a DataLoader without workers. The two layouts take turns, and the ratio is taken
within each pair of passes. Warm: all files are in the page cache after a first pass. Cold: they are dropped from it
before each pass.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
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
from runtime.text import markdown_table
from training.batches import StepBatches

GOAL = 1 / 50  # time of the latents over that of the small files
CLASSES = 10
EXAMPLES = """
    python -m benchmarks.loading --out benchmarks/loading.md
    python -m benchmarks.loading --samples 1000 --pairs 2 --dir /data
"""
INFO = {"flips": 2, "channels": 4, "size": 32, "chunk": 512, "image_list": ""}


class TwoFiles(Dataset):
    """Samples of features/i.npy and labels/i.npy, the layout of scripts that cache latents for DiT."""

    def __init__(self, root: Path):
        self.root = root
        self.names = sorted(path.name for path in (root / "features").iterdir())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        features = np.load(self.root / "features" / self.names[i])
        label = np.load(self.root / "labels" / self.names[i])
        return torch.from_numpy(features), torch.from_numpy(label)


def write_both(root: Path, count: int):
    """Write `count` random samples in both layouts, to root/latents and root/files."""
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


def time_pass(data: Dataset, batches: StepBatches) -> float:
    """Return the seconds per sample of a pass."""
    start, count = time.perf_counter(), 0
    for x, *_ in DataLoader(data, batch_sampler=batches, collate_fn=collate):
        count += len(x)
    return (time.perf_counter() - start) / count


def drop_pages(root: Path):
    """Drop the .npy files below `root` from the page cache."""
    for path in root.rglob("*.npy"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # only clean pages can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(root: Path, count: int, batch: int, pairs: int, cold: bool) -> list[list[float]]:
    """Return [seconds per sample of the latents, of the small files] for each pair of passes."""
    layouts = [(LatentData, root / "latents"), (TwoFiles, root / "files")]
    opened = {} if cold else {kind: kind(folder) for kind, folder in layouts}
    found = []
    for pair in range(pairs + 1):
        batches = StepBatches(count, batch, seed=pair, max_steps=count // batch)
        times = []
        for kind, folder in layouts:
            if cold:
                drop_pages(folder)  # before they are mapped: mapped pages stay
            times.append(time_pass(opened.get(kind) or kind(folder), batches))
        found.append(times)
    return found[1:]  # the first pair warms up


def table(results: dict[str, list[Sequence[float]]]) -> str:
    """Return the results of `compare`, {page cache: pairs}, as a Markdown table."""
    rows = []
    for name, pairs in results.items():
        mine, theirs = (statistics.median(times) * 1e6 for times in zip(*pairs))
        ratios = sorted(theirs / mine for mine, theirs in pairs)
        middle = statistics.median(ratios)
        ratio = f"1/{middle:.1f} (1/{ratios[0]:.1f} to 1/{ratios[-1]:.1f})"
        rows.append([name, f"{mine:.1f} µs", f"{theirs:.0f} µs", ratio, "met" if middle >= 1 / GOAL else "missed"])
    titles = "page cache", "latents", "two files", "ratio: median (least to most)", "goal 1/50"
    return "\n".join(markdown_table(titles, rows, align="lrrrl"))


def report(args: argparse.Namespace, argv: Sequence[str], results: dict[str, list[Sequence[float]]]) -> str:
    """Return the complete page in Markdown."""
    size = latents.item_bytes(INFO)
    rate = size / statistics.median(mine for mine, _ in results["cold"])
    return (
        f"# Loading of cached latents\n\n    python -m benchmarks.loading {' '.join(argv)}\n\n"
        f"{args.samples:,} samples in batches of {args.batch_size}, time per sample, median of {args.pairs} passes each; "
        "ratios compare neighbouring passes. "
        f"{os.cpu_count()} cores ({platform.machine()}), one process, one thread; Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {np.__version__}. Load average of the machine at the end: {os.getloadavg()[0]:.1f} "
        f"(1 is this process).\n\n{table(results)}\n\n"
        "Warm: all files are in the page cache. This is so in every epoch after the first if they fit in memory, and in the "
        "first too once `LatentData.verify` has read them. Cold: the files are dropped from the page cache before each pass "
        "with `posix_fadvise`; the disk's own cache and the cached names and inodes of the small files still help. A cold "
        f"pass is limited by random reads of {size // 1024} KiB from the disk ({rate / 1e9:.1f} GB/s here), twice the "
        "bytes of the small files because of the mirror image.\n"
    )


def main(argv: Sequence[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument
    add("--samples", type=int, default=4000, help="samples to write and to read")
    add("--batch-size", type=int, default=64, help="samples per batch")
    add("--pairs", type=int, default=5, help="timed passes of each layout")
    add(
        "--dir", help="write the samples below this folder; if not given, below the system's folder for temporary files"
    )
    add("--out", help="file for the page, in Markdown")
    args = parser.parse_args(argv)
    if not (args.pairs >= 1 and args.samples >= args.batch_size >= 1):
        raise ValueError(
            f"Found --samples {args.samples}, --batch-size {args.batch_size} and --pairs {args.pairs}, expected at least 1 "
            "each, and as many samples as a batch has."
        )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        root = Path(folder)
        write_both(root, args.samples)
        settings = root, args.samples, args.batch_size, args.pairs
        results = {"warm": compare(*settings, cold=False), "cold": compare(*settings, cold=True)}
    text = report(args, argv, results)
    print(text)
    if args.out:
        atomic_write(args.out, lambda part: part.write_text(text))


if __name__ == "__main__":
    run_command(main)
