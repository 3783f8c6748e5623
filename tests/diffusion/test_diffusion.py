"""The diffusion package against the official code's numbers, closed forms and its own promises."""

import math

import numpy as np
import pytest
import torch
from helpers.tiny_models import TinyDiT, golden

from diffusion import SpacedDiffusion, create_diffusion, space_timesteps
from diffusion.likelihood import decoder_log_likelihood
from diffusion.schedule import named_betas

SHAPE = (4, 4, 8, 8)


GOLDEN, META = golden("diffusion")
PLAIN, _ = golden("plain_dit")
TRAIN = {key.removeprefix("train/"): GOLDEN[key] for key in GOLDEN if key.startswith("train/")}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def dit():
    """The golden plain DiT; its LayerNorms have no affine, ours stay at weight 1 and bias 0."""
    model = TinyDiT(input_size=8, num_classes=5).eval()
    state = {k.removeprefix("state/"): v for k, v in PLAIN.items() if k.startswith("state/")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing and all("norm" in key for key in missing)
    return model


def constant(epsilon=0.1, v=0.2):
    """A model that gives `epsilon` and `v` everywhere."""

    def model(x, t):
        return torch.cat([torch.full_like(x, epsilon), torch.full_like(x, v)], 1)

    return model


def column(a, t):
    """Row t of a float64 schedule as (N, 1, 1, 1)."""
    return torch.from_numpy(a)[t].reshape(-1, 1, 1, 1)


# ---- the official code's numbers ------------------------------------------------------------


@pytest.mark.parametrize("name", ["250", "10", "ddim25", "full"])
def test_schedules_are_the_official_ones(name):
    diffusion = create_diffusion("" if name == "full" else name)
    assert diffusion.timestep_map == META[f"{name}/timestep_map"]
    assert diffusion.num_timesteps == META[f"{name}/num"]
    assert diffusion.original_num_steps == 1000
    for ours, theirs in {
        "betas": "betas",
        "alphas_cumprod": "acp",
        "posterior_variance": "pv",
        "posterior_log_variance_clipped": "plv",
    }.items():
        values = getattr(diffusion, ours)
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, GOLDEN[f"{name}/{theirs}"].numpy(), rtol=1e-12)


def test_q_sample_is_the_official_one():
    noised = create_diffusion("").q_sample(TRAIN["x0"], TRAIN["t"], TRAIN["noise"])
    torch.testing.assert_close(noised, GOLDEN["q_sample"], atol=1e-5, rtol=0)


def test_training_terms_are_the_official_ones(dit):
    terms = create_diffusion("").training_losses(dit, TRAIN["x0"], TRAIN["t"], dict(y=TRAIN["y"]), TRAIN["noise"])
    assert sorted(terms) == ["loss", "mse", "vb"]
    assert 0 in TRAIN["t"]  # the decoder's term is among them
    for key, value in terms.items():
        torch.testing.assert_close(value, TRAIN[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name, steps, seed, guided, eta, tolerance",
    [
        ("p10", "10", 5, False, None, 1e-5),
        ("p10_cfg", "10", 6, True, None, 1e-5),
        ("ddim25_eta0", "ddim25", 7, False, 0.0, 1e-5),
        ("ddim25_eta1", "ddim25", 8, False, 1.0, 1e-5),
        ("p250_cfg", "250", 9, True, None, 1e-4),
    ],
)
def test_samples_are_the_official_ones(dit, name, steps, seed, guided, eta, tolerance):
    """Within `tolerance` of the samples' largest value, not absolutely.

    The random model drives the samples to several hundred, where neighbouring float32 numbers are
    6e-5 apart; the official code itself, run on another machine, is 1e-4 to 8e-4 away.
    """
    diffusion = create_diffusion(steps)
    loop, options = diffusion.p_sample_loop, {}
    if eta is not None:
        loop, options = diffusion.ddim_sample_loop, {"eta": eta}
    if guided:
        model, labels = dit.forward_with_cfg, dict(y=PLAIN["yy"], cfg_scale=4.0)
    else:
        model, labels = dit, dict(y=torch.arange(4))
    torch.manual_seed(seed)
    samples = loop(model, SHAPE, GOLDEN["z"], clip_denoised=False, model_kwargs=labels, **options)
    assert not samples.requires_grad
    atol = tolerance * GOLDEN[name].abs().max().item()
    torch.testing.assert_close(samples, GOLDEN[name], atol=atol, rtol=0)


# ---- timesteps ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, kept",
    [
        ("ddim5", {0, 2, 4, 6, 8}),
        ("4", {0, 3, 6, 9}),
        (4, {0, 3, 6, 9}),
        ("1", {0}),
        ("10", set(range(10))),
        ("2,3", {0, 4, 5, 7, 9}),
        ([1, 0, 2], {0, 7, 9}),  # sections 0..3, 4..6, 7..9
    ],
)
def test_space_timesteps(spec, kept):
    assert space_timesteps(10, spec) == kept


