"""Encode an image folder once, for train.py --latents: the posterior's mean and standard deviation.

    torchrun --nproc_per_node=8 -m tools.encode_latents --data-path inat/train_mini --out latents256

Also as plain `python -m`. The same command continues where an earlier one stopped, on any number of
processes. Writes `moments.npy`, float16 (N, F, 2C, h, w), `labels.npy`, int64 (N,), and at the very
end `latents.json`. F = 2: the image and its mirror image, which a VAE does not encode as the mirror
image of the latent. iNaturalist's train_mini at 256 pixels takes 32 KiB an image, 16.4 GB.
"""

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm import tqdm

from autoencoder import load_autoencoder
from data import LATENTS_FORMAT, ImageData
from hierarchy import Hierarchy
from runtime import check_gpu, run_command, write_whole

CHUNK = 512  # images that are lost at most, and shared out as one


def describe(data, hierarchy, autoencoder, args):
    """What latents.json says: all that the numbers depend on."""
    names = [str(Path(path).relative_to(data.root)) for path in data.paths]
    return {
        "format": LATENTS_FORMAT,
        "images": len(data),
        "image_list": hashlib.sha256(json.dumps([names, data.labels.tolist()]).encode()).hexdigest(),
        "image_size": args.image_size,
        "vae": args.vae,
        "scale": autoencoder.scale,
        "channels": autoencoder.channels,
        "size": autoencoder.latent_size(args.image_size),
        "flips": 2 if args.flip else 1,
        "chunk": CHUNK,
        "hierarchy": hierarchy.to_dict(),
    }


def shape_of(info):
    return info["images"], info["flips"], 2 * info["channels"], info["size"], info["size"]


def prepare(out, info, labels):
    """Room for all moments, or the files of an earlier start with the same `info`; True if nothing
    is left to do."""
    for name in ("latents.json", "begun.json"):
        if (out / name).is_file() and json.loads((out / name).read_text()) != info:
            raise ValueError(
                f"{out}/{name} tells of latents of other images or settings: choose another --out, "
                "or remove that folder."
            )
    if (out / "latents.json").is_file():
        return True
    if not (out / "begun.json").is_file():
        out.mkdir(parents=True, exist_ok=True)
        need, free = 2 * int(np.prod(shape_of(info))), shutil.disk_usage(out).free
        if need > free:
            raise ValueError(f"{out} needs {need / 1e9:.1f} GB and has {free / 1e9:.1f} GB free: choose another --out.")
        (out / "done").mkdir(exist_ok=True)
        np.lib.format.open_memmap(out / "moments.npy", mode="w+", dtype=np.float16, shape=shape_of(info))
        np.save(out / "labels.npy", labels.numpy())
        write_json(out / "begun.json", info)
    return False


def write_json(path, record):
    write_whole(path, lambda part: part.write_text(json.dumps(record) + "\n"))


def moments_of(images, autoencoder, flips):
    """(n, 3, H, W) in [-1, 1] -> float16 (n, F, 2C, h, w)"""
    mirrored = [images, images.flip(-1)][:flips]
    parts = [torch.cat(autoencoder.encode_moments(x), dim=1) for x in mirrored]
    return torch.stack(parts, dim=1).half().cpu().numpy()


def encode(data, autoencoder, out, info, rank, world, device, batch_size=32, num_workers=4):
    """Encode those of this rank's chunks (every `world`-th) that are not done."""
    chunks = [k for k in range(rank, -(-len(data) // CHUNK), world) if not (out / f"done/{k}").exists()]
    batches = []  # of rows, none across the border of a chunk
    for k in chunks:
        rows = range(k * CHUNK, min((k + 1) * CHUNK, len(data)))
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    loader = DataLoader(data, batch_sampler=batches, num_workers=num_workers, pin_memory=device.type == "cuda")
    bar = tqdm(total=sum(map(len, batches)), unit="image", disable=rank > 0)
    moments = np.load(out / "moments.npy", mmap_mode="r")
    begin, item = moments.offset, moments[0].nbytes
    with open(out / "moments.npy", "r+b") as file:  # plain writes: several nodes may share the file
        for rows, (x, _) in zip(batches, loader):
            file.seek(begin + rows[0] * item)
            file.write(moments_of(x.to(device), autoencoder, info["flips"]).tobytes())
            if rows[-1] + 1 == len(data) or (rows[-1] + 1) % CHUNK == 0:
                file.flush()
                os.fsync(file.fileno())
                (out / f"done/{rows[0] // CHUNK}").touch()
            bar.update(len(rows))
    bar.close()


def finish(out, info):
    missing = [k for k in range(-(-info["images"] // CHUNK)) if not (out / f"done/{k}").exists()]
    assert not missing, missing
    write_json(out / "latents.json", info)
    (out / "begun.json").unlink()
    shutil.rmtree(out / "done")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data-path", required=True, help="folder of images, see data.py")
    add("--hierarchy", help="inat2021, vegfru, a .json file or a folder (default: the data's own)")
    add("--image-size", type=int, default=256)
    add("--vae", default="ema", help="ema, mse or a folder in diffusers' form")
    add("--out", required=True)
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="the mirror images too")
    add("--batch-size", type=int, default=32, help="images per process")
    add("--num-workers", type=int, default=4)
    args = parser.parse_args(argv)

    # without cpu=True, accelerate takes each process of torchrun on a CPU for a world of its own
    state = PartialState(cpu=not torch.accelerator.is_available())
    check_gpu(state.device)
    if args.hierarchy:
        hierarchy = Hierarchy.load(args.hierarchy)
    else:
        hierarchy = Hierarchy.from_folder(args.data_path)
    data = ImageData(args.data_path, hierarchy, args.image_size)
    autoencoder = load_autoencoder(args.vae, state.device)
    out, info = Path(args.out), describe(data, hierarchy, autoencoder, args)
    done = prepare(out, info, data.labels) if state.is_main_process else None
    state.wait_for_everyone()
    done = done if state.is_main_process else (out / "latents.json").is_file()
    if not done:
        encode(
            data,
            autoencoder,
            out,
            info,
            state.process_index,
            state.num_processes,
            state.device,
            args.batch_size,
            args.num_workers,
        )
        state.wait_for_everyone()
        if state.is_main_process:
            finish(out, info)
    if state.is_main_process:
        print(f"{out}: latents of {len(data):,} images, {hierarchy!r}")


if __name__ == "__main__":
    run_command(main)
