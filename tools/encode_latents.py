"""Encode an image folder once, for train.py --latents: the posterior's mean and standard deviation.

    torchrun --nproc_per_node=8 -m tools.encode_latents --data-path inat/train_mini --out latents256

Also as plain `python -m`. The same command continues where an earlier one stopped or was killed, on
any number of processes. Writes the files that latents.py describes, `latents.json` at the very end.
F = 2: the image and its mirror image, which a VAE does not encode as the mirror image of the latent.
iNaturalist's train_mini at 256 pixels takes 32 KiB an image, 16.4 GB.

An image that cannot be read gets the latents of the one that a training on images shows in its place;
latents.json lists such under "skipped".
"""

import argparse
import hashlib
import os
import shutil
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from autoencoder import load_autoencoder
from dataset import latents
from dataset.images import ImageData
from hierarchy import Hierarchy
from runtime.cli import Parser, run_command
from runtime.device import DTYPES, PRECISIONS, resolve_precision
from runtime.files import Lock, path_in_errors
from runtime.processes import run_on_main, start_processes
from runtime.text import shorten

CHUNK = 512  # images that are lost at most, and shared out as one


def describe(data, hierarchy, autoencoder, args):
    """What latents.json says: all that the numbers depend on."""
    return {
        "format": latents.FORMAT,
        "images": len(data),
        "image_list": data.fingerprint,
        "image_size": args.image_size,
        "vae": args.vae,
        "scale": autoencoder.scale,
        "precision": str(autoencoder.dtype).removeprefix("torch."),
        "channels": autoencoder.channels,
        "size": autoencoder.latent_size(args.image_size),
        "flips": 2 if args.flip else 1,
        "chunk": CHUNK,
        "hierarchy": hierarchy.to_dict(),
    }


def prepare(out, info):
    """Room for all moments, or the files of an earlier start with the same `info`, finished or not -> the folder's `Lock`."""
    for path in (out / "latents.json", out / "begun.json"):
        found = latents.read_sealed(path) if path.is_file() else info
        if found | info != found:
            raise ValueError(
                f"{path} tells of latents of other images or settings: choose another --out, or remove that folder."
            )
    out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out, "encoding into", "--out")
    if not any((out / name).is_file() for name in ("latents.json", "begun.json")):
        need, free = info["images"] * latents.item_bytes(info), shutil.disk_usage(out).free
        if need > free:
            raise ValueError(f"{out} needs {need / 1e9:.1f} GB and has {free / 1e9:.1f} GB free: choose another --out.")
        shutil.rmtree(out / "done", ignore_errors=True)
        (out / "done").mkdir()
        latents.create_moments_file(out, info)
        latents.write_sealed(out / "begun.json", info)
    return lock


def done(out, k):
    """{"hash", "skipped"} of chunk k if it is written, else None."""
    try:
        return latents.read_sealed(out / f"done/{k}")
    except (FileNotFoundError, ValueError):  # not yet, or damaged
        return None


def moments_of(images, autoencoder, flips):
    """(n, 3, H, W) in [-1, 1] -> float16 (n, F, 2C, h, w)"""
    mirrored = [images, images.flip(-1)][:flips]
    parts = [torch.cat(autoencoder.encode_moments(x), dim=1) for x in mirrored]
    return torch.stack(parts, dim=1).half().cpu().numpy()


def check_finite(moments, names):
    """ValueError naming the images of which a number of the moments (n, ...) is not finite."""
    finite = np.isfinite(moments).reshape(len(moments), -1).all(axis=1)
    bad = [name for name, fine in zip(names, finite) if not fine]
    if bad:
        raise ValueError(
            f"The latents of {shorten(bad)} hold NaN or infinity in fp16, expected finite numbers: look at the images, or "
            "pass another --vae."
        )


