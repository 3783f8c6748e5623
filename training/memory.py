"""Estimate the GPU memory of a training step in advance.

Parameters, gradients, moments and EMA are counted. Activations are measured: small forward passes run, and the tensors
that autograd saves for the backward pass are added up. These are the same on a CPU.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

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

    They follow from forward passes with one and with two images. The bytes per pass are autocast's copies of trained
    weights. No random numbers are drawn, and the model is left unchanged.
    """
    device, shape = model.pos_embed.device, (model.in_channels, model.input_size, model.input_size)

    def forward(images):
        x = torch.zeros(images, *shape, device=device)
        zeros = torch.zeros(images, dtype=torch.long, device=device)
        with autocast():
            return model(x, zeros, zeros, force_drop_ids=zeros)

    one, two = (saved_bytes(lambda: forward(images), model) for images in (1, 2))  # noqa: B023
    return two - one, 2 * one - two


def encoder_bytes(vae: nn.Module | None, image_size: int) -> int:
    """Return the bytes that an `AutoencoderKL` takes to encode an image, without its weights; 0 without one."""
    if vae is None:
        return 0
    return int(ENCODER_MAPS * vae.config.block_out_channels[0] * image_size**2 * vae.dtype.itemsize)


def forecast_bytes(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    per_image: int,
    per_pass: int,
    images: int,
    vae: nn.Module | None = None,
    encoding: int = 0,
) -> dict[str, int]:
    """Return the bytes that a training step will need, by use.

    parameters           the trained parameters
    per_image, per_pass  see `activation_bytes`
    images               number of images per forward pass
    vae                  the autoencoder, if there is one on the GPU
    encoding             bytes to encode an image, see `encoder_bytes`; free again before the forward pass
    """
    trained = sum(p.numel() for p in parameters.values())
    everything = [*model.parameters(), *model.buffers(), *(vae.parameters() if vae else ())]
    return {
        "weights": sum(t.numel() * t.element_size() for t in everything),
        "gradients, moments and EMA": 4 * (1 + 2 + 1) * trained,  # float32
        "activations": max(per_image * images + per_pass, encoding * images),
    }


def describe_forecast(
    need: dict[str, int], per_image: int, images: int, capacity: int | None = None, processes: int = 1
) -> str:
    """Return a sentence about the forecast, with advice if it exceeds the GPU's `capacity` in bytes."""
    total = sum(need.values())
    parts = ", ".join(f"{use} {size / GIB:.2f}" for use, size in need.items())
    details = f"{parts}; {per_image / 2**20:.0f} MiB per image, {images} per forward pass"
    text = f"memory: about {total / GIB:.1f} GiB per process ({details})"
    if capacity is None:
        return text
    room = (capacity - CONTEXT - EXCHANGE * (processes > 1)) / RESERVED
    text += f" of {capacity / GIB:.1f} GiB"
    if total <= room:
        return text
    fits = int((room - total) // per_image) + images
    return f"{text}: too much, {advice(min(fits, images - 1))}"


def advice(micro_batch: int) -> str:
    """Return advice for when memory is insufficient. micro_batch: the largest that may fit; below 1, none does."""
    first = f"pass --micro-batch {micro_batch} (the same losses in more passes), " if micro_batch > 0 else "pass "
    return f"{first}--mixed-precision bf16 or fp16, or --grad-checkpointing"
