"""Sample tens of thousands of images for an evaluation.

    torchrun --nproc_per_node=8 sample_ddp.py --ckpt results/NAME/adapters/0200000.safetensors --num-fid-samples 50000
    python sample_ddp.py --ckpt results/NAME/adapters/0200000.safetensors --num-fid-samples 50000 --format both

Writes `<sample-dir>/<name>/<class>/<number>.png`, or `<sample-dir>/<name>.npz` as ADM's evaluation reads it, or both. After an
interruption the same command, on any number of processes, samples the missing images: there are exactly N in the end.

`--counts` and `--fill-to` choose how many images each class gets, for data sets with few images of some classes; and
`--init-images` varies real images. docs/usefulness.md shows both.

Seed and number alone determine the noise of image k, at every step; with `--counts` and `--fill-to` seed, class and
position in the class do, as in sample.py. On a CPU an image is the same bit for bit for any batch
size and number of processes: the network sees one image at a time and computes in one thread, because the rounding errors
of a matrix product depend on its height and on the threads that share it (1e-6 of an image, measured). To use all cores
of a CPU, start as many processes. On a GPU forward passes are batched, and images change by such rounding errors alone.
"""

import runtime.quick_help  # noqa: F401, I001 - first: --help does not wait for the imports below
import argparse
import hashlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from accelerate import PartialState

from autoencoder import Autoencoder
from checkpoint.description import ModelDescription
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
from sampling.choice import (
    DEFAULT_IMAGES,
    Images,
    check_choice,
    check_processes,
    choose_images,
    nothing_missing,
)
from sampling.load import SWAPPING, build_guidance, load_model
from sampling.options import add_options, advise_smaller, check_options, parse_with_preset
from sampling.samplers import check_finite_images, sample_keyed, to_uint8
from sampling.speed import speed_up
from sampling.store import FORMATS, Store, Writer

EXAMPLES = """
torchrun --nproc_per_node=8 sample_ddp.py --ckpt results/inat/adapters/0200000.safetensors --mixed-precision bf16
python sample_ddp.py --ckpt results/inat/adapters/0200000.safetensors --num-fid-samples 10000 --format both --name inat
"""


# ---- flags ---------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """Parse the command line. Raises ValueError for an unknown or malformed flag."""
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add_options(parser)
    add = parser.add_argument_group("images").add_argument
    add("--num-fid-samples", type=int, help=f"number of images; if not given, {DEFAULT_IMAGES}")
    add(
        "--labels",
        choices=["balanced", "random"],
        default="balanced",
        help="balanced: equally many images of each class, within one; random: uniform draws",
    )
    add("--counts", help="instead: a JSON object or CSV file with the number of images of each class, by name or label")
    add("--fill-to", type=int, metavar="N", help="instead: fill each class of --data-path up to N images")
    add("--data-path", help="folder of images that --fill-to fills; it is only read")
    add("--init-images", metavar="DIR", help="vary the images of this folder, those of a class in turn")
    add("--strength", type=float, help="of the variation: 0 is the image itself, 1 ignores it and is plain sampling")
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
    check_range(args, fill_to=many, strength=(0, 1))
    if args.name and (Path(args.name).name != args.name or args.name == ".."):
        raise ValueError(f"--name is {args.name}, expected the name of a folder: choose its place with --sample-dir.")
    check_choice(args)
    if args.counts is None and args.fill_to is None:
        check_processes(world, args.num_fid_samples or DEFAULT_IMAGES, "--num-fid-samples")


# ---- settings ------------------------------------------------------------------------------------


def collect_settings(
    args: argparse.Namespace,
    images: Images,
    description: ModelDescription,
    autoencoder: Autoencoder,
    precision: str,
    compiled: bool,
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
        "hierarchy": description.hierarchy.keep().digest(),
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
        **{name: getattr(args, name) for name in ("guide", "cfg_scales", "cfg_intervals") if getattr(args, name)},
        **images.settings(args.labels),
        "format": args.format,
    }


def run_name(args: argparse.Namespace, description: ModelDescription) -> str:
    """Return DiT-XL-2-NAME-0200000-size-256-vae-mse-cfg-4.0-steps-250-seed-0, then the settings that are not defaults."""
    path = Path(args.ckpt or "pretrained")
    run = [path.parent.parent.name] if path.parent.name == "adapters" else []
    name = "-".join([description.model.replace("/", "-"), *run, path.stem])
    name += f"-size-{description.image_size}-vae-{Path(description.vae).name}-cfg-{args.cfg_scale}"
    name += f"-steps-{args.num_sampling_steps}-seed-{args.global_seed}"
    extra = [args.guidance] * (args.guidance != "superclass") + [args.sampler] * (args.sampler != "ddpm")
    extra += ["counts"] * bool(args.counts) + [f"fill-{args.fill_to}"] * bool(args.fill_to)
    extra += [f"strength-{args.strength}"] * bool(args.init_images and args.strength < 1)
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
    if device.type == "cpu":
        torch.set_num_threads(1)
    set_tf32(args.tf32)

    # Load model:
    precision = agree(state, resolve_precision, args.mixed_precision, device)
    half = half_dtype(precision)
    model, description, autoencoder = agree_in_turns(state, load_model, args, device, half)
    guidance = agree(state, build_guidance, args, model, description)

    # Choose the images:
    hierarchy = description.hierarchy
    images = agree(state, choose_images, args, hierarchy, world)
    count = len(images.labels)
    if not count:
        return finish(state, nothing_missing(args))
    # as many steps as in batches of 32 in one process, so that a run continues on any number of processes
    compiled = resolve_compile(args.compile, device, args.num_sampling_steps * count // 32)
    speed_up(model, half, compiled, swaps=args.guidance in SWAPPING)

    # Sample the missing images:
    folder = Path(args.sample_dir, args.name or run_name(args, description))
    store = Store(folder, images.labels, hierarchy.classes, description.image_size, args.format, images.file_numbers())
    batch_size = 1 if device.type == "cpu" else args.per_proc_batch_size

    def generate(numbers):
        labels, keys = images.labels[numbers], [images.key(args.global_seed, k) for k in numbers]
        fill = batch_size if compiled else 0
        options = dict(sampler=args.sampler, steps=args.num_sampling_steps, autocast=half, fill=fill)
        with explain_full_memory(len(numbers), advise_smaller("--per-proc-batch-size", len(numbers))):
            options |= images.variation(numbers, description.image_size, autoencoder, device)
            return autoencoder.decode(sample_keyed(model, labels, keys, guidance, **options))

    if state.is_main_process and device.type == "cuda":
        print(describe_computation(device, precision, compiled))
    with closing(store):
        agree_on_main(
            state, lambda: store.prepare(collect_settings(args, images, description, autoencoder, precision, compiled))
        )
        sample_missing(store, generate, args.global_seed, batch_size, rank, world)
        state.wait_for_everyone()
        agree_on_main(state, store.finish)
    finish(state, f"{count:,} images in {' and '.join(map(str, store.places()))}")


def finish(state: PartialState, message: str):
    """Print the last message and leave the processes."""
    if state.is_main_process:
        print(message)
    keep_process_group()
    state.destroy_process_group()


def main():
    sample(parse_args())


if __name__ == "__main__":
    run_command(main)
