"""The formulas of the diffusion package: schedules, posterior, bound, training loss, DDIM, against closed forms."""

import math

import numpy as np
import pytest
import torch
from helpers.noise_models import SHAPE, column, constant

from diffusion import create_diffusion
from diffusion.likelihood import decoder_log_likelihood
from diffusion.schedule import named_betas


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- distributions -------------------------------------------------------------------------------


def test_the_cosine_schedule_is_a_squared_cosine():
    betas = named_betas("squaredcos_cap_v2", 1000)
    t = np.array([1, 250, 500, 900])  # alpha_bar after t steps; without the cap it is cos^2
    f = np.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    expected = f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[t - 1], expected, rtol=1e-9)
    assert betas.max() == 0.999


@pytest.mark.parametrize("steps", ["", "10"])
def test_the_posterior_follows_bayes_rule(steps):
    diffusion = create_diffusion(steps)
    t = torch.arange(1, diffusion.num_timesteps)
    x0, xt = torch.randn(2, len(t), 3, 1, 1, dtype=torch.float64)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x0, xt, t)

    beta, before = column(diffusion.betas, t), column(diffusion.alphas_cumprod, t - 1)
    precision = 1 / (1 - before) + (1 - beta) / beta  # of q(x_{t-1} | x_0) and q(x_t | x_{t-1})
    weighted = before.sqrt() * x0 / (1 - before) + (1 - beta).sqrt() * xt / beta
    torch.testing.assert_close(variance, (1 / precision).expand_as(x0), rtol=1e-9, atol=0)
    torch.testing.assert_close(log_variance, variance.log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mean, weighted / precision, rtol=1e-9, atol=1e-9)


def test_a_learned_variance_ranges_from_the_posterior_variance_to_beta():
    diffusion = create_diffusion("")
    t, x = torch.tensor([1, 400, 999]), torch.randn(3, 2, 1, 1, dtype=torch.float64)
    for v, variance in [(-1.0, diffusion.posterior_variance), (1.0, diffusion.betas)]:
        out = diffusion.p_mean_variance(constant(v=v), x, t)
        expected = column(variance, t).expand_as(x)
        torch.testing.assert_close(out["variance"], expected, rtol=1e-9, atol=0)
    middle = diffusion.p_mean_variance(constant(v=0.0), x, t)["variance"]
    geometric = np.sqrt(diffusion.posterior_variance * diffusion.betas)
    torch.testing.assert_close(middle, column(geometric, t).expand_as(x), rtol=1e-9, atol=0)


@pytest.mark.parametrize("small", [True, False])
def test_a_fixed_variance_is_the_posterior_variance_or_beta(small):
    diffusion = create_diffusion("", learn_sigma=False, sigma_small=small)
    t, x = torch.tensor([1, 400, 999]), torch.randn(3, 2, 1, 1, dtype=torch.float64)
    out = diffusion.p_mean_variance(lambda x, t: x, x, t)
    expected = column(diffusion.posterior_variance if small else diffusion.betas, t)
    torch.testing.assert_close(out["variance"], expected.expand_as(x), rtol=1e-9, atol=0)


def test_a_model_may_predict_x0():
    diffusion = create_diffusion("10", predict_xstart=True, learn_sigma=False)
    t, x = torch.tensor([3, 8]), torch.randn(2, 1, 2, 2)
    out = diffusion.p_mean_variance(lambda x, t: torch.full_like(x, 0.25), x, t)
    assert (out["pred_xstart"] == 0.25).all()
    mean, _, _ = diffusion.q_posterior_mean_variance(torch.full_like(x, 0.25), x, t)
    torch.testing.assert_close(out["mean"], mean)


# ---- the training loss ---------------------------------------------------------------------------


