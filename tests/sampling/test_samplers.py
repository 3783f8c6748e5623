"""Sampling: a noise stream for each image, the official stream, the samplers, and pixels."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from helpers.tiny_models import PARENTS, awake, refusal, tiny_dit
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import solvers
from diffusion import create_diffusion
from guidance import ALL_TIMESTEPS, Guidance
from sampling import samplers
from sampling.samplers import (
    SAMPLERS,
    draw_noise,
    noise_stream,
    run_sampler,
    sample_keyed,
    sample_latents,
    sample_latents_official,
    solver_timesteps,
    to_uint8,
    unipc_steps,
)
from tiered_embedder import TieredEmbedder

LABELS, POSITIONS = [0, 1, 2, 3, 4, 2, 1], [0, 0, 1, 0, 2, 3, 1]
OPTIONS = dict(seed=1, cfg_scale=4.0, steps=6)


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    return awake(tiny_dit(), std=0.05).eval()


class Rowwise:
    """An elementwise model: only the sampling could mix images."""

    in_channels, input_size, pos_embed = 4, 8, torch.zeros(1)
    y_embedder = TieredEmbedder(5, 2, 8, parents=PARENTS)

    def __call__(self, x, t, y):
        shift = (y * 0.1 + t * 1e-3).view(-1, 1, 1, 1)
        return torch.cat([(x + shift).sin(), x.cos()], dim=1)


def streams():
    return [noise_stream(OPTIONS["seed"], label, position) for label, position in zip(LABELS, POSITIONS)]


def in_batches(model, size, **options):
    parts = [slice(i, i + size) for i in range(0, len(LABELS), size)]
    return torch.cat([sample_latents(model, LABELS[p], POSITIONS[p], **OPTIONS | options) for p in parts])


# ---- a stream for each image ---------------------------------------------------------------------


def test_a_stream_depends_on_its_key_alone():
    keys = [(seed, k) for seed in (0, 1, 12) for k in range(40)] + [(1, 2, 0), (12, 0, 0), (0, 1, 2, 3)]
    first = {key: draw_noise([noise_stream(*key)], (3,)) for key in keys}
    assert len({tuple(numbers.flatten().tolist()) for numbers in first.values()}) == len(keys)
    for key, numbers in first.items():
        assert draw_noise([noise_stream(5), noise_stream(*key)], (3,))[1:].equal(numbers)


def test_a_stream_is_the_same_on_every_machine():
    """The first numbers of two streams must not change, or old runs could not be resumed."""
    numbers = draw_noise([noise_stream(0, 0), noise_stream(0, 1)], (3,))
    expected = [[-0.6100490093, 0.5933892131, -0.8884311318], [0.4542818666, -0.4073708653, 0.7411154509]]
    assert_close(numbers, torch.tensor(expected), rtol=0, atol=1e-6)


def test_streams_have_different_keys(monkeypatch):
    """With 32 bits, about 29 pairs of 500,000 keys would collide; here all 128 bits reach the generator."""
    seen = []
    monkeypatch.setattr(np.random, "Philox", lambda key: seen.append(key) or np.random.PCG64(0))
    for k in range(2000):
        noise_stream(0, k)
    assert len(set(seen)) == 2000
    for bits in range(0, 128, 8):  # every byte of the key varies
        assert len({key >> bits & 255 for key in seen}) > 200


def test_the_draws_are_standard_normal_and_differ():
    fifty = [noise_stream(0, k) for k in range(50)]
    first, second = draw_noise(fifty, (4, 8, 8)), draw_noise(fifty, (4, 8, 8))
    assert first.shape == (50, 4, 8, 8) and first.dtype == torch.float32 and not first.equal(second)
    for numbers in (first, second, first * second):  # if independent, the product has standard deviation 1 too
        assert abs(numbers.mean()) < 0.03 and abs(numbers.std() - 1) < 0.03  # standard error of the mean 0.009
    neighbours = (first[:-1] * first[1:]).mean()  # of neighbouring keys
    assert abs(neighbours) < 0.03


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("size", [1, 3])
def test_sampling_does_not_mix_images(size, sampler):
    assert in_batches(Rowwise(), size, sampler=sampler).equal(in_batches(Rowwise(), 7, sampler=sampler))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("size", [1, 3])
def test_an_image_does_not_depend_on_its_batch(dit, size, sampler):
    """Except for rounding errors of matrix products, which depend on the number of rows: 3e-7 of the largest value."""
    together = in_batches(dit, 7, sampler=sampler)
    assert_close(in_batches(dit, size, sampler=sampler), together, rtol=0, atol=1e-6 * together.abs().max().item())


def test_an_image_depends_on_seed_class_and_position(dit):
    def one(label=0, position=0, **options):
        return sample_latents(dit, [label], [position], **OPTIONS | options)

    images = [one(), one(label=2), one(position=1), one(seed=2)]  # classes 0 and 2 have the same superclass
    for i, image in enumerate(images):
        assert image.shape == (1, 4, 8, 8) and image.isfinite().all()
        assert all((image - other).abs().max() > 0.1 for other in images[:i])
    assert one().equal(images[0])


def test_the_global_random_state_is_neither_read_nor_changed(dit):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = in_batches(dit, 7)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(6)
    assert in_batches(dit, 7).equal(first)


@pytest.mark.parametrize("form", [tuple, np.array, torch.tensor])
def test_labels_of_any_type(form):
    expected = in_batches(Rowwise(), 7)
    assert sample_latents(Rowwise(), form(LABELS), form(POSITIONS), **OPTIONS).equal(expected)


# ---- samplers ------------------------------------------------------------------------------------


def ancestral(model, x, y, noises, **options):
    """Compute DDPM step by step: x <- mean + sigma z, without noise in the last step."""
    diffusion = create_diffusion(str(OPTIONS["steps"]))
    for i in reversed(range(OPTIONS["steps"])):
        t, noise = torch.full((len(x),), i), next(noises)
        out = diffusion.p_mean_variance(model, x, t, clip_denoised=False, model_kwargs=dict(y=y, **options))
        x = out["mean"] + (0.5 * out["log_variance"]).exp() * noise if i else out["mean"]
    return x


@torch.no_grad()
def test_the_official_stream_covers_both_halves(dit):
    labels = torch.tensor([3, 0, 0])
    torch.manual_seed(11)
    z = torch.randn(3, 4, 8, 8)
    noises = iter(lambda: torch.randn(6, 4, 8, 8), None)
    rows = torch.tensor([3, 0, 0, 6, 5, 5])
    expected = ancestral(dit.forward_with_cfg, torch.cat([z, z]), rows, noises, cfg_scale=2.0, cfg_channels=3)
    ours = sample_latents_official(dit, labels, seed=11, cfg_scale=2.0, steps=OPTIONS["steps"])
    assert_close(ours, expected[:3], rtol=0, atol=1e-5 * expected.abs().max().item())
    assert not ours.equal(sample_latents_official(dit, labels, seed=12, cfg_scale=2.0, steps=OPTIONS["steps"]))


@torch.no_grad()
def test_ddpm_draws_initial_noise_and_that_of_every_step_but_the_last(dit):
    ours = streams()
    noises = [draw_noise(ours, (4, 8, 8)) for _ in range(OPTIONS["steps"])]  # initial noise, and 5 steps
    steps = iter([*noises[1:], None])
    expected = ancestral(lambda x, t, y: dit(x, t, y), noises[0], torch.tensor(LABELS), steps)
    ours = in_batches(dit, 7, cfg_scale=1)
    assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("sampler, draws", [("ddpm", OPTIONS["steps"]), ("ddim", 1), ("dpm++", 1), ("unipc", 1)])
def test_all_but_ddpm_draw_initial_noise_alone(sampler, draws, monkeypatch):
    calls = []
    monkeypatch.setattr(samplers, "draw_noise", lambda *arguments: calls.append(1) or draw_noise(*arguments))
    in_batches(Rowwise(), 7, sampler=sampler)
    assert len(calls) == draws


def test_ddim_is_that_of_the_diffusion_package(dit):
    z = draw_noise(streams(), (4, 8, 8))
    loop = create_diffusion(str(OPTIONS["steps"])).ddim_sample_loop
    expected = loop(dit, z.shape, z, clip_denoised=False, model_kwargs=dict(y=torch.tensor(LABELS)), eta=0.0)
    assert in_batches(dit, 7, sampler="ddim", cfg_scale=1).equal(expected)
    assert not in_batches(dit, 7, sampler="ddpm", cfg_scale=1).equal(expected)


# ---- solvers, on a Gaussian with known prediction and solution -----------------------------------

SPREAD = torch.tensor([0.3, 1.0, 2.0]).view(1, 3, 1, 1)  # variances of the three channels of x_0
ALPHA_BARS = torch.from_numpy(create_diffusion("").alphas_cumprod)


def variance(alpha_bar):
    """Return the variance of x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise."""
    return alpha_bar * SPREAD + 1 - alpha_bar


def exact(x, t):
    """Return E[noise | x_t], and a NaN variance that no solver may read."""
    alpha_bar = ALPHA_BARS[t].view(-1, 1, 1, 1)
    return torch.cat([x * (1 - alpha_bar).sqrt() / variance(alpha_bar), torch.full_like(x, torch.nan)], 1).float()


def error(sampler, steps):
    """Return the relative error of x_0; the probability flow (arXiv 2011.13456, eq. 13) scales each channel."""
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    solution = z * (SPREAD / variance(ALPHA_BARS[999])).sqrt()
    found = run_sampler(exact, lambda: z, sampler, steps)
    return ((found - solution).norm() / solution.norm()).item()


@pytest.mark.parametrize("sampler", ["dpm++", "unipc"])
def test_solvers_converge_in_the_second_order(sampler):
    errors = {steps: error(sampler, steps) for steps in (5, 10, 20, 40)}
    assert errors[40] < 2e-3 and errors[5] < 0.2
    assert errors[20] < errors[10] / 3 and errors[40] < errors[20] / 3
    assert errors[20] < error("ddim", 20) / 4


def test_ddim_converges_in_the_first_order():
    assert 1.5 < error("ddim", 100) / error("ddim", 200) < 2.5


def test_the_table_of_errors(command, adapter, monkeypatch):
    for name, value in (("STEPS", (2, 4)), ("SPACED_STEPS", (3,)), ("ALL", 12)):
        monkeypatch.setattr(solvers, name, value)
    result = command(solvers.main, "--ckpt", adapter, "--images", 1)
    assert result.code == 0, result.err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.out.split("\n") if line.startswith("|")]
    errors = {tuple(row[:1]): [float(error) for error in row[1:]] for row in rows if row[0] in ("2", "4")}
    assert all(0 < b < a < 3 for a, b in zip(errors[("2",)], errors[("4",)]))
    assert [row[0] for row in rows].count("root of t") == 2 and "## w = 2" in result.out
    with refusal("--images is 0"), monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["solvers.py", "--images", "0"])
        solvers.main()


@pytest.mark.parametrize("steps", range(1, 40, 6))
def test_spacings_of_the_table_are_timesteps(steps):
    for spacing in solvers.SPACINGS.values():
        times = spacing(steps)
        assert times.shape == (steps,) and times.max() <= 999 and times.min() >= 0 and (np.diff(times) < 0).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_each_step_is_one_call_and_timesteps_decrease(sampler, steps):
    times = []

    def predict(x, t):
        assert isinstance(t, int)
        times.append(t)
        return torch.zeros(2, 6, 4, 4)

    out = run_sampler(predict, lambda: torch.ones(2, 3, 4, 4), sampler, steps)
    assert out.shape == (2, 3, 4, 4) and out.isfinite().all()
    assert len(times) == steps and times == sorted(set(times), reverse=True) and set(times) <= set(range(1000))


@pytest.mark.parametrize("steps", [1, 2, 3, 25, 1000])
def test_unipc_is_that_of_diffusers(steps):
    """Bit for bit on a CPU; on a GPU diffusers' scheduler waits six times a step."""
    ours, levels = unipc_steps(torch.linspace(5, 0, steps + 1)), torch.linspace(5, 0, steps + 1)
    theirs = UniPCMultistepScheduler(solver_order=2)
    theirs.set_timesteps(steps)
    theirs.sigmas, theirs.timesteps = levels, torch.arange(steps)
    theirs.set_begin_index(0)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(min(steps, 30)):
        noise = (3 * x).sin()
        x, expected = ours(noise, x), theirs.step(noise, 0, x, return_dict=False)[0]
        assert x.equal(expected)


