"""Samplers that start from noisy latents of an image (SDEdit)."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffusion import create_diffusion
from sampling.samplers import SAMPLERS, draw_noise, noise_stream, run_sampler, run_solver, steps_to_make


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_variation_makes_the_last_steps_of_the_sampler(sampler):
    """From noisy latents equal to x in the middle of a run; a solver has no earlier predictions then."""
    generator = torch.Generator().manual_seed(0)
    noise, seen = [torch.randn(2, 3, 4, 4, generator=generator) for _ in range(8)], []

    def predict(x, t):
        seen.append((t, x))
        return torch.cat([(x + t * 1e-3).sin(), x.cos()], 1)

    complete = run_sampler(predict, iter(noise).__next__, sampler, 7)
    times, (t, x) = [t for t, _ in seen], seen[3]
    level = create_diffusion("").alphas_cumprod[t].item()
    init = (x - (1 - level) ** 0.5 * noise[0]) / level**0.5
    seen.clear()
    draws = iter([noise[0], *noise[4:]])  # the initial noise, and that of the last steps
    found = run_sampler(predict, draws.__next__, sampler, 7, init=init, strength=4 / 7)
    assert [t for t, _ in seen] == times[3:]
    assert_close(seen[0][1], x, rtol=1e-5, atol=1e-5)
    if sampler in ("ddpm", "ddim"):
        assert_close(found, complete, rtol=1e-4, atol=1e-4)
    else:
        assert found.equal(run_solver(predict, seen[0][1], sampler, np.array(times[3:])))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_0_is_the_image_and_1_is_plain_sampling(sampler):
    init = torch.full((2, 3, 4, 4), 7.0)

    def sample(**options):
        streams = [noise_stream(0, k) for k in range(2)]
        predict = lambda x, t: torch.cat([(x + t * 1e-3).sin(), x.cos()], 1)  # noqa: E731
        return run_sampler(predict, lambda: draw_noise(streams, (3, 4, 4)), sampler, 5, **options)

    assert sample(init=init, strength=1.0).equal(sample())
    assert sample(init=init, strength=0.0).equal(init) and sample(init=init, strength=0.19).equal(init)  # no step
    assert not sample(init=init, strength=0.2).equal(sample(init=init, strength=0.4))


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc"])
def test_a_variation_of_a_single_image_is_that_image(sampler):
    """The exact noise prediction for data of one image c leads to c from any strength."""
    c, levels = torch.linspace(-1, 1, 48).view(1, 3, 4, 4), create_diffusion("").alphas_cumprod
    exact = lambda x, t: (x - float(levels[t]) ** 0.5 * c) / float(1 - levels[t]) ** 0.5  # noqa: E731
    predict = lambda x, t: torch.cat([exact(x, t), x * 0], 1)  # noqa: E731
    for strength in (0.3, 0.7, 1.0):
        stream = [noise_stream(0)]
        found = run_sampler(
            predict, lambda stream=stream: draw_noise(stream, c.shape[1:]), sampler, 10, init=-c, strength=strength
        )
        assert_close(found, c, rtol=0, atol=1e-3)


def test_the_steps_of_a_strength():
    """Of diffusers' img2img pipelines: min(int(steps x strength), steps), without errors of rounding."""
    for steps in (1, 7, 100, 250, 1000):
        for share in range(101):
            assert steps_to_make(steps, share / 100) == steps * share // 100
