"""One training step: what is random in it, its latents, its loss and gradients.

Shapes: B images of the global batch, n of this process, latents (n, C, h, w).
"""

import math
from contextlib import nullcontext

import numpy as np
import torch

TIMESTEPS = 1000


def drawn(seed, step, batch, latent_shape, flip, dropout_prob, device):
    """All that is random in a step, for the whole global batch: {name: (batch, ...)}, a function of (seed, step) alone.

    So a run that is continued, or one on another number of processes, sees the same numbers.
    """
    mixed = int(np.random.SeedSequence((seed, step, 1)).generate_state(1)[0])  # 1: not the data's order
    options = dict(generator=torch.Generator(device).manual_seed(mixed), device=device)
    return {
        "t": torch.randint(0, TIMESTEPS, (batch,), **options),
        "flip": torch.rand(batch, **options) < (0.5 if flip else 0.0),
        "drop": torch.rand(batch, **options) < dropout_prob,
        "posterior": torch.randn(batch, *latent_shape, **options),
        "noise": torch.randn(batch, *latent_shape, **options),
    }


def latents_of(x, flip, posterior, autoencoder):
    """Posterior samples (n, C, h, w) of images (n, 3, H, W), or of cached moments of F = 1 or 2 flips (n, F, 2C, h, w)."""
    choose = flip.view(-1, 1, 1, 1)
    if x.ndim == 5:
        mean, std = torch.where(choose, x[:, -1], x[:, 0]).float().chunk(2, dim=1)
    else:
        mean, std = autoencoder.encode_moments(torch.where(choose, x.flip(-1), x))
    return mean + std * posterior


def learning_rate_factor(schedule, step, steps):
    """By which the learning rate is multiplied: 1, or half a cosine from 1 to 0 over the run."""
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * step / steps))


def backward(accelerator, model, diffusion, latents, labels, r, parts=1):
    """Add the gradients of a step to the parameters, in `parts` passes; {"loss", "mse", "vb"}: means over the n images.

    `r`: this process's rows of `drawn`. Gradients are exchanged in the last pass only.
    """
    losses, n = {}, len(labels)
    size = -(-n // parts)
    for first in range(0, n, size):
        rows = slice(first, first + size)
        with nullcontext() if rows.stop >= n else accelerator.no_sync(model):
            with accelerator.autocast():
                terms = diffusion.training_losses(
                    model,
                    latents[rows],
                    r["t"][rows],
                    {"y": labels[rows], "force_drop_ids": r["drop"][rows]},
                    r["noise"][rows],
                )
            means = {name: value.sum() / n for name, value in terms.items()}
            accelerator.backward(means["loss"])
        losses = {name: losses.get(name, 0) + value.detach() for name, value in means.items()}
    return losses
