"""Sample tens of thousands of images for an evaluation.

    torchrun --nproc_per_node=8 sample_ddp.py --ckpt results/NAME/adapters/0200000.safetensors --num-fid-samples 50000
    python sample_ddp.py --ckpt results/NAME/adapters/0200000.safetensors --num-fid-samples 50000 --format both

Writes `<sample-dir>/<name>/<class>/<number>.png`, or `<sample-dir>/<name>.npz` as ADM's evaluation reads it, or both. After an
interruption the same command, on any number of processes, samples the missing images: there are exactly N in the end.

Seed and number alone determine the noise of image k, at every step. On a CPU an image is the same bit for bit for any batch
size and number of processes: the network sees one image at a time and computes in one thread, because the rounding errors
of a matrix product depend on its height and on the threads that share it (1e-6 of an image, measured). To use all cores
of a CPU, start as many processes. On a GPU forward passes are batched, and images change by such rounding errors alone.
"""

import runtime.quick_help  # noqa: F401, I001 - first: --help does not wait for the imports below
import argparse
import hashlib
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from autoencoder import Autoencoder
from checkpoint.description import ModelDescription
from guidance import hash_integer
from runtime.cli import Parser, check_range, run_command
from runtime.device import (
    describe_computation,
    explain_full_memory,
    half_dtype,
    resolve_compile,
    resolve_precision,
    set_tf32,
)
from runtime.files import sha256
from runtime.processes import agree, agree_in_turns, agree_on_main, keep_process_group, start_processes
from runtime.progress import progress_bar
from sampling.load import SWAPPING, build_guidance, load_model
from sampling.options import add_options, advise_smaller, check_options, parse_with_preset
from sampling.samplers import check_finite_images, sample_keyed, to_uint8
from sampling.speed import speed_up
from sampling.store import FORMATS, Store, Writer

EXAMPLES = """
torchrun --nproc_per_node=8 sample_ddp.py --ckpt results/inat/adapters/0200000.safetensors --mixed-precision bf16
python sample_ddp.py --ckpt results/inat/adapters/0200000.safetensors --num-fid-samples 10000 --format both --name inat
"""
GOLDEN_RATIO = (5**0.5 - 1) / 2


# ---- flags ---------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """Parse the command line. Raises ValueError for an unknown or malformed flag."""
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add_options(parser)
    add = parser.add_argument_group("images").add_argument
    add("--num-fid-samples", type=int, default=50_000, help="number of images")
    add(
        "--labels",
        choices=["balanced", "random"],
        default="balanced",
        help="balanced: equally many images of each class, within one; random: uniform draws",
    )
    add("--global-seed", type=int, default=0, help="seed of noise and random labels")
    add("--per-proc-batch-size", type=int, default=32, help="images per forward pass on a GPU")
    add = parser.add_argument_group("output").add_argument
    add("--format", choices=FORMATS, default="png", help="form of the images")
    add("--sample-dir", default="samples", help="folder of all runs")
    add("--name", help="folder of this run; if not given, made of model, checkpoint, size, vae, scale, steps and seed")
    return parse_with_preset(parser)


def check_settings(args: argparse.Namespace, world: int):
    """Raise ValueError if a flag is invalid or contradicts another, or if there are more processes than images."""
    check_options(args)
    many = (1, 10**9)
    check_range(args, num_fid_samples=many, per_proc_batch_size=many, global_seed=(0, 2**63 - 1))
    if args.name and (Path(args.name).name != args.name or args.name == ".."):
        raise ValueError(f"--name is {args.name}, expected the name of a folder: choose its place with --sample-dir.")
    if world > args.num_fid_samples:
        raise ValueError(
            f"{world} processes are more than --num-fid-samples {args.num_fid_samples}: start as many as there are images, or "
            "fewer."
        )


# ---- labels and settings -------------------------------------------------------------------------


def balanced_labels(count: int, classes: int) -> np.ndarray:
    """Return labels int64 (count,) in which the numbers of images of two classes differ by at most one.

    Image k has label k * stride mod classes, with a stride near the golden section of `classes` and coprime to it. So
    every `classes` consecutive images contain each class once. And any consecutive images are spread evenly over the order
    of the classes, in which a superclass is one range or a few: a short run shows each superclass in its share.
    """
    stride = max(1, round(GOLDEN_RATIO * classes))
    while math.gcd(stride, classes) > 1:
        stride += 1
    return np.arange(count) * stride % classes


def random_labels(count: int, classes: int, seed: int) -> np.ndarray:
    """Return labels int64 (count,), drawn uniformly; the label of image k depends on (seed, k) alone."""
    return np.array([hash_integer(f"label {seed} {k}") % classes for k in range(count)])