@pytest.mark.parametrize("count", [2, 3, 17, 249, 250, 999, 1000])
def test_even_spacing_keeps_both_ends(count):
    kept = sorted(space_timesteps(1000, count))
    assert len(kept) == count and (kept[0], kept[-1]) == (0, 999)
    assert np.ptp(np.diff(kept)) <= 1


def test_a_spaced_process_keeps_alpha_bar_and_shows_the_model_its_own_timesteps():
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


def test_a_single_step_is_finite():
    samples = create_diffusion("1").p_sample_loop(constant(), SHAPE, device="cpu")
    assert samples.isfinite().all()


def test_cosine_schedule():
    betas = named_betas("squaredcos_cap_v2", 1000)
    t = np.array([1, 250, 500, 900])  # alpha_bar after t steps; before the cap it is cos^2 itself
    f = np.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    expected = f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[t - 1], expected, rtol=1e-9)
    assert betas.max() == 0.999


# ---- closed forms ---------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ["", "10"])
def test_posterior_is_bayes_rule(steps):
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


def test_learned_variance_runs_from_posterior_to_beta():
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
def test_fixed_variances(small):
    diffusion = create_diffusion("", learn_sigma=False, sigma_small=small)
    t, x = torch.tensor([1, 400, 999]), torch.randn(3, 2, 1, 1, dtype=torch.float64)
    out = diffusion.p_mean_variance(lambda x, t: x, x, t)
    expected = column(diffusion.posterior_variance if small else diffusion.betas, t)
    torch.testing.assert_close(out["variance"], expected.expand_as(x), rtol=1e-9, atol=0)


def test_bound_is_the_kl_of_two_normals():
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


def test_decoder_is_a_distribution_over_pixels():
    pixels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, scale in [(0.0, 0.3), (0.9, 0.05), (-1.0, 1.0)]:
        log_scale = torch.tensor(math.log(scale), dtype=torch.float64)
        total = decoder_log_likelihood(pixels, torch.tensor(mean), log_scale).exp().sum()
        assert abs(total.item() - 1) < 1e-6


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_ddim_keeps_the_marginals(schedule, eta):
    """DDIM lemma 1: q(x_t | x_0) stays N(sqrt(ab) x_0, 1 - ab) whatever eta is; all 250 steps."""
    diffusion = create_diffusion("250", noise_schedule=schedule)
    x0_scale, x_scale, sigma = diffusion._ddim_table(eta)
    ab, before = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev
    np.testing.assert_allclose(x0_scale + x_scale * np.sqrt(ab), np.sqrt(before), rtol=1e-9)
    np.testing.assert_allclose(x_scale**2 * (1 - ab) + sigma**2, 1 - before, atol=1e-12)
    if eta == 1:  # DDPM's posterior
        np.testing.assert_allclose(x0_scale, diffusion.posterior_mean_coef1, rtol=1e-6)
        np.testing.assert_allclose(x_scale, diffusion.posterior_mean_coef2, rtol=1e-6)
        np.testing.assert_allclose(sigma**2, diffusion.posterior_variance, rtol=1e-6, atol=1e-15)


