"""Encode a folder of images into latents once, for train.py --latents.

    torchrun --nproc_per_node=8 -m tools.encode_latents --data-path inat/train_mini --out latents256

Plain `python -m` works too. If a run stops or is killed, the same command resumes it, on any number of processes. The
files are those of dataset/latents.py; latents.json is written last. --flip also encodes the mirror image of each image,
since a VAE does not encode it as the mirror image of the latent. At 256 pixels an image with its mirror image takes
32 KiB, iNaturalist's train_mini 16.4 GB.

An image that cannot be read gets the latents of the image that a training on images shows in its place; latents.json
lists both under "skipped".
"""

import argparse
import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from autoencoder import Autoencoder, load_autoencoder
from dataset import latents
from dataset.images import ImageData
from hierarchy import Hierarchy
from runtime.cli import Parser, run_command
from runtime.device import DTYPES, PRECISIONS, resolve_precision
from runtime.files import Lock, path_in_errors
from runtime.processes import run_on_main, start_processes
from runtime.progress import progress_bar
from runtime.text import shorten

CHUNK = 512  # images that a process takes at a time; a killed process loses its chunk at most
EXAMPLES = """
torchrun --nproc_per_node=8 -m tools.encode_latents --data-path inat/train_mini --out latents256
python -m tools.encode_latents --data-path inat/train_mini --image-size 512 --mixed-precision bf16 --out latents512
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument_group("data").add_argument
    add("--data-path", required=True, help="folder of images: superclass/class/*.jpg or class/*.jpg")
    add(
        "--hierarchy",
        help="inat2021, vegfru, a .json file or a folder of images; if not given, the data's own",
    )
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="encode the mirror images too")
    add("--num-workers", type=int, default=4, help="processes that load images, for each encoding process")
    add = parser.add_argument_group("model").add_argument
    add("--vae", default="ema", help="autoencoder: ema or mse (downloaded), a local folder, or none to keep pixels")
    add("--image-size", type=int, default=256, help="pixels per side")
    add = parser.add_argument_group("precision and memory").add_argument
    add("--mixed-precision", choices=PRECISIONS, default="no", help="precision of the autoencoder, as in train.py")
    add("--batch-size", type=int, default=32, help="images per forward pass, in each process")
    add = parser.add_argument_group("output").add_argument
    add("--out", required=True, help="folder for the latents; the same command again resumes there")
    return parser.parse_args(argv)


# ---- the folder ----------------------------------------------------------------------------------


def describe(data: ImageData, hierarchy: Hierarchy, autoencoder: Autoencoder, args: argparse.Namespace) -> dict:
    """Return the record of latents.json: everything that the latents depend on."""
    digest = autoencoder.encoder_digest()
    return {
        "format": latents.FORMAT,
        "images": len(data),
        "image_list": data.fingerprint,
        "image_size": args.image_size,
        "vae": args.vae,
        **({"encoder": digest} if digest else {}),
        "scale": autoencoder.scale,
        "precision": str(autoencoder.dtype).removeprefix("torch."),
        "channels": autoencoder.channels,
        "size": autoencoder.latent_size(args.image_size),
        "flips": 2 if args.flip else 1,
        "chunk": CHUNK,
        "hierarchy": hierarchy.to_dict(),
    }


def prepare(out: Path, info: dict) -> Lock:
    """Create the folder with an empty moments.npy, or accept that of an earlier start with the same `info`.

    Returns the lock on the folder. Raises ValueError if the folder belongs to other images or settings, if another
    process encodes into it, or if the disk is too small.
    """
    for path in (out / "latents.json", out / "begun.json"):
        found = latents.read_sealed(path) if path.is_file() else info
        compared = {name: value for name, value in info.items() if name in found or name != "encoder"}
        if found | compared != found:  # earlier versions began without that digest
            raise ValueError(
                f"{path} belongs to other images or settings: choose another --out, or remove that folder."
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


def read_chunk_record(out: Path, k: int) -> dict | None:
    """Return {"hash", "skipped"} of chunk k if it is complete, or else None."""
    try:
        return latents.read_sealed(out / f"done/{k}")
    except (FileNotFoundError, ValueError):  # not yet written, or damaged
        return None


def finish(out: Path, data: ImageData):
    """Write the metadata, as recorded when the encoding began, and remove the records of the chunks."""
    info = latents.read_sealed(out / "begun.json")  # an earlier version may have begun: no digest of the encoder
    records = [read_chunk_record(out, k) for k in range(latents.chunk_count(info))]
    assert all(records)
    skipped = [pair for record in records for pair in record["skipped"]]
    latents.write_metadata(out, info, data.paths, data.labels, [record["hash"] for record in records], skipped)
    (out / "begun.json").unlink()
    shutil.rmtree(out / "done")


# ---- encoding ------------------------------------------------------------------------------------


def encode(
    data: ImageData,
    autoencoder: Autoencoder,
    out: Path,
    info: dict,
    rank: int,
    world: int,
    device: torch.device,
    batch_size: int = 32,
    num_workers: int = 4,
):
    """Encode every `world`-th chunk, from chunk `rank` on, that is not complete."""
    batches = []  # of indices; no batch crosses the end of a chunk
    for k in range(rank, latents.chunk_count(info), world):
        rows = latents.chunk_rows(info, k)
        if not read_chunk_record(out, k):
            batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    loader = DataLoader(data, batch_sampler=batches, num_workers=num_workers, pin_memory=device.type == "cuda")
    bar = progress_bar(total=sum(map(len, batches)), unit="image", disable=rank > 0)
    path = out / "moments.npy"
    with bar, path_in_errors(path), open(path, "r+b") as file:  # plain writes: several nodes may share the file
        header = file.read(latents.NPY_HEADER)
        for rows, (x, _, shown) in zip(batches, loader):
            k = rows[0] // info["chunk"]
            chunk = latents.chunk_rows(info, k)
            if rows[0] == chunk[0]:
                digest, skipped = hashlib.sha256(b"" if k else header), []
            moments = encode_batch(x.to(device), autoencoder, info["flips"])
            check_finite(moments, [data.paths[i] for i in shown])
            file.seek(latents.NPY_HEADER + rows[0] * latents.item_bytes(info))
            file.write(moments.tobytes())
            digest.update(moments.tobytes())
            skipped += [(i, j) for i, j in zip(rows, shown.tolist()) if i != j]
            if rows[-1] == chunk[-1]:
                file.flush()
                os.fsync(file.fileno())
                latents.write_sealed(out / f"done/{k}", {"hash": digest.hexdigest(), "skipped": skipped})
            bar.update(len(rows))


def encode_batch(images: torch.Tensor, autoencoder: Autoencoder, flips: int) -> np.ndarray:
    """Encode images (n, 3, H, W) in [-1, 1] into moments, float16 (n, F, 2C, h, w)."""
    mirrored = [images, images.flip(-1)][:flips]
    parts = [torch.cat(autoencoder.encode_moments(x), dim=1) for x in mirrored]
    return torch.stack(parts, dim=1).half().cpu().numpy()


def check_finite(moments: np.ndarray, paths: Sequence[str]):
    """Raise ValueError naming the images whose moments (n, ...) contain NaN or infinity."""
    finite = np.isfinite(moments).reshape(len(moments), -1).all(axis=1)
    bad = [path for path, fine in zip(paths, finite) if not fine]
    if bad:
        raise ValueError(
            f"The latents of {shorten(bad)} contain NaN or infinity in fp16, expected finite values: check the images, or "
            "pass another --vae."
        )


# ---- the command ---------------------------------------------------------------------------------


def print_summary(out: Path, data: ImageData, hierarchy: Hierarchy):
    print(f"{out}: latents of {len(data):,} images, {hierarchy!r}")
    skipped = latents.read_sealed(out / "latents.json")["skipped"]
    if skipped:
        paths = shorten(data.paths[i] for i, _ in skipped)
        print(
            f"Images that cannot be read: {len(skipped)} ({paths}), each replaced by the next readable one of its class."
        )
    for warning in data.warnings:
        print(warning)


def main(argv: Sequence[str] | None = None):
    args = parse_args(argv)
    state = start_processes()
    if args.hierarchy:
        hierarchy = Hierarchy.load(args.hierarchy)
    else:
        hierarchy = Hierarchy.from_folder(args.data_path, allow_flat=True)
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
                finish(out, data)
    if state.is_main_process:
        print_summary(out, data, hierarchy)


if __name__ == "__main__":
    run_command(main)
