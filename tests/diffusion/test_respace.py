"""Timestep respacing: kept timesteps, alpha_bar, the timesteps that the model receives; invalid arguments."""

import numpy as np
import pytest
import torch
from helpers.noise_models import constant, gaussian

from diffusion import create_diffusion, space_timesteps


@pytest.mark.parametrize(
    "spec, kept",
    [
        ("ddim5", {0, 2, 4, 6, 8}),
        ("4", {0, 3, 6, 9}),
        (4, {0, 3, 6, 9}),
        ("1", {9}),
        ("0,1", {9}),
        ("ddim1", {9}),
        ("10", set(range(10))),
        ("2,3", {0, 4, 5, 7, 9}),
        ([1, 0, 2], {0, 7, 9}),  # sections 0..3, 4..6, 7..9
    ],
)
def test_kept_timesteps(spec, kept):
    assert space_timesteps(10, spec) == kept


@pytest.mark.parametrize("count", [2, 3, 17, 249, 250, 999, 1000])
def test_even_spacing_keeps_both_ends(count):
    kept = sorted(space_timesteps(1000, count))
    assert len(kept) == count and (kept[0], kept[-1]) == (0, 999)
    assert np.ptp(np.diff(kept)) <= 1


def test_a_spaced_process_keeps_alpha_bar_and_passes_original_timesteps_to_the_model():
    full, spaced = create_diffusion(""), create_diffusion("10")
    np.testing.assert_allclose(spaced.alphas_cumprod, full.alphas_cumprod[spaced.timestep_map], rtol=1e-12)
    seen = []

    def model(x, t):
        seen.append(t)
        return constant()(x, t)

    spaced.p_sample_loop(model, (2, 1, 1, 1), device="cpu")
    assert torch.stack(seen).tolist() == [[t, t] for t in reversed(spaced.timestep_map)]
    spaced.training_losses(model, torch.zeros(2, 1, 1, 1), torch.tensor([0, 9]))
    assert seen[-1].tolist() == [0, 999]


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("spec", ["1", "ddim1"])
def test_a_single_step_goes_from_noise_to_the_mean_of_the_data(spec, loop):
    """The exact score of Gaussian data. A step at timestep 0 would return the noise: mean 0, standard deviation 1."""
    torch.manual_seed(0)
    diffusion, model, mean = create_diffusion(spec), gaussian(mean=0.3, deviation=0.5), 0.3
    samples = getattr(diffusion, loop)(model, (16, 4, 8, 8), device="cpu", clip_denoised=False)
    assert abs(samples.mean() - mean) < 0.01 and samples.std() < 0.01


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(timestep_respacing="ddim300"), "no integer stride"),
        (dict(timestep_respacing="ddim"), "expected a count"),
        (dict(timestep_respacing="ddim5,5"), "expected a count"),
        (dict(timestep_respacing="fast"), "expected a count"),
        (dict(timestep_respacing="-5"), "expected a count"),
        (dict(timestep_respacing="1001"), "section of 1000"),
        (dict(timestep_respacing="600,1"), "section of 500"),
        (dict(timestep_respacing="0"), "at least one step"),
        (dict(timestep_respacing=[5, -1]), "counts of 0 or more"),
        (dict(timestep_respacing="", noise_schedule="cosine"), "squaredcos_cap_v2"),
        (dict(timestep_respacing="", diffusion_steps=20), "more than 20"),
        (dict(timestep_respacing="", sigma_small=True), "sigma_small"),
        (dict(timestep_respacing="", rescale_learned_sigmas=True, use_kl=True), "leave it out"),
        (
            dict(timestep_respacing="", rescale_learned_sigmas=True, learn_sigma=False),
            "leave it out",
        ),
    ],
)
def test_invalid_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        create_diffusion(**arguments)