def test_the_bound_is_the_kl_divergence_of_two_normals():
    diffusion = create_diffusion("")
    t = torch.tensor([1, 30, 999])
    x0, noise = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    xt = diffusion.q_sample(x0, t, noise)
    mean, variance, _ = diffusion.q_posterior_mean_variance(x0, xt, t)
    out = diffusion.p_mean_variance(constant(), xt, t, clip_denoised=False)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, variance.sqrt()),
        torch.distributions.Normal(out["mean"], out["variance"].sqrt()),
    ).mean((1, 2, 3)) / math.log(2)
    terms = diffusion.training_losses(constant(), x0, t, noise=noise)
    torch.testing.assert_close(terms["vb"], kl, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(terms["mse"], ((noise - 0.1) ** 2).mean((1, 2, 3)))
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])


def test_the_decoders_probabilities_sum_to_1():
    pixels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, scale in [(0.0, 0.3), (0.9, 0.05), (-1.0, 1.0)]:
        log_scale = torch.tensor(math.log(scale), dtype=torch.float64)
        total = decoder_log_likelihood(pixels, torch.tensor(mean), log_scale).exp().sum()
        assert abs(total.item() - 1) < 1e-6


@pytest.mark.parametrize("use_kl", [False, True])
def test_the_bound_trains_the_mean_only_if_it_is_the_loss(use_kl):
    output = torch.randn(2, 4, 2, 2, requires_grad=True)
    diffusion = create_diffusion("", use_kl=use_kl)
    terms = diffusion.training_losses(lambda x, t: output, torch.randn(2, 2, 2, 2), torch.tensor([0, 500]))
    if use_kl:
        torch.testing.assert_close(terms["loss"], terms["vb"] * 1000)
    (gradient,) = torch.autograd.grad(terms["vb"].sum(), output)
    assert gradient.isfinite().all() and (gradient[:, 2:] != 0).any()
    assert (gradient[:, :2] != 0).any() == use_kl


def test_rescaling_weights_only_the_bound():
    x0, noise = torch.randn(2, 2, 2, 2, 2)
    t = torch.tensor([1, 7])
    plain, rescaled = (
        create_diffusion("10", rescale_learned_sigmas=flag).training_losses(constant(), x0, t, noise=noise)
        for flag in (False, True)
    )
    torch.testing.assert_close(rescaled["vb"], plain["vb"] * 10 / 1000)
    torch.testing.assert_close(rescaled["loss"], plain["mse"] + plain["vb"] * 10 / 1000)


def test_with_a_fixed_variance_the_loss_is_the_mean_squared_error():
    x0, noise = torch.randn(2, 2, 2, 2, 2)
    t = torch.tensor([1, 7])
    for predict_xstart, target in [(False, noise), (True, x0)]:
        diffusion = create_diffusion("", learn_sigma=False, predict_xstart=predict_xstart)
        terms = diffusion.training_losses(lambda x, t: x * 0 + 0.3, x0, t, noise=noise)
        assert sorted(terms) == ["loss", "mse"]
        torch.testing.assert_close(terms["loss"], ((target - 0.3) ** 2).mean((1, 2, 3)))


