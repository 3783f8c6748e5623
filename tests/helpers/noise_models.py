"""Simple noise predictors, for the tests of the diffusion package."""

import torch

from diffusion import create_diffusion

SHAPE = (4, 4, 8, 8)


def constant(epsilon=0.1, v=0.2):
    """Return a model that predicts the noise `epsilon` and the variance channels `v` everywhere."""

    def model(x, t):
        return torch.cat([torch.full_like(x, epsilon), torch.full_like(x, v)], 1)

    return model


def gaussian(mean, deviation):
    """Return the exact noise predictor for independent Gaussian data, with variance channels of 0.

    E[noise | x_t] = sqrt(1 - alpha_bar) (x_t - sqrt(alpha_bar) mean) / (alpha_bar deviation^2 + 1 - alpha_bar)
    """
    alphas_cumprod = create_diffusion("").alphas_cumprod

    def model(x, t):
        a = column(alphas_cumprod, t)
        noise = (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * deviation**2 + 1 - a)
        return torch.cat([noise.to(x.dtype), torch.zeros_like(x)], 1)

    return model


def column(a, t):
    """Return the values of a float64 schedule at t (N,), as (N, 1, 1, 1)."""
    return torch.from_numpy(a)[t].reshape(-1, 1, 1, 1)
