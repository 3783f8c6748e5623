"""The pieces of the variational bound."""

import math

import torch


def mean_flat(x):
    """(N, ...) -> (N,): the mean over everything but the batch."""
    return x.flatten(1).mean(1)


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N(mean1, variance1) || N(mean2, variance2)) in nats, elementwise."""
    ratio = log_variance1 - log_variance2
    distance = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (ratio.exp() - ratio - 1.0 + distance)


def decoder_log_likelihood(x, mean, log_scale):
    """log p(x_0 | x_1) in nats, elementwise, DDPM eq. 13: a normal over bins of 8-bit pixels.

    Pixels are in [-1, 1], 2/255 apart, and the end bins are open. Latents are taken for such
    pixels; their share in the loss is what DiT was trained with.
    """
    centered, inverse_scale = x - mean, torch.exp(-log_scale)
    upper = _normal_cdf(inverse_scale * (centered + 1 / 255)).masked_fill(x > 0.999, 1.0)
    lower = _normal_cdf(inverse_scale * (centered - 1 / 255)).masked_fill(x < -0.999, 0.0)
    return torch.log((upper - lower).clamp(min=1e-12))


def _normal_cdf(x):
    # The tanh approximation (that of GELU), not erf: DiT's loss is made with it.
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
