"""Estimate the GPU memory of a training step in advance.

Parameters, gradients, moments and EMA are counted. Activations are measured: small forward passes run, and the tensors
that autograd saves for the backward pass are added up. These are the same on a CPU.
"""

import argparse
import copy
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from autoencoder import Autoencoder
from models import DiT
from runtime.device import explain_full_memory

GIB = 2**30
ENCODER_MAPS = 5.3  # peak of an encoder in full-size feature maps: 0.165 GiB at 256 pixels in float32, on a CPU
RESERVED = 1.10  # what the allocator reserves, over the forecast: 1.04 in float32, up to 1.09 in half precision
CONTEXT, EXCHANGE = 0.6 * GIB, 0.8 * GIB  # bytes of CUDA and its libraries, and of NCCL's buffers


def saved_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """Return the bytes that autograd saves for the backward pass of `forward()`, without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes = {}  # by address: a storage that is saved twice counts once

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would keep alive the node that saves it, if it is that node's output

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # alive until the sum is taken, so that no address is used twice
    del result
    return sum(sizes.values())


def activation_bytes(model: nn.Module, autocast: Callable[[], AbstractContextManager]) -> tuple[int, int]:
    """Return the bytes (per image, per forward pass) that a training step saves for its backward pass.

    With checkpointing these include a block that the backward pass computes again. They follow from forward passes with
    one and with two images. The bytes per pass are autocast's copies of trained weights. No random numbers are drawn, and
    the model is left unchanged.
    """
    device, shape = model.pos_embed.device, (model.in_channels, model.input_size, model.input_size)

    def forward(images):
        x = torch.zeros(images, *shape, device=device)
        zeros = torch.zeros(images, dtype=torch.long, device=device)
        with autocast():
            return model(x, zeros, zeros, force_drop_ids=zeros)

    def block(images):
        x = torch.zeros(images, *model.pos_embed.shape[1:], device=device, requires_grad=True)
        with autocast():
            return model.blocks[0](x, x[:, 0])

    calls = [forward, block] if model.grad_checkpointing else [forward]  # the backward pass computes one block again
    one, two = (sum(saved_bytes(lambda: call(images), model) for call in calls) for images in (1, 2))  # noqa: B023
    return two - one, 2 * one - two


def activation_bytes_by_depth(model: nn.Module, autocast: Callable[[], AbstractContextManager]) -> tuple[int, int]:
    """Return the same for a DiT on the meta device, from models with one or two of its blocks on the CPU.

    Blocks with the same parameters save the same bytes, and those outside of the blocks do not depend on their number.
    """
    kinds = Counter(tuple(block.state_dict()) for block in model.blocks)
    example = {tuple(block.state_dict()): block for block in model.blocks}

    def measure(*blocks):
        small = copy.deepcopy(model)
        small.blocks = nn.ModuleList(copy.deepcopy(block) for block in blocks)
        small.to_empty(device="cpu")
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.data.zero_()
        return torch.tensor(activation_bytes(small, autocast))

    first, *others = kinds
    one, two = measure(example[first]), measure(example[first], example[first])
    outside = 2 * one - two
    total = one + (kinds[first] - 1) * (two - one)
    for kind in others:
        total += kinds[kind] * (measure(example[kind]) - outside)
    return tuple(total.tolist())


def encoder_bytes(vae: nn.Module | None, image_size: int) -> int:
    """Return the bytes that an `AutoencoderKL` takes to encode an image, without its weights; 0 without one."""
    if vae is None:
        return 0
    return int(ENCODER_MAPS * vae.config.block_out_channels[0] * image_size**2 * vae.dtype.itemsize)


@dataclass(frozen=True)
class Forecast:
    """The GPU memory of a training step in one process, in bytes.

    weights     of the model and the autoencoder
    training    gradients, moments and EMA
    per_image   activations of an image, see `activation_bytes`
    per_pass    activations of a forward pass besides those of its images
    encoding    to encode an image, see `encoder_bytes`; free again before the forward pass
    """

    weights: int
    training: int
    per_image: int
    per_pass: int
    encoding: int = 0

    def need(self, images: int) -> dict[str, int]:
        """Return the bytes by use, for `images` images per forward pass."""
        activations = max(self.per_image * images + self.per_pass, self.encoding * images)
        return {"weights": self.weights, "gradients, moments and EMA": self.training, "activations": activations}

    def largest(self, room: float) -> int:
        """Return the largest number of images per forward pass that `room` bytes hold; 0 if not even one fits."""
        room -= self.weights + self.training
        fits = (room - self.per_pass) // self.per_image
        if self.encoding:
            fits = min(fits, room // self.encoding)
        return max(0, int(fits))


def forecast(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    activations: tuple[int, int],
    vae: nn.Module | None = None,
    encoding: int = 0,
) -> Forecast:
    """Return the forecast of a training step.

    parameters   the trained parameters
    activations  see `activation_bytes`
    vae          the autoencoder, if there is one on the GPU
    encoding     bytes to encode an image, see `encoder_bytes`
    """
    trained = sum(p.numel() for p in parameters.values())
    everything = [*model.parameters(), *model.buffers(), *(vae.parameters() if vae else ())]
    weights = sum(t.numel() * t.element_size() for t in everything)
    return Forecast(weights, 4 * (1 + 2 + 1) * trained, *activations, encoding)  # float32


# ---- the GPU -------------------------------------------------------------------------------------


def gpu_bytes(device: torch.device) -> int | None:
    """Return the bytes of a GPU that this process can use, as far as other programs leave them; None on a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return torch.mps.recommended_max_memory() if device.type == "mps" else None


