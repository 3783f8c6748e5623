"""The parts of a training step: random draws, latents, losses and gradients, update. `train.train_step` calls them.

Shapes: B images of the global batch, n images of this process, latents (n, C, h, w).
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from autoencoder import Autoencoder
from diffusion import GaussianDiffusion, create_diffusion
from runtime.private import skip_update_if
from tiered_embedder import drop_ids

NUM_TIMESTEPS = 1000
DIFFUSION = create_diffusion("")
# How many numbers a GPU draws at once: the threads of 256 blocks of 256. If a GPU cannot run all blocks together, its
# threads draw several numbers each, and the sequence depends on the model of the GPU.
DRAWN_TOGETHER = 2**16


def draw_step_noise(
    seed: int,
    step: int,
    batch: int,
    latent_shape: tuple[int, int, int],
    flip: bool,
    dropout_prob: float,
    null_prob: float,
    device: torch.device | str,
    tiers: int = 1,
) -> dict[str, torch.Tensor]:
    """Draw all that is random in a step, for the B = `batch` images of the global batch.

    The draws depend on (seed, step) alone, and on whether a GPU or a CPU draws. A resumed run, or one on another number of
    processes or another model of GPU (a V100, an A10 or larger), sees the same. `latent_shape` is (C, h, w). Returns a dict of

    t          timesteps in 0..999, int64 (B,)
    flip       mirror the image, bool (B,): with probability 1/2, or never if not `flip`
    drop       how the label is replaced, int64 (B,), see `tiered_embedder.drop_ids`: with `dropout_prob` by its superclass,
               or one of its ancestors in `tiers`, and with `null_prob` by the null row
    posterior  standard normal noise of the autoencoder's posterior, (B, C, h, w)
    noise      standard normal noise of the diffusion, (B, C, h, w)
    """
    mixed = int(np.random.SeedSequence((seed, step, 1)).generate_state(1)[0])  # 1: not the stream of the data order
    options = dict(generator=torch.Generator(device).manual_seed(mixed), device=device)
    together = DRAWN_TOGETHER if torch.device(device).type == "cuda" else math.prod((batch, *latent_shape))
    t = torch.randint(0, NUM_TIMESTEPS, (batch,), **options)
    flip = torch.rand(batch, **options) < (0.5 if flip else 0.0)
    return {
        "t": t,
        "flip": flip,
        "drop": drop_ids(torch.rand(batch, **options), dropout_prob, null_prob, tiers),
        "posterior": draw_normal((batch, *latent_shape), together, **options),
        "noise": draw_normal((batch, *latent_shape), together, **options),
    }


def draw_normal(
    shape: tuple[int, ...], together: int, generator: torch.Generator, device: torch.device | str
) -> torch.Tensor:
    """Draw standard normal noise, float32 of `shape`, `together` numbers at a time."""
    noise = torch.empty(shape, device=device)
    for part in noise.view(-1).split(together):
        part.normal_(generator=generator)
    return noise


def sample_posterior(
    x: torch.Tensor, flip: torch.Tensor, posterior: torch.Tensor, autoencoder: Autoencoder | None
) -> torch.Tensor:
    """Sample latents (n, C, h, w) from the autoencoder's posterior: mean + std * noise.

    x            images (n, 3, H, W) in [-1, 1]; or cached moments (n, F, 2C, h, w), F = 2 with those of the mirrored image
    flip         bool (n,), use the mirrored image
    posterior    standard normal noise (n, C, h, w)
    autoencoder  may be None for cached moments
    """
    choose = flip.view(-1, 1, 1, 1)
    if x.ndim == 5:
        mean, std = torch.where(choose, x[:, -1], x[:, 0]).float().chunk(2, dim=1)
    else:
        mean, std = autoencoder.encode_moments(torch.where(choose, x.flip(-1), x))
    return mean + std * posterior


def learning_rate_factor(schedule: str, step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step: 1 ("constant"), or half a cosine from 1 to 0 over `steps`."""
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))


def forward_backward(
    accelerator: Accelerator,
    model: nn.Module,
    diffusion: GaussianDiffusion,
    latents: Callable[[slice], torch.Tensor],
    labels: torch.Tensor,
    noise: dict[str, torch.Tensor],
    passes: int = 1,
) -> torch.Tensor:
    """Add the gradients of a step to the parameters, and return the terms (4, n): loss, mse, vb, timestep of each image.

    latents  latents (m, C, h, w) of a slice of the images; called once per forward pass, so that the autoencoder never
             encodes more images at once than the network sees
    labels   class labels, int64 (n,)
    noise    the rows of this process from `draw_step_noise`
    passes   number of forward passes; processes exchange gradients in the last one only

    A non-finite loss makes all gradients NaN, so that every process sees it after the exchange.
    """
    terms, n = [], len(labels)
    size = -(-n // passes)  # images per forward pass
    for first in range(0, n, size):
        rows = slice(first, first + size)
        t, drop, x_start = noise["t"][rows], noise["drop"][rows], latents(rows)
        with nullcontext() if rows.stop >= n else accelerator.no_sync(model):
            with accelerator.autocast():
                inputs = {"y": labels[rows], "force_drop_ids": drop}
                losses = diffusion.training_losses(model, x_start, t, inputs, noise["noise"][rows])
            loss = losses["loss"].sum() / n
            accelerator.backward(loss * torch.where(loss.isfinite(), 1.0, math.nan))
        terms.append(torch.stack([losses["loss"], losses["mse"], losses["vb"], t.float()]).detach())
    return torch.cat(terms, dim=1)


class GuardedOptimizer:
    """An optimizer whose step changes nothing if the gradient is non-finite.

    The check is made on the device, without waiting for it. Under fp16 the gradient scaler takes its place: it skips the
    step and halves its scale.

    optimizer   fused AdamW, prepared by accelerate
    parameters  those that the optimizer updates
    clip        largest gradient norm; None for no clipping
    sticky      skip all later steps too, until the run checks its losses and stops
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: AcceleratedOptimizer,
        parameters: Iterable[nn.Parameter],
        clip: float | None = None,
        sticky: bool = True,
    ):
        self.accelerator, self.optimizer, self.clip, self.sticky = accelerator, optimizer, clip, sticky
        self.parameters = list(parameters)
        self.bad = torch.zeros((), device=accelerator.device)  # 1 if the step is to be skipped

    def step(self) -> torch.Tensor:
        """Update the parameters, clear their gradients, and return the gradient norm before clipping, a scalar."""
        self.accelerator.unscale_gradients(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters])
        if self.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        if self.accelerator.scaler is None:
            bad = (~norm.isfinite()).float()
            self.bad = torch.maximum(self.bad, bad) if self.sticky else bad
            skip_update_if(self.optimizer.optimizer, self.bad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm
