"""train.py --dry-run: print all settings and what they would train, without training."""

import argparse
import json
import os
from contextlib import nullcontext

import torch
from torch import nn

from autoencoder import PUBLISHED_VAES, SD_SCALE, Autoencoder, load_autoencoder
from checkpoint.loading import build_model
from dataset.images import ImageData
from dataset.latents import LatentData
from finetune import METHODS, ROWS, count_parameters, select, store_frozen
from hierarchy import Hierarchy
from hierarchy.hierarchy import check_counts
from models import DiT
from runtime.device import DTYPES, resolve_precision
from training import memory
from training.average import choose_warmup
from training.batches import StepBatches
from training.extension import extend
from training.setup import describe, load_data

PUBLISHED_SHAPE = dict(  # of the Stable Diffusion autoencoders
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[128, 256, 512, 512],
    layers_per_block=2,
    latent_channels=4,
)


def dry_run(args: argparse.Namespace):
    """Print one JSON object: every setting, and what would be trained.

    With --data-path or --latents the data is listed, and the object says how many images, steps, epochs and bytes there
    would be. Without them nothing is opened, and the hierarchy is --hierarchy or else iNaturalist's. No weights are read.
    """
    if args.data_path or args.latents:
        data, hierarchy = load_data(args)
        autoencoder = shape_autoencoder(args.vae, data)
        if args.latents:
            data.check_settings(autoencoder, args.image_size, args.flip)
        latent_size, channels = autoencoder.latent_size(args.image_size), autoencoder.channels
    else:
        data, hierarchy = None, Hierarchy.load(args.hierarchy or "inat2021", counted=True)
        check_counts(hierarchy, args.num_classes, args.num_super_classes)
        latent_size, channels = latent_shape(args)
    description = describe(args, hierarchy, latent_size, channels)
    if args.extend:
        description, _ = extend(description, args)
    hierarchy = description.hierarchy
    with torch.device("meta"):
        model = build_model(description, args.class_dropout_prob, counts_only=True)
    parameters = select(model, ROWS if description.patch_rows else METHODS[args.method])
    total = sum(p.numel() for p in model.parameters())
    count = count_parameters(parameters, description.patch_rows)
    settings = vars(args) | {
        "embedder": description.embedder,
        "tiers": description.tiers,
        "num_classes": hierarchy.num_classes,
        "num_super_classes": hierarchy.num_super_classes,
        "total_params": total,
        "trainable_params": count,
        "trainable_percent": round(100 * count / total, 4),
    }
    if data:
        settings |= count_steps(args, data)
        settings |= estimate_memory(args, model, parameters, autoencoder.vae)
    print(json.dumps(settings, indent=1))


def latent_shape(args: argparse.Namespace) -> tuple[int, int]:
    """Return side and channels of the latents of --vae, taken for one of Stable Diffusion unless it is "none"."""
    downscale, channels = (1, 3) if args.vae == "none" else (8, 4)
    if args.image_size % downscale:
        raise ValueError(f"--image-size is {args.image_size}, expected a multiple of {downscale}.")
    return args.image_size // downscale, channels


def shape_autoencoder(name: str, data: ImageData | LatentData) -> Autoencoder:
    """Return the autoencoder of --vae; of a published one the shape alone, on the meta device.

    data: latents of a published autoencoder are taken to be those of `name`
    """
    if name not in PUBLISHED_VAES:
        return load_autoencoder(name, "cpu")
    from diffusers import AutoencoderKL  # slow to import

    with torch.device("meta"):
        vae = AutoencoderKL(**PUBLISHED_SHAPE)
    info = data.info if isinstance(data, LatentData) else {}
    return Autoencoder(vae, SD_SCALE, info.get("encoder", "") if info.get("vae") in PUBLISHED_VAES else "unknown")


def count_steps(args: argparse.Namespace, data: ImageData | LatentData) -> dict:
    """Return the numbers of images, steps and epochs of a new run, the warm-up of its EMA, and warnings about the data."""
    batches = StepBatches(len(data), args.global_batch_size, args.global_seed)
    steps = args.max_steps or args.epochs * batches.steps_per_epoch
    return {
        "images": len(data),
        "steps": steps,
        "epochs": round(steps / batches.steps_per_epoch, 2),
        "ema_warmup": choose_warmup(args, steps, None),
        "warnings": data.warnings,
    }


def estimate_memory(
    args: argparse.Namespace, model: DiT, parameters: dict[str, nn.Parameter], vae: nn.Module | None
) -> dict:
    """Return the memory of a process on the GPU found or on one of --gpu-memory, and the images per forward pass.

    model: on the meta device. Converts it and the autoencoder `vae` to the precision of the run.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    precision = planned_precision(args, device)
    half = DTYPES[precision]
    store_frozen(model, half)
    model.train()
    model.grad_checkpointing = args.grad_checkpointing
    autocast = nullcontext if half == torch.float32 else lambda: torch.autocast("cpu", torch.bfloat16)
    activations = memory.activation_bytes_by_depth(model, autocast)
    for p in vae.parameters() if vae else ():
        p.data = p.data.to(half)
    encoding = 0 if args.latents else memory.encoder_bytes(vae, args.image_size)
    forecast = memory.forecast(model, parameters, activations, vae, encoding)

    capacity = memory.requested_bytes(args.gpu_memory) or memory.gpu_bytes(device)
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_batch = -(-args.global_batch_size // world)
    if args.grad_accum > 1:
        images = -(-local_batch // args.grad_accum)
    else:
        images = memory.choose_images(args.micro_batch, local_batch, forecast, capacity, world)
    need = {use: round(size / memory.GIB, 2) for use, size in forecast.need(images).items()}
    return {
        "mixed_precision": precision,
        "micro_batch": images,
        "forward_passes": -(-local_batch // images),
        "memory_gib": need
        | {"total": round(sum(need.values()), 2), "gpu": capacity and round(capacity / memory.GIB, 2)},
        "memory": memory.describe_forecast(forecast, images, capacity, world).removeprefix("memory: "),
    }


def planned_precision(args: argparse.Namespace, device: torch.device) -> str:
    """Return the precision of a run on `device`, or on the GPU that --gpu-memory stands for if there is none here."""
    if device.type == "cpu" and args.gpu_memory:
        return "bf16" if args.mixed_precision == "auto" else args.mixed_precision
    return resolve_precision(args.mixed_precision, device)