def oracle(diffusion, x0, s):
    """The exact noise prediction for data N(x0, s^2), float64."""
    alpha_bar = create_diffusion("").alphas_cumprod
    assert diffusion.original_num_steps == len(alpha_bar)

    def model(x, t):
        ab = column(alpha_bar, t)
        return (1 - ab).sqrt() * (x - ab.sqrt() * x0) / (1 - ab + ab * s**2)

    return model


def test_ddim_walks_straight_to_a_point_mass():
    """With one data point the noise never changes: x_t = sqrt(ab) x_0 + sqrt(1 - ab) eps."""
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
    assert before == 1.0  # so the last sample was x_0 itself


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_samples_have_the_datas_mean_and_spread(loop):
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
    assert abs(samples.std().item() - 0.25) < 0.02  # 250 steps discretize; standard error 0.0018


# ---- the training loss ----------------------------------------------------------------------


@pytest.mark.parametrize("use_kl", [False, True])
def test_bound_trains_the_mean_only_when_it_is_the_loss(use_kl):
    output = torch.randn(2, 4, 2, 2, requires_grad=True)
    diffusion = create_diffusion("", use_kl=use_kl)
    terms = diffusion.training_losses(lambda x, t: output, torch.randn(2, 2, 2, 2), torch.tensor([0, 500]))
    if use_kl:
        torch.testing.assert_close(terms["loss"], terms["vb"] * 1000)
    (gradient,) = torch.autograd.grad(terms["vb"].sum(), output)
    assert gradient.isfinite().all() and (gradient[:, 2:] != 0).any()
    assert (gradient[:, :2] != 0).any() == use_kl


def test_rescaling_weighs_the_bound_alone():
    x0, noise = torch.randn(2, 2, 2, 2, 2)
    t = torch.tensor([1, 7])
    plain, rescaled = (
        create_diffusion("10", rescale_learned_sigmas=flag).training_losses(constant(), x0, t, noise=noise)
        for flag in (False, True)
    )
    torch.testing.assert_close(rescaled["vb"], plain["vb"] * 10 / 1000)
    torch.testing.assert_close(rescaled["loss"], plain["mse"] + plain["vb"] * 10 / 1000)


def test_without_learned_sigma_the_loss_is_mse_alone():
    x0, noise = torch.randn(2, 2, 2, 2, 2)
    t = torch.tensor([1, 7])
    for predict_xstart, target in [(False, noise), (True, x0)]:
        diffusion = create_diffusion("", learn_sigma=False, predict_xstart=predict_xstart)
        terms = diffusion.training_losses(lambda x, t: x * 0 + 0.3, x0, t, noise=noise)
        assert sorted(terms) == ["loss", "mse"]
        torch.testing.assert_close(terms["loss"], ((target - 0.3) ** 2).mean((1, 2, 3)))


