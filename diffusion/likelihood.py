"""The terms of the variational bound."""

import math

import torch


def mean_flat(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of x (N, ...) over all dimensions but the first, as (N,)."""
    return x.flatten(1).mean(1)


def normal_kl(
    mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """Return KL(N(mean1, variance1) || N(mean2, variance2)) in nats, elementwise; the shapes must broadcast."""
    ratio = log_variance1 - log_variance2
    distance = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (ratio.exp() - ratio - 1.0 + distance)


def decoder_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Return log p(x_0 | x_1) in nats, elementwise: a normal distribution over the bins of 8-bit pixels (DDPM eq. 13).

    x          pixels x_0 in [-1, 1], 2/255 apart; the first and the last bin are unbounded
    mean       mean of the distribution, as x
    log_scale  log of its standard deviation; it must broadcast with x

    Latents are treated as if they were such pixels: DiT was trained with that loss.
    """
    centered, inverse_scale = x - mean, torch.exp(-log_scale)
    upper = _normal_cdf(inverse_scale * (centered + 1 / 255)).masked_fill(x > 0.999, 1.0)
    lower = _normal_cdf(inverse_scale * (centered - 1 / 255)).masked_fill(x < -0.999, 0.0)
    return torch.log((upper - lower).clamp(min=1e-12))


def _normal_cdf(x):
    # the tanh approximation that GELU uses, not erf: DiT was trained with it
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