def test_the_loss_never_waits_for_the_device():
    """Meta tensors hold no values: reading one back raises."""
    x0 = torch.zeros(2, 2, 2, 2, device="meta")
    t = torch.zeros(2, dtype=torch.long, device="meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        t[0].item()
    terms = create_diffusion("").training_losses(constant(), x0, t)
    assert {k: tuple(v.shape) for k, v in terms.items()} == dict(mse=(2,), vb=(2,), loss=(2,))


def test_compiled_losses_are_one_graph():
    plain, compiled, graphs = create_diffusion(""), create_diffusion(""), []
    compiled.compile_losses(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for t in ([0, 500], [3, 999]):
        x0, noise, output = (
            torch.randn(2, 2, 4, 4),
            torch.randn(2, 2, 4, 4),
            torch.randn(2, 4, 4, 4, requires_grad=True),
        )
        results = []
        for diffusion in (plain, compiled):
            terms = diffusion.training_losses(lambda x, t: output, x0, torch.tensor(t), noise=noise)  # noqa: B023
            results.append([*terms.values(), *torch.autograd.grad(terms["loss"].sum(), output)])
        assert all(ours.equal(theirs) for ours, theirs in zip(*results, strict=True))
    assert len(graphs) == 1
    torch.compiler.reset()


def test_training_works_after_sampling_in_inference_mode():
    diffusion = create_diffusion("10")
    with torch.inference_mode():
        diffusion.p_sample_loop(constant(), SHAPE, device="cpu")
    scale = torch.ones(1, requires_grad=True)
    terms = diffusion.training_losses(
        lambda x, t: constant()(x, t) * scale, torch.randn(SHAPE), torch.tensor([0, 1, 2, 9])
    )
    terms["loss"].mean().backward()
    assert scale.grad.isfinite().all()


# ---- samplers on data with a known noise prediction ----------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_ddim_keeps_the_marginal_distributions(schedule, eta):
    """DDIM lemma 1: q(x_t | x_0) is N(sqrt(ab) x_0, 1 - ab) for every eta, here at all 250 steps."""
    diffusion = create_diffusion("250", noise_schedule=schedule)
    x0_scale, x_scale, sigma = diffusion._ddim_coefficients(eta)
    ab, before = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    np.testing.assert_allclose(x0_scale + x_scale * np.sqrt(ab), np.sqrt(before), rtol=1e-9)
    np.testing.assert_allclose(x_scale**2 * (1 - ab) + sigma**2, 1 - before, atol=1e-12)
    if eta == 1:  # DDPM's posterior
        np.testing.assert_allclose(x0_scale, diffusion.posterior_mean_coef1, rtol=1e-6)
        np.testing.assert_allclose(x_scale, diffusion.posterior_mean_coef2, rtol=1e-6)
        np.testing.assert_allclose(sigma**2, diffusion.posterior_variance, rtol=1e-6, atol=1e-15)


def oracle(diffusion, x0, s):
    """Return a model that predicts the noise exactly if the data is N(x0, s^2), in float64."""
    alpha_bar = create_diffusion("").alphas_cumprod
    assert diffusion.original_num_steps == len(alpha_bar)

    def model(x, t):
        ab = column(alpha_bar, t)
        return (1 - ab).sqrt() * (x - ab.sqrt() * x0) / (1 - ab + ab * s**2)

    return model


def test_ddim_goes_straight_to_a_single_data_point():
    """With one data point the noise stays the same: x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps."""
    diffusion = create_diffusion("ddim25", learn_sigma=False)
    x0, z = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    last = torch.tensor([diffusion.num_timesteps - 1] * 2)
    ab = column(diffusion.alphas_cumprod, last)
    eps = (z - ab.sqrt() * x0) / (1 - ab).sqrt()
    steps = diffusion.ddim_sample_loop_progressive(oracle(diffusion, x0, 0.0), z.shape, z, clip_denoised=False)
    for out, before in zip(steps, reversed(diffusion.alphas_cumprod_prev), strict=True):
        expected = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
        torch.testing.assert_close(out["sample"], expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(out["pred_xstart"], x0, rtol=0, atol=1e-9)
    assert before == 1.0  # so that the last sample is x_0


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_samples_have_the_mean_and_standard_deviation_of_the_data(loop):
    diffusion = create_diffusion("250", learn_sigma=False, sigma_small=True)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 1, 100, 100, generator=generator, dtype=torch.float64)
    model = oracle(diffusion, 0.5, 0.25)
    samples = getattr(diffusion, loop)(
        model,
        z.shape,
        z,
        clip_denoised=False,
        step_noise=lambda x, i: torch.randn(x.shape, generator=generator, dtype=x.dtype),
    )
    assert abs(samples.mean().item() - 0.5) < 0.01  # standard error 0.0025
    assert abs(samples.std().item() - 0.25) < 0.02  # error of 250 steps; standard error 0.0018