def collect_settings(
    args: argparse.Namespace, description: ModelDescription, autoencoder: Autoencoder, precision: str, compiled: bool
) -> dict:
    """Return everything that determines the images, as JSON; precision and compiled: those in use."""
    weights = hashlib.sha256()
    for name, tensor in autoencoder.vae.state_dict().items() if autoencoder.vae else ():
        weights.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        "model": description.model,
        "image_size": description.image_size,
        "ckpt_sha256": sha256(description.file),
        "base_sha256": description.base and description.base.sha256,
        "hierarchy": description.hierarchy.digest(),
        "vae_sha256": weights.hexdigest(),
        "guidance": args.guidance,
        "weak_sha256": args.weak and sha256(args.weak),
        "cfg_scale": args.cfg_scale,
        "cfg_scale_parent": args.cfg_scale_parent,
        "cfg_channels": args.cfg_channels,
        "guidance_interval": args.guidance_interval,
        "sampler": args.sampler,
        "num_sampling_steps": args.num_sampling_steps,
        "mixed_precision": precision,
        "tf32": args.tf32,
        "compile": compiled,
        "global_seed": args.global_seed,
        "labels": args.labels,
        "num_fid_samples": args.num_fid_samples,
        "format": args.format,
    }


def run_name(args: argparse.Namespace, description: ModelDescription) -> str:
    """Return DiT-XL-2-NAME-0200000-size-256-vae-mse-cfg-4.0-steps-250-seed-0, then guidance and sampler unless default."""
    path = Path(args.ckpt or "pretrained")
    run = [path.parent.parent.name] if path.parent.name == "adapters" else []
    name = "-".join([description.model.replace("/", "-"), *run, path.stem])
    name += f"-size-{description.image_size}-vae-{Path(description.vae).name}-cfg-{args.cfg_scale}"
    name += f"-steps-{args.num_sampling_steps}-seed-{args.global_seed}"
    extra = [args.guidance] * (args.guidance != "superclass") + [args.sampler] * (args.sampler != "ddpm")
    return "-".join([name, *extra])


# ---- sampling ------------------------------------------------------------------------------------


def sample_missing(store: Store, generate: Callable, seed: int, batch_size: int, rank: int, world: int):
    """Sample and write the missing images of process `rank` of `world`.

    generate: called with a list of n numbers, returns images (n, 3, H, W) in [-1, 1]. Raises ValueError if an image is
    not finite; it is not written.
    """
    count, missing = len(store.labels), store.missing(rank, world)
    done = len(range(rank, count, world)) - len(missing)
    share = count / (done + len(missing))  # rank 0 shows the progress of all: their shares are about equal
    bar = progress_bar(total=count, initial=round(done * share), unit="image", disable=rank > 0)
    with bar, Writer(store.write) as writer:
        for i in range(0, len(missing), batch_size):
            numbers = missing[i : i + batch_size]
            images = generate(numbers)
            check_finite_images(images, [f"Image {k} of seed {seed} (class {store.labels[k]})" for k in numbers])
            for k, pixels in zip(numbers, to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy()):
                writer.put(k, pixels)
            done += len(numbers)
            bar.update(round(done * share) - bar.n)


def sample(args: argparse.Namespace):
    """Sample the images of a run that do not exist yet; called by every process."""
    # Set up processes:
    state = start_processes()
    device, rank, world = state.device, state.process_index, state.num_processes
    agree(state, check_settings, args, world)
    count = args.num_fid_samples
    if device.type == "cpu":
        torch.set_num_threads(1)
    set_tf32(args.tf32)

    # Load model:
    precision = agree(state, resolve_precision, args.mixed_precision, device)
    half = half_dtype(precision)
    model, description, autoencoder = agree_in_turns(state, load_model, args, device, half)
    # as many steps as in batches of 32 in one process, so that a run continues on any number of processes
    compiled = resolve_compile(args.compile, device, args.num_sampling_steps * count // 32)
    guidance = agree(state, build_guidance, args, model)
    speed_up(model, half, compiled, swaps=args.guidance in SWAPPING)

    # Choose labels:
    hierarchy = description.hierarchy
    if args.labels == "balanced":
        labels = balanced_labels(count, hierarchy.num_classes)
    else:
        labels = random_labels(count, hierarchy.num_classes, args.global_seed)

    # Sample the missing images:
    folder = Path(args.sample_dir, args.name or run_name(args, description))
    store = Store(folder, labels, hierarchy.classes, description.image_size, args.format)
    batch_size = 1 if device.type == "cpu" else args.per_proc_batch_size

    def generate(numbers):
        keys = [(args.global_seed, k) for k in numbers]
        fill = batch_size if compiled else 0
        options = dict(sampler=args.sampler, steps=args.num_sampling_steps, autocast=half, fill=fill)
        with explain_full_memory(len(numbers), advise_smaller("--per-proc-batch-size", len(numbers))):
            return autoencoder.decode(sample_keyed(model, labels[numbers], keys, guidance, **options))

    if state.is_main_process and device.type == "cuda":
        print(describe_computation(device, precision, compiled))
    with closing(store):
        agree_on_main(
            state, lambda: store.prepare(collect_settings(args, description, autoencoder, precision, compiled))
        )
        sample_missing(store, generate, args.global_seed, batch_size, rank, world)
        state.wait_for_everyone()
        agree_on_main(state, store.finish)
    if state.is_main_process:
        print(f"{count:,} images in {' and '.join(map(str, store.places()))}")
    keep_process_group()
    state.destroy_process_group()


def main():
    sample(parse_args())


if __name__ == "__main__":
    run_command(main)
