"""Gaussian diffusion with learned variances, on all timesteps (training) or on a few (sampling)."""

from .gaussian_diffusion import GaussianDiffusion
from .respace import SpacedDiffusion, space_timesteps
from .schedule import named_betas

__all__ = ["GaussianDiffusion", "SpacedDiffusion", "create_diffusion", "space_timesteps"]


def create_diffusion(
    timestep_respacing,
    noise_schedule="linear",
    use_kl=False,
    sigma_small=False,
    predict_xstart=False,
    learn_sigma=True,
    rescale_learned_sigmas=False,
    diffusion_steps=1000,
):
    """The diffusion process that the model of `train.py` and `sample.py` belongs to.

    timestep_respacing: which of the `diffusion_steps` timesteps to walk, see `space_timesteps`;
        None or "" walks all of them, as training does.
    noise_schedule: "linear" (DDPM) or "squaredcos_cap_v2" (improved DDPM, eq. 17).
    use_kl: train on the variational bound alone, in place of the mean squared error.
    sigma_small: fixed variance beta~_t in place of beta_t; only without `learn_sigma`.
    predict_xstart: the model's first C channels are x_0, not the noise.
    learn_sigma: the model's last C channels choose the variance (improved DDPM, eq. 15).
    rescale_learned_sigmas: weigh the variance's loss by num_timesteps / 1000, not by 1.

    Raises ValueError for an unknown schedule, an impossible respacing, or two flags of which one
    would be without effect.
    """
    if sigma_small and learn_sigma:
        raise ValueError(
            "Found sigma_small=True with learn_sigma=True, but sigma_small names a fixed variance: "
            "pass learn_sigma=False, or leave sigma_small out."
        )
    if rescale_learned_sigmas and (use_kl or not learn_sigma):
        raise ValueError(
            "rescale_learned_sigmas=True weighs the variance's share of the hybrid loss, which "
            f"learn_sigma={learn_sigma}, use_kl={use_kl} does not have: leave it out."
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