def requested_bytes(gigabytes: float | None) -> int | None:
    """Return the bytes of --gpu-memory, which counts 2^30 bytes as vendors of GPUs do; None if it is not given."""
    return None if gigabytes is None else round(gigabytes * GIB)


def room_bytes(capacity: int, processes: int = 1) -> float:
    """Return the bytes that a forecast may have if the GPU's `capacity` holds context, exchange and fragmentation too."""
    return (capacity - CONTEXT - (EXCHANGE if processes > 1 else 0)) / RESERVED


def choose_images(
    wanted: int | str | None, local_batch: int, forecast: Forecast, capacity: int | None, processes: int = 1
) -> int:
    """Return the number of images per forward pass, 1 to `local_batch`.

    wanted     --micro-batch: a number, "auto", or None for auto on a GPU
    capacity   bytes of the GPU; None on a CPU, where all images are in one pass unless `wanted` is a number
    processes  number of processes

    The passes of a step are made about equally large.
    """
    images = local_batch if wanted in (None, "auto") else min(wanted, local_batch)
    if wanted in (None, "auto") and capacity is not None:
        images = min(local_batch, max(1, forecast.largest(room_bytes(capacity, processes))))
    passes = -(-local_batch // images)
    return -(-local_batch // passes)


def describe_forecast(forecast: Forecast, images: int, capacity: int | None = None, processes: int = 1) -> str:
    """Return a sentence about the forecast, with advice if it exceeds the GPU's `capacity` in bytes."""
    need = forecast.need(images)
    total = sum(need.values())
    parts = ", ".join(f"{use} {size / GIB:.2f}" for use, size in need.items())
    per_image = max(forecast.per_image, forecast.encoding)
    details = f"{parts}; {per_image / 2**20:.0f} MiB per image, {images} per forward pass"
    text = f"memory: about {total / GIB:.1f} GiB per process ({details})"
    if capacity is None:
        return text
    text += f" of {capacity / GIB:.1f} GiB"
    room = room_bytes(capacity, processes)
    if total <= room:
        return text
    return f"{text}: too much, {advice(min(forecast.largest(room), images - 1))}"


def advice(micro_batch: int) -> str:
    """Return advice for when memory is insufficient. micro_batch: the largest that may fit; below 1, none does."""
    first = f"pass --micro-batch {micro_batch} (the same losses in more passes), " if micro_batch > 0 else "pass "
    return f"{first}--mixed-precision bf16 or fp16, or --grad-checkpointing"


# ---- a run ---------------------------------------------------------------------------------------


def split_batch(
    args: argparse.Namespace,
    accelerator: Accelerator,
    local_batch: int,
    model: DiT,
    parameters: dict[str, nn.Parameter],
    autoencoder: Autoencoder,
) -> tuple[int, str]:
    """Return the number of forward passes of a step and a sentence about memory; the processes agree on the number."""
    encoding = 0 if args.latents else encoder_bytes(autoencoder.vae, args.image_size)
    with explain_full_memory(2, advice(0)):
        activations = activation_bytes(model, accelerator.autocast)
    expected = forecast(model, parameters, activations, autoencoder.vae, encoding)
    own = requested_bytes(args.gpu_memory) or gpu_bytes(accelerator.device)
    capacity = min(gather_object([own])) if own else None
    processes = accelerator.num_processes
    if args.grad_accum > 1:
        images = -(-local_batch // args.grad_accum)
    else:
        images = choose_images(args.micro_batch, local_batch, expected, capacity, processes)
    return -(-local_batch // images), describe_forecast(expected, images, capacity, processes)