def encode(data, autoencoder, out, info, rank, world, device, batch_size=32, num_workers=4):
    """Encode those of this rank's chunks (every `world`-th) that are not done."""
    batches = []  # of rows, none across the border of a chunk
    for k in range(rank, latents.chunk_count(info), world):
        rows = latents.chunk_rows(info, k)
        if not done(out, k):
            batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    loader = DataLoader(data, batch_sampler=batches, num_workers=num_workers, pin_memory=device.type == "cuda")
    bar = tqdm(total=sum(map(len, batches)), unit="image", disable=rank > 0)
    path = out / "moments.npy"
    with bar, path_in_errors(path), open(path, "r+b") as file:  # plain writes: several nodes may share the file
        header = file.read(latents.NPY_HEADER)
        for rows, (x, _, shown) in zip(batches, loader):
            k = rows[0] // info["chunk"]
            chunk = latents.chunk_rows(info, k)
            if rows[0] == chunk[0]:
                digest, skipped = hashlib.sha256(b"" if k else header), []
            moments = moments_of(x.to(device), autoencoder, info["flips"])
            check_finite(moments, [data.name(i) for i in shown])
            file.seek(latents.NPY_HEADER + rows[0] * latents.item_bytes(info))
            file.write(moments.tobytes())
            digest.update(moments.tobytes())
            skipped += [(i, j) for i, j in zip(rows, shown.tolist()) if i != j]
            if rows[-1] == chunk[-1]:
                file.flush()
                os.fsync(file.fileno())
                latents.write_sealed(out / f"done/{k}", {"hash": digest.hexdigest(), "skipped": skipped})
            bar.update(len(rows))


def finish(out, info, data):
    records = [done(out, k) for k in range(latents.chunk_count(info))]
    assert all(records)
    skipped = [pair for record in records for pair in record["skipped"]]
    latents.write_metadata(out, info, data.names, data.labels, [record["hash"] for record in records], skipped)
    (out / "begun.json").unlink()
    shutil.rmtree(out / "done")


def report(out, data, hierarchy):
    print(f"{out}: latents of {len(data):,} images, {hierarchy!r}")
    skipped = latents.read_sealed(out / "latents.json")["skipped"]
    if skipped:
        names = shorten(data.name(i) for i, _ in skipped)
        print(f"Images that cannot be read: {len(skipped)} ({names}); for each stands the next of its class that can.")
    for warning in data.warnings:
        print(warning)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data-path", required=True, help="folder of images, see data.py")
    add("--hierarchy", help="inat2021, vegfru, a .json file or a folder (default: the data's own)")
    add("--image-size", type=int, default=256)
    add("--vae", default="ema", help="ema, mse or a folder in diffusers' form")
    add("--mixed-precision", choices=PRECISIONS, default="no", help="what the autoencoder computes in, as in train.py")
    add("--out", required=True)
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="the mirror images too")
    add("--batch-size", type=int, default=32, help="images per process")
    add("--num-workers", type=int, default=4)
    args = parser.parse_args(argv)

    state = start_processes()
    if args.hierarchy:
        hierarchy = Hierarchy.load(args.hierarchy)
    else:
        hierarchy = Hierarchy.from_folder(args.data_path)
    data = ImageData(args.data_path, hierarchy, args.image_size)
    precision = resolve_precision(args.mixed_precision, state.device)
    autoencoder = load_autoencoder(args.vae, state.device, DTYPES[precision])
    out, info = Path(args.out), describe(data, hierarchy, autoencoder, args)
    lock = run_on_main(state, prepare, out, info)
    with closing(lock) if lock else nullcontext():
        if not (out / "latents.json").is_file():
            share = state.process_index, state.num_processes, state.device
            encode(data, autoencoder, out, info, *share, args.batch_size, args.num_workers)
            state.wait_for_everyone()
            if state.is_main_process:
                finish(out, info, data)
    if state.is_main_process:
        report(out, data, hierarchy)


if __name__ == "__main__":
    run_command(main)
