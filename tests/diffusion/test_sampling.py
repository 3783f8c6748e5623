"""The samplers: precision, random streams, options, invalid calls."""

import pytest
import torch
from helpers.noise_models import SHAPE, constant
from helpers.tiny_models import TinyDiT

from diffusion import SpacedDiffusion, create_diffusion


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- precision -----------------------------------------------------------------------------------


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


def test_half_precision_outputs_are_converted_to_float32():
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
def test_one_int_timestep_equals_a_tensor_of_timesteps(method, learned):
    """A step back takes t as an int, as the samplers pass it, or as a tensor; the model always receives a tensor."""
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


# ---- random streams ------------------------------------------------------------------------------


def test_the_last_step_adds_no_noise():
    diffusion, x = create_diffusion("10"), torch.randn(SHAPE)
    for t in (0, torch.zeros(4, dtype=torch.long)):
        one, other = (diffusion.p_sample(constant(), x, t)["sample"] for _ in range(2))
        assert one.equal(other) and one.isfinite().all()
    one, other = (diffusion.p_sample(constant(), x, 1)["sample"] for _ in range(2))
    assert not one.equal(other)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_every_step_draws_from_the_global_generator(loop):
    """DDIM at eta 0 and the last step draw too, as in the official code: later draws depend on it."""
    torch.manual_seed(3)
    getattr(create_diffusion("10"), loop)(constant(), SHAPE, device="cpu")
    after = torch.randn(5)
    torch.manual_seed(3)
    for _ in range(1 + 10):  # x_T and ten steps
        torch.randn(SHAPE)
    torch.testing.assert_close(after, torch.randn(5), rtol=0, atol=0)


@pytest.mark.parametrize("eta", [None, 0.7])
def test_step_noise_replaces_the_global_generator(eta):
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


def test_an_image_with_its_own_noise_stream_is_the_same_in_every_batch():
    def run(images):
        streams = [torch.Generator().manual_seed(image) for image in images]

        def draw(*_):
            return torch.stack([torch.randn(1, 4, 4, generator=g) for g in streams])

        return create_diffusion("10").p_sample_loop(constant(), (len(images), 1, 4, 4), draw(), step_noise=draw)

    torch.testing.assert_close(run([5, 6, 7])[2:], run([7]))


# ---- options -------------------------------------------------------------------------------------


def test_denoised_fn_comes_before_the_clip():
    t, x = torch.tensor([3, 8]), torch.randn(2, 1, 2, 2)
    for method in ("p_mean_variance", "p_sample", "ddim_sample"):
        out = getattr(create_diffusion("10"), method)(constant(), x, t, denoised_fn=lambda x: torch.full_like(x, 7.0))
        assert (out["pred_xstart"] == 1).all()
        out = getattr(create_diffusion("10"), method)(
            constant(), x, t, False, denoised_fn=lambda x: torch.full_like(x, 7.0)
        )
        assert (out["pred_xstart"] == 7).all()


def test_progress_bar_and_default_device(capsys):
    dit = TinyDiT(input_size=8, num_classes=5)
    labels = dict(y=torch.tensor([0, 3, 5, 5]), cfg_scale=4.0)
    for progress in (False, True):
        samples = create_diffusion("2").p_sample_loop(
            dit.forward_with_cfg, SHAPE, model_kwargs=labels, progress=progress
        )
        assert samples.shape == SHAPE and samples.device == dit.pos_embed.device
        assert ("2/2" in capsys.readouterr().err) == progress


# ---- invalid calls -------------------------------------------------------------------------------


def test_invalid_calls_are_refused():
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
