"""How much noise each timestep adds."""

import numpy as np


def named_betas(schedule, num_timesteps):
    """Noise variances beta_t: (num_timesteps,) float64, in (0, 1).

    "linear" is DDPM's 1e-4..0.02 at 1000 steps, stretched to keep alpha_bar's ends at any other
    number; "squaredcos_cap_v2" is improved DDPM, eq. 17, with beta capped at 0.999.
    Raises ValueError for another name, or where the schedule leaves (0, 1).
    """
    if schedule == "linear":
        stretch = 1000 / num_timesteps
        betas = np.linspace(stretch * 1e-4, stretch * 0.02, num_timesteps, dtype=np.float64)
    elif schedule == "squaredcos_cap_v2":
        time = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
        alpha_bar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    else:
        raise ValueError(f'Found noise schedule "{schedule}", expected "linear" or "squaredcos_cap_v2".')
    if betas.max() >= 1:
        raise ValueError(
            f"Found {num_timesteps} diffusion steps, expected more than 20: with fewer, a beta of "
            "the linear schedule reaches 1."
        )
    return betas
