"""One training step: what is random in it, its latents, its loss and gradients.

Shapes: B images of the global batch, n of this process, latents (n, C, h, w).
"""

import math
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

NUM_TIMESTEPS = 1000


def draw_step_noise(seed, step, batch, latent_shape, flip, dropout_prob, null_prob, device):
    """All that is random in a step, for the whole global batch: {name: (batch, ...)}, a function of (seed, step) alone.

    So a run that is continued, or one on another number of processes, sees the same numbers. "drop" is the embedder's
    `force_drop_ids`: 1 with probability `dropout_prob`, 2 with `null_prob`, else 0.
    """
    mixed = int(np.random.SeedSequence((seed, step, 1)).generate_state(1)[0])  # 1: not the data's order
    options = dict(generator=torch.Generator(device).manual_seed(mixed), device=device)
    t = torch.randint(0, NUM_TIMESTEPS, (batch,), **options)
    flip = torch.rand(batch, **options) < (0.5 if flip else 0.0)
    u = torch.rand(batch, **options)
    return {
        "t": t,
        "flip": flip,
        "drop": (u < dropout_prob) + 2 * ((u >= dropout_prob) & (u < dropout_prob + null_prob)),
        "posterior": torch.randn(batch, *latent_shape, **options),
        "noise": torch.randn(batch, *latent_shape, **options),
    }


def sample_posterior(x, flip, posterior, autoencoder):
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
    """Add the gradients of a step to the parameters, in `parts` passes -> (4, n): each image's loss, mse, vb and timestep.

    `r`: this process's rows of `drawn`. Gradients are exchanged in the last pass only. A loss that is not finite makes
    all gradients NaN, so that every process sees it after the exchange.
    """
    rows, n = [], len(labels)
    size = -(-n // parts)
    for first in range(0, n, size):
        part = slice(first, first + size)
        with nullcontext() if part.stop >= n else accelerator.no_sync(model):
            with accelerator.autocast():
                terms = diffusion.training_losses(
                    model,
                    latents[part],
                    r["t"][part],
                    {"y": labels[part], "force_drop_ids": r["drop"][part]},
                    r["noise"][part],
                )
            loss = terms["loss"].sum() / n
            accelerator.backward(loss * torch.where(loss.isfinite(), 1.0, math.nan))
        rows.append(torch.stack([terms["loss"], terms["mse"], terms["vb"], r["t"][part].float()]).detach())
    return torch.cat(rows, dim=1)


class GuardedOptimizer:
    """The optimizer's step, which leaves everything as it is where the gradient is not finite.

    The test is made on the device: nothing waits for it. `sticky`: after one such step no other is made either, until
    the run looks at its losses and stops. Under fp16 the gradient scaler has that duty: it skips and halves its scale.
    """

    def __init__(self, accelerator, optimizer, parameters, clip=None, sticky=True):
        self.accelerator, self.optimizer, self.clip, self.sticky = accelerator, optimizer, clip, sticky
        self.parameters = list(parameters)
        self.bad = torch.zeros((), device=accelerator.device)

    def step(self):
        """-> the gradient's norm before clipping, a scalar on the device."""
        self.accelerator.unscale_gradients(self.optimizer)
        grads = [p.grad for p in self.parameters]
        norm = nn.utils.get_total_norm(grads)
        if self.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        if self.accelerator.scaler is None:
            bad = (~norm.isfinite()).float()
            self.bad = torch.maximum(self.bad, bad) if self.sticky else bad
            self.optimizer.optimizer.found_inf = self.bad  # read by fused AdamW, as the gradient scaler sets it
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm
