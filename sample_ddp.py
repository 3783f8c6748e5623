"""Sample tens of thousands of images, to measure a model by.

    torchrun --nproc_per_node=8 sample_ddp.py --ckpt results/NAME/adapters/0200000.safetensors --num-fid-samples 50000
    python sample_ddp.py --ckpt results/NAME/adapters/0200000.safetensors --num-fid-samples 50000 --format both

Writes `<sample-dir>/<name>/<class>/<number>.png`, or the `<sample-dir>/<name>.npz` of ADM's evaluation, or both. The same
command again goes on where a stopped one was, on any number of processes, until there are exactly as many images.

Image k is the same picture whatever the batch and the processes: its noise, at every step, is set by (seed, k) alone.
On a CPU it is the same bit for bit, because the network sees one image at a time and computes in one thread: the sums of
a matrix product depend on its height, and on how many threads share it (1e-6 of an image, measured). On GPUs
forward passes are batched, and pictures are the same but for the order of such sums. To use the cores of a CPU, start
as many processes.
"""

import argparse
import hashlib
import math
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from finetune import store_frozen
from guidance import hash_integer
from hierarchy.layouts import folder_names
from runtime.cli import Parser, check_range, run_command
from runtime.device import DTYPES, PRECISIONS, resolve_precision
from runtime.files import sha256
from runtime.processes import keep_process_group, run_on_main, start_processes
from sampling.load import build_guidance, load_model
from sampling.options import add_options, check_options
from sampling.samplers import check_finite_images, sample_keyed, to_uint8
from sampling.store import FORMATS, Store, Writer

GOLDEN_RATIO = (5**0.5 - 1) / 2


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_options(add)
    add("--num-fid-samples", type=int, default=50_000, help="number of images")
    add(
        "--labels",
        choices=["balanced", "random"],
        default="balanced",
        help="equally many of each class, or uniform draws",
    )
    add("--global-seed", type=int, default=0)
    add("--per-proc-batch-size", type=int, default=32, help="images that a GPU computes together")
    add(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="TF32 matrix products, on GPUs from Ampere on",
    )
    add("--mixed-precision", choices=PRECISIONS, default="no", help="what the network computes in")
    add("--format", choices=FORMATS, default="png")
    add("--sample-dir", default="samples")
    add("--name", help="of the folder in --sample-dir; default: model, checkpoint, size, vae, scale, steps and seed")
    return parser.parse_args()


def check_settings(args):
    check_options(args)
    many = (1, 10**9)
    check_range(args, num_fid_samples=many, per_proc_batch_size=many, global_seed=(0, 2**63 - 1))
    if args.name and (Path(args.name).name != args.name or args.name == ".."):
        raise ValueError(
            f"--name is {args.name}, expected the name of a folder: choose another --sample-dir for its place."
        )


# ---- which pictures -------------------------------------------------------------------------------------------------


def balanced_labels(count, classes):
    """Labels int64 (count,), label of k: k * stride mod classes, with a stride near the golden section of `classes`.

    The stride has no divisor in common with `classes`, so every `classes` images in a row hold each class once: for any
    count the classes differ by one image at most. And any stretch of images is spread evenly over the order of the
    classes, where a superclass is one range or a few: a short run shows each superclass in its share.
    """
    stride = max(1, round(GOLDEN_RATIO * classes))
    while math.gcd(stride, classes) > 1:
        stride += 1
    return np.arange(count) * stride % classes


def random_labels(count, classes, seed):
    """Labels int64 (count,), that of k drawn uniformly by (seed, k)."""
    return np.array([hash_integer(f"label {seed} {k}") % classes for k in range(count)])


def collect_settings(args, description, autoencoder):
    """All that decides the pictures, as JSON."""
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
        "mixed_precision": args.mixed_precision,
        "tf32": args.tf32,
        "compile": args.compile,
        "global_seed": args.global_seed,
        "labels": args.labels,
        "num_fid_samples": args.num_fid_samples,
        "format": args.format,
    }


def run_name(args, description):
    """Such as DiT-XL-2-NAME-0200000-size-256-vae-mse-cfg-4.0-steps-250-seed-0, and what is not the default."""
    path = Path(args.ckpt or "pretrained")
    run = [path.parent.parent.name] if path.parent.name == "adapters" else []
    name = "-".join([description.model.replace("/", "-"), *run, path.stem])
    name += f"-size-{description.image_size}-vae-{Path(description.vae).name}-cfg-{args.cfg_scale}"
    name += f"-steps-{args.num_sampling_steps}-seed-{args.global_seed}"
    extra = [args.guidance] * (args.guidance != "superclass") + [args.sampler] * (args.sampler != "ddpm")
    return "-".join([name, *extra])


# ---- the run --------------------------------------------------------------------------------------------------------


def generate_missing(store, args, generate, batch_size, rank, world):
    """Make those of this process's pictures that are not there; `generate(numbers)`: images (n, 3, H, W) in [-1, 1]."""
    count, missing = len(store.labels), store.missing(rank, world)
    done = len(range(rank, count, world)) - len(missing)
    share = count / (done + len(missing))  # the bar of one process stands for all: they have about equal shares
    bar = tqdm(total=count, initial=round(done * share), unit="image", disable=rank > 0)
    with bar, Writer(store.write) as writer:
        for i in range(0, len(missing), batch_size):
            numbers = missing[i : i + batch_size]
            images = generate(numbers)
            check_finite_images(
                images, [f"Image {k} of seed {args.global_seed} (class {store.labels[k]})" for k in numbers]
            )
            for k, pixels in zip(numbers, to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy()):
                writer.put(k, pixels)
            done += len(numbers)
            bar.update(round(done * share) - bar.n)


def sample(args):
    state = start_processes(timeout=timedelta(days=7))
    device, rank, world = state.device, state.process_index, state.num_processes
    if world > args.num_fid_samples:
        raise ValueError(
            f"{world} processes are more than --num-fid-samples {args.num_fid_samples}: start as many as there are images, or "
            "fewer."
        )
    precision = resolve_precision(args.mixed_precision, device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    with state.local_main_process_first():  # one process a node downloads
        model, description, autoencoder = load_model(args, device)
    half = None if precision == "no" else DTYPES[precision]
    if half:
        store_frozen(model, half)
    if args.compile:
        model.compile_blocks()
    guidance = build_guidance(args, model)

    hierarchy, count = description.hierarchy, args.num_fid_samples
    if args.labels == "balanced":
        labels = balanced_labels(count, hierarchy.num_classes)
    else:
        labels = random_labels(count, hierarchy.num_classes, args.global_seed)
    folder = Path(args.sample_dir, args.name or run_name(args, description))
    store = Store(folder, labels, folder_names(hierarchy.classes), description.image_size, args.format)

    def generate(numbers):
        keys = [(args.global_seed, k) for k in numbers]
        options = dict(sampler=args.sampler, steps=args.num_sampling_steps, autocast=half)
        return autoencoder.decode(sample_keyed(model, labels[numbers], keys, guidance, **options))

    with closing(store):
        run_on_main(state, lambda: store.prepare(collect_settings(args, description, autoencoder)))
        generate_missing(store, args, generate, 1 if device.type == "cpu" else args.per_proc_batch_size, rank, world)
        state.wait_for_everyone()
        run_on_main(state, store.finish)
    if state.is_main_process:
        print(f"{count:,} images in {' and '.join(map(str, store.places()))}")
    keep_process_group()
    state.destroy_process_group()


def main():
    args = parse_args()
    check_settings(args)
    sample(args)


if __name__ == "__main__":
    run_command(main)
