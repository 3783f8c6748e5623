"""The coefficients of the formulas at a timestep, looked up in tables of all timesteps."""

from typing import NamedTuple

import numpy as np
import torch

Value = torch.Tensor | np.ndarray


class Coefficients(NamedTuple):
    """Coefficients of the forward process, the posterior and the model's variance, named as in DiT's code."""

    sqrt_alphas_cumprod: Value
    sqrt_one_minus_alphas_cumprod: Value
    sqrt_recip_alphas_cumprod: Value
    sqrt_recipm1_alphas_cumprod: Value
    posterior_mean_coef1: Value
    posterior_mean_coef2: Value
    posterior_variance: Value
    posterior_log_variance_clipped: Value
    middle_log_variance: Value  # log variance = middle + v * reach with v in [-1, 1] (improved DDPM eq. 15),
    reach_log_variance: Value  # from log beta~_t to log beta_t; the reach is 0 if the variance is fixed
    middle_log_sigma: Value  # the same for the standard deviation of a step's noise; -infinity at t = 0
    reach_log_sigma: Value


class DDIMCoefficients(NamedTuple):
    """A step of DDIM: x_{t-1} = x0_scale x_0 + x_scale x_t + sigma noise."""

    x0_scale: Value
    x_scale: Value
    sigma: Value


class Tables:
    """Named tables (rows, num_timesteps) in float64, with copies for each device and dtype that looks them up."""

    def __init__(self):
        self._tables = {}  # name -> float64 array
        self._copies = {}  # (name, device, dtype) -> tensor, (name, "number", dtype) -> a list of scalars per timestep

    def __contains__(self, name: object) -> bool:
        return name in self._tables

    def add(self, name: object, rows: tuple[np.ndarray, ...]) -> None:
        """Add a table made of rows (num_timesteps,)."""
        self._tables[name] = np.stack(rows)

    def at(self, name: object, t: torch.Tensor | int, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the table's rows at timestep t, to multiply x (N, C, ...) with.

        For t (N,) each is (N, 1, ...) on the device of t. For one int it is a scalar on the CPU, which a GPU takes as an
        argument instead of looking it up. Both are float32, or float64 if x is.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        if isinstance(t, int):
            key = name, "number", dtype
            if key not in self._copies:
                self._copies[key] = [row.unbind() for row in torch.tensor(self._tables[name].T, dtype=dtype)]
            return self._copies[key][t]
        key = name, t.device, dtype
        if key not in self._copies:
            self._copies[key] = torch.tensor(self._tables[name], dtype=dtype, device=t.device)
        rows = self._copies[key][:, t]  # (rows, N)
        return rows.reshape(*rows.shape, *[1] * (x.ndim - 1)).unbind()