class NoReads(TorchDispatchMode):
    """Fail if a number is read from a tensor, for which a GPU would be waited for; int32 is the status of linalg.solve."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default or args[0].dtype == torch.int32
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("interval", [ALL_TIMESTEPS, (200, 700)])
def test_no_step_reads_numbers_from_tensors(sampler, interval, dit):
    labels, keys = torch.tensor(LABELS), [(1, k) for k in range(7)]
    guidance = Guidance(scale=2.0, interval=interval)
    with NoReads():
        sample_keyed(dit, labels, keys, guidance, sampler=sampler, steps=4)


def test_solver_timesteps():
    for steps in range(1, 1001):
        times = solver_timesteps(steps)
        assert times.shape == (steps,) and times[0] == 999 and (np.diff(times) < 0).all()
        assert times[-1] == 0 or steps == 1
        if steps > 1:
            evenly = np.linspace(999**0.5, 0, steps) ** 2
            wanted = np.where(evenly < np.arange(steps)[::-1], np.arange(steps)[::-1], evenly)
            assert abs(times - wanted).max() <= 0.5  # evenly spaced in the root, if there are enough timesteps
    assert solver_timesteps(1000).tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_the_network_computes_in_half_precision(dit, sampler):
    labels, keys = torch.tensor(LABELS), [(1, k) for k in range(7)]
    sample = partial(sample_keyed, dit, labels, keys, Guidance(scale=2.0), sampler=sampler, steps=4)
    seen = []
    hook = dit.blocks[0].mlp.fc1.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    half = sample(autocast=torch.bfloat16)
    hook.remove()
    assert set(seen) == {torch.bfloat16} and half.dtype == torch.float32
    full = sample()
    assert 0 < (half - full).abs().max() < 0.1 * full.abs().max()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_of_any_key_and_guidance(dit, sampler):
    """`sample_keyed` takes keys of any length and any guidance; `sample_latents` is a case of it."""
    labels = torch.tensor(LABELS)
    sample = partial(sample_keyed, dit, labels, sampler=sampler, steps=4)
    keys = [(1, label, position) for label, position in zip(LABELS, POSITIONS)]
    same = sample_latents(dit, LABELS, POSITIONS, seed=1, cfg_scale=2.0, sampler=sampler, steps=4)
    assert sample(keys, Guidance("superclass", 2.0)).equal(same)
    assert sample(keys, Guidance("random-class", 1.0)).equal(sample(keys, Guidance("none")))
    others = [
        sample([(2, k) for k in range(7)], Guidance("superclass", 2.0)),
        sample(keys, Guidance("random-class", 2.0)),
    ]
    assert all((other - same).abs().max() > 1e-2 for other in others)


@pytest.mark.parametrize("official", [False, True])
def test_guidance_reaches_the_sampler(dit, official):
    def sample(**options):
        options = OPTIONS | options
        return sample_latents_official(dit, LABELS, **options) if official else in_batches(dit, 7, **options)

    images = [sample(), sample(cfg_scale=1.5), sample(cfg_channels="all"), sample(steps=7)]
    for i, image in enumerate(images):
        assert all((image - other).abs().max() > 1e-2 for other in images[:i])


@pytest.mark.parametrize("official", [False, True])
def test_sampling_leaves_the_model_as_it_was(dit, official):
    out = sample_latents_official(dit, LABELS, **OPTIONS) if official else in_batches(dit, 7)
    assert not out.requires_grad and not dit.training
    assert all(p.requires_grad and p.grad is None for name, p in dit.named_parameters() if name != "pos_embed")


# ---- pixels --------------------------------------------------------------------------------------


def test_pixels_are_rounded_and_clamped():
    every = torch.arange(256).view(1, 1, 16, 16)
    assert to_uint8(every / 127.5 - 1).equal(every.to(torch.uint8))
    nearly = every / 127.5 - 1 + torch.tensor([-0.49, 0.49]).view(2, 1, 1, 1) / 127.5
    assert to_uint8(nearly).equal(every.to(torch.uint8).expand(2, 1, 16, 16))
    assert to_uint8(torch.tensor([-9.0, -1.001, 1.001, 9.0])).tolist() == [0, 0, 255, 255]