def test_training_never_waits_for_the_device():
    """On meta tensors, which hold no numbers, anything that reads one back raises."""
    x0 = torch.zeros(2, 2, 2, 2, device="meta")
    t = torch.zeros(2, dtype=torch.long, device="meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        t[0].item()
    terms = create_diffusion("").training_losses(constant(), x0, t)
    assert {k: tuple(v.shape) for k, v in terms.items()} == dict(mse=(2,), vb=(2,), loss=(2,))


def test_training_goes_on_after_sampling_in_inference_mode():
    diffusion = create_diffusion("10")
    with torch.inference_mode():
        diffusion.p_sample_loop(constant(), SHAPE, device="cpu")
    scale = torch.ones(1, requires_grad=True)
    terms = diffusion.training_losses(
        lambda x, t: constant()(x, t) * scale, torch.randn(SHAPE), torch.tensor([0, 1, 2, 9])
    )
    terms["loss"].mean().backward()
    assert scale.grad.isfinite().all()


# ---- precision, random streams, options -----------------------------------------------------


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_float32_agrees_with_float64(loop):
    def run(dtype):
        generator = torch.Generator().manual_seed(0)
        z, *noises = torch.randn(26, *SHAPE, generator=generator).to(dtype)
        samples = getattr(create_diffusion("25"), loop)(
            lambda x, t: torch.cat([x.tanh(), x.sin()], 1),
            SHAPE,
            z,
            step_noise=lambda x, i: noises[i],
        )
        assert samples.dtype == dtype
        return samples

    torch.testing.assert_close(run(torch.float32).double(), run(torch.float64), rtol=0, atol=1e-5)


def test_half_precision_outputs_are_computed_in_float32():
    diffusion, x0, t = create_diffusion("10"), torch.randn(SHAPE), torch.tensor([0, 1, 5, 9])

    def half(x, t):
        return torch.cat([x, x.sin()], 1).bfloat16()

    for method in (diffusion.training_losses, diffusion.p_mean_variance):
        torch.manual_seed(0)
        got = method(half, x0, t)
        torch.manual_seed(0)
        expected = method(lambda x, t: half(x, t).float(), x0, t)
        for key in expected:
            assert got[key].dtype == torch.float32
            torch.testing.assert_close(got[key], expected[key], rtol=0, atol=0)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("method", ["p_mean_variance", "p_sample", "ddim_sample"])
def test_one_timestep_for_all(method, learned):
    """A step back with t as a plain number, as the samplers take it, is that with a tensor; the model sees a tensor."""
    diffusion, x, seen = create_diffusion("10", learn_sigma=learned), torch.randn(SHAPE), []

    def model(x, t):
        seen.append(t)
        return torch.cat([x.sin(), x.tanh()], 1)[:, : 8 if learned else 4]

    for t in (0, 4, 9):
        results = []
        for given in (t, torch.full((4,), t)):
            torch.manual_seed(0)
            results.append(getattr(diffusion, method)(model, x, given))
        for key, value in results[0].items():
            torch.testing.assert_close(value, results[1][key], rtol=1e-6, atol=1e-6)
    assert all(one.equal(several) for one, several in zip(seen[::2], seen[1::2]))


def test_the_last_step_adds_no_noise():
    diffusion, x = create_diffusion("10"), torch.randn(SHAPE)
    for t in (0, torch.zeros(4, dtype=torch.long)):
        one, other = (diffusion.p_sample(constant(), x, t)["sample"] for _ in range(2))
        assert one.equal(other) and one.isfinite().all()
    one, other = (diffusion.p_sample(constant(), x, 1)["sample"] for _ in range(2))
    assert not one.equal(other)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_every_step_draws_from_the_global_stream(loop):
    """Also DDIM without noise and the last step, as the official code: later draws depend on it."""
    torch.manual_seed(3)
    getattr(create_diffusion("10"), loop)(constant(), SHAPE, device="cpu")
    after = torch.randn(5)
    torch.manual_seed(3)
    for _ in range(1 + 10):  # x_T and ten steps
        torch.randn(SHAPE)
    torch.testing.assert_close(after, torch.randn(5), rtol=0, atol=0)


@pytest.mark.parametrize("eta", [None, 0.7])
def test_step_noise_replaces_the_global_stream(eta):
    diffusion, z, steps = create_diffusion("10"), torch.randn(SHAPE), []

    def run(**options):
        torch.manual_seed(4)
        if eta is None:
            return diffusion.p_sample_loop(constant(), SHAPE, z, **options)
        return diffusion.ddim_sample_loop(constant(), SHAPE, z, eta=eta, **options)

    def replay(x, i):
        steps.append(i)
        return torch.randn_like(x)

    default = run()
    torch.testing.assert_close(run(step_noise=replay), default, rtol=0, atol=0)
    assert steps == list(range(9, -1, -1))
    silent = run(step_noise=lambda x, i: torch.zeros_like(x))
    assert (silent - default).abs().max() > 1e-2
    last_only = run(step_noise=lambda x, i: torch.full_like(x, 1e3 if i == 0 else 0.0))
    torch.testing.assert_close(last_only, silent, rtol=0, atol=0)


def test_an_image_with_its_own_noise_stream_is_the_same_in_any_batch():
    def run(images):
        streams = [torch.Generator().manual_seed(image) for image in images]

        def draw(*_):
            return torch.stack([torch.randn(1, 4, 4, generator=g) for g in streams])

        return create_diffusion("10").p_sample_loop(constant(), (len(images), 1, 4, 4), draw(), step_noise=draw)

    torch.testing.assert_close(run([5, 6, 7])[2:], run([7]))


def test_a_model_of_x0_is_taken_at_its_word():
    diffusion = create_diffusion("10", predict_xstart=True, learn_sigma=False)
    t, x = torch.tensor([3, 8]), torch.randn(2, 1, 2, 2)
    out = diffusion.p_mean_variance(lambda x, t: torch.full_like(x, 0.25), x, t)
    assert (out["pred_xstart"] == 0.25).all()
    mean, _, _ = diffusion.q_posterior_mean_variance(torch.full_like(x, 0.25), x, t)
    torch.testing.assert_close(out["mean"], mean)


def test_denoised_fn_comes_before_the_clip():
    t, x = torch.tensor([3, 8]), torch.randn(2, 1, 2, 2)
    for method in ("p_mean_variance", "p_sample", "ddim_sample"):
        out = getattr(create_diffusion("10"), method)(constant(), x, t, denoised_fn=lambda x: torch.full_like(x, 7.0))
        assert (out["pred_xstart"] == 1).all()
        out = getattr(create_diffusion("10"), method)(
            constant(), x, t, False, denoised_fn=lambda x: torch.full_like(x, 7.0)
        )
        assert (out["pred_xstart"] == 7).all()


def test_progress_and_the_models_device(dit, capsys):
    labels = dict(y=PLAIN["yy"], cfg_scale=4.0)
    for progress in (False, True):
        samples = create_diffusion("2").p_sample_loop(
            dit.forward_with_cfg, SHAPE, model_kwargs=labels, progress=progress
        )
        assert samples.shape == SHAPE and samples.device == dit.pos_embed.device
        assert ("2/2" in capsys.readouterr().err) == progress


# ---- the user's mistakes --------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(timestep_respacing="ddim300"), "no whole stride"),
        (dict(timestep_respacing="ddim"), "expected a count"),
        (dict(timestep_respacing="ddim5,5"), "expected a count"),
        (dict(timestep_respacing="fast"), "expected a count"),
        (dict(timestep_respacing="-5"), "expected a count"),
        (dict(timestep_respacing="1001"), "section of 1000"),
        (dict(timestep_respacing="600,1"), "section of 500"),
        (dict(timestep_respacing="0"), "one step or more"),
        (dict(timestep_respacing=[5, -1]), "none below 0"),
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
def test_impossible_settings_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        create_diffusion(**arguments)


def test_impossible_calls_are_refused():
    diffusion = create_diffusion("2")
    with pytest.raises(ValueError, match="learn_sigma"):
        diffusion.training_losses(lambda x, t: x, torch.zeros(SHAPE), torch.zeros(4).long())
    with pytest.raises(ValueError, match="learn_sigma"):
        create_diffusion("2", learn_sigma=False).p_sample_loop(constant(), SHAPE, device="cpu")
    with pytest.raises(ValueError, match="pass device"):
        diffusion.p_sample_loop(constant(), SHAPE)
    with pytest.raises(ValueError, match="expected \\(4, 4, 8, 8\\)"):
        diffusion.p_sample_loop(constant(), SHAPE, torch.zeros(3, 4, 8, 8))
    with pytest.raises(ValueError, match="one noise for each sample"):
        diffusion.p_sample_loop(constant(), SHAPE, torch.zeros(SHAPE), step_noise=lambda x, i: x[:1])
    with pytest.raises(ValueError, match="eta=1.5"):
        diffusion.ddim_sample_loop(constant(), SHAPE, device="cpu", eta=1.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        SpacedDiffusion({0, 1}, betas=[0.1, 1.0])
