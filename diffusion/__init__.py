"""Gaussian diffusion with learned variances, over all timesteps (training) or over a subset of them (sampling)."""

from collections.abc import Sequence

from .gaussian_diffusion import GaussianDiffusion
from .respace import SpacedDiffusion, space_timesteps
from .schedule import named_betas

__all__ = ["GaussianDiffusion", "SpacedDiffusion", "create_diffusion", "space_timesteps"]


def create_diffusion(
    timestep_respacing: str | int | Sequence[int] | None,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
) -> SpacedDiffusion:
    """Create the diffusion process that `train.py` and the sampling commands use.

    timestep_respacing      timesteps to keep, see `space_timesteps`; None or "" keeps all of them, as training does
    noise_schedule          "linear" (DDPM) or "squaredcos_cap_v2" (improved DDPM, eq. 17)
    use_kl                  train on the variational bound alone, instead of the mean squared error
    sigma_small             fixed variance beta~_t instead of beta_t; only without `learn_sigma`
    predict_xstart          the model's first C channels are x_0, not the noise
    learn_sigma             the model's last C channels choose the variance (improved DDPM, eq. 15)
    rescale_learned_sigmas  weight the bound by num_timesteps / 1000, not by 1; only for the loss that has both terms
    diffusion_steps         timesteps of the complete process, 1000 as in DDPM

    Raises ValueError for an unknown schedule, an impossible respacing, or a flag that another flag makes meaningless.
    """
    if sigma_small and learn_sigma:
        raise ValueError(
            "Found sigma_small=True with learn_sigma=True, but sigma_small selects a fixed variance: pass "
            "learn_sigma=False, or leave sigma_small out."
        )
    if rescale_learned_sigmas and (use_kl or not learn_sigma):
        raise ValueError(
            "rescale_learned_sigmas=True weights the bound in the hybrid loss, which does not exist with "
            f"learn_sigma={learn_sigma} and use_kl={use_kl}: leave it out."
        )
    if timestep_respacing is None or timestep_respacing == "":
        timestep_respacing = [diffusion_steps]
    return SpacedDiffusion(
        use_timesteps=space_timesteps(diffusion_steps, timestep_respacing),
        betas=named_betas(noise_schedule, diffusion_steps),
        predict_xstart=predict_xstart,
        variance="learned" if learn_sigma else "fixed_small" if sigma_small else "fixed_large",
        loss="kl" if use_kl else "rescaled_hybrid" if rescale_learned_sigmas else "hybrid",
    )
