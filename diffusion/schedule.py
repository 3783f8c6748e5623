"""Noise schedules: how much noise each timestep adds."""

import numpy as np


def named_betas(schedule: str, num_timesteps: int) -> np.ndarray:
    """Return the noise variances beta_t of a schedule: float64 (num_timesteps,), in (0, 1).

    schedule  "linear" is DDPM's 1e-4..0.02 at 1000 timesteps, rescaled for any other count to keep both ends of alpha_bar
              (arXiv 2006.11239, section 4). "squaredcos_cap_v2" is improved DDPM's cosine schedule, with beta capped at
              0.999 (arXiv 2102.09672, eq. 17)

    Raises ValueError for another schedule, or if a beta would reach 1.
    """
    if schedule == "linear":
        stretch = 1000 / num_timesteps
        betas = np.linspace(stretch * 1e-4, stretch * 0.02, num_timesteps, dtype=np.float64)
    elif schedule == "squaredcos_cap_v2":
        time = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
        alpha_bar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2  # (num_timesteps + 1,), before the first step too
        betas = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    else:
        raise ValueError(f'Found noise schedule "{schedule}", expected "linear" or "squaredcos_cap_v2".')
    if betas.max() >= 1:
        raise ValueError(
            f"Found {num_timesteps} diffusion steps, expected more than 20: with fewer, a beta of the linear schedule "
            "reaches 1."
        )
    return betas
