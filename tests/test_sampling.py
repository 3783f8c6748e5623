"""From labels to latents: a noise stream for each image, the official stream, the samplers, and pixels."""

import numpy as np
import pytest
import torch
from tiny import PARENTS, awake, tiny_dit
from torch.testing import assert_close

import sampling
from diffusion import create_diffusion
from sampling import draw, noise_streams, sample_latents, sample_latents_official, to_uint8
from tiered_embedder import TieredEmbedder

LABELS, POSITIONS = [0, 1, 2, 3, 4, 2, 1], [0, 0, 1, 0, 2, 3, 1]
OPTIONS = dict(seed=1, cfg_scale=4.0, steps=6)


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    return awake(tiny_dit(), std=0.05).eval()


class Rowwise:
    """A model that treats every number by itself, so that nothing but the sampling could mix images."""

    in_channels, input_size, pos_embed = 4, 8, torch.zeros(1)
    y_embedder = TieredEmbedder(5, 2, 8, parents=PARENTS)

    def __call__(self, x, t, y):
        shift = (y * 0.1 + t * 1e-3).view(-1, 1, 1, 1)
        return torch.cat([(x + shift).sin(), x.cos()], dim=1)

    def forward_with_cfg(self, x, t, y, scale, channels):
        with_class, without = self(x, t, y).chunk(2)
        return (without + scale * (with_class - without)).repeat(2, 1, 1, 1)


def in_batches(model, size, **options):
    parts = [slice(i, i + size) for i in range(0, len(LABELS), size)]
    return torch.cat([sample_latents(model, LABELS[p], POSITIONS[p], **OPTIONS | options) for p in parts])


# ---- a stream for each image ------------------------------------------------------------------------------------------


def test_streams_are_keyed_by_seed_class_and_position():
    keys = [(seed, label, position) for seed in (0, 1, 12) for label in (0, 1, 2, 12) for position in (0, 1, 2, 20)]
    first = {key: draw(noise_streams(key[0], [key[1]], [key[2]]), (3,), "cpu") for key in keys}
    assert len({tuple(numbers.flatten().tolist()) for numbers in first.values()}) == len(keys)
    for (seed, label, position), numbers in first.items():
        together = draw(noise_streams(seed, [7, label], [3, position]), (3,), "cpu")
        assert together[1:].equal(numbers)


def test_the_draws_are_standard_normal_and_go_on():
    streams = noise_streams(0, range(50), [0] * 50)
    first, second = draw(streams, (4, 8, 8), "cpu"), draw(streams, (4, 8, 8), "cpu")
    assert first.shape == (50, 4, 8, 8) and not first.equal(second)
    for numbers in (first, second, first * second):  # independent: the product has spread 1 too
        assert abs(numbers.mean()) < 0.03 and abs(numbers.std() - 1) < 0.03  # standard error of the mean 0.009


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_sampling_mixes_no_images(size, sampler):
    assert in_batches(Rowwise(), size, sampler=sampler).equal(in_batches(Rowwise(), 7, sampler=sampler))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("size", [1, 3])
def test_an_image_does_not_depend_on_its_batch(dit, size, sampler):
    """But for the order in which a matrix product sums, which the number of rows decides: 3e-7 of the largest number."""
    whole = in_batches(dit, 7, sampler=sampler)
    assert_close(in_batches(dit, size, sampler=sampler), whole, rtol=0, atol=1e-6 * whole.abs().max().item())


def test_an_image_depends_on_seed_class_and_position(dit):
    def one(label=0, position=0, **options):
        return sample_latents(dit, [label], [position], **OPTIONS | options)

    images = [one(), one(label=2), one(position=1), one(seed=2)]  # classes 0 and 2 have the same superclass
    for i, image in enumerate(images):
        assert image.shape == (1, 4, 8, 8) and image.isfinite().all()
        assert all((image - other).abs().max() > 0.1 for other in images[:i])
    assert one().equal(images[0])


def test_the_global_stream_is_neither_read_nor_moved(dit):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = in_batches(dit, 7)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(6)
    assert in_batches(dit, 7).equal(first)


@pytest.mark.parametrize("form", [tuple, np.array, torch.tensor])
def test_labels_in_any_form(form):
    expected = in_batches(Rowwise(), 7)
    assert sample_latents(Rowwise(), form(LABELS), form(POSITIONS), **OPTIONS).equal(expected)


# ---- samplers ---------------------------------------------------------------------------------------------------------


def ancestral(model, x, y, noises, **options):
    """DDPM written out: x <- mean + sigma z, without noise in the last step."""
    diffusion = create_diffusion(str(OPTIONS["steps"]))
    for i in reversed(range(OPTIONS["steps"])):
        t, noise = torch.full((len(x),), i), next(noises)
        out = diffusion.p_mean_variance(model, x, t, clip_denoised=False, model_kwargs=dict(y=y, **options))
        x = out["mean"] + (0.5 * out["log_variance"]).exp() * noise if i else out["mean"]
    return x


@torch.no_grad()
def test_the_official_stream_is_one_for_both_halves(dit):
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
def test_ddpm_draws_the_start_and_every_step_but_the_last(dit):
    streams = noise_streams(1, LABELS, POSITIONS)
    noises = [draw(streams, (4, 8, 8), "cpu") for _ in range(OPTIONS["steps"])]  # the start, and 5 steps
    steps = iter([*noises[1:], None])
    expected = ancestral(lambda x, t, y: dit(x, t, y), noises[0], torch.tensor(LABELS), steps)
    ours = in_batches(dit, 7, cfg_scale=1)
    assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("sampler, draws", [("ddpm", OPTIONS["steps"]), ("ddim", 1)])
def test_ddim_draws_the_start_alone(sampler, draws, monkeypatch):
    calls = []
    monkeypatch.setattr(sampling, "draw", lambda *arguments: calls.append(1) or draw(*arguments))
    in_batches(Rowwise(), 7, sampler=sampler)
    assert len(calls) == draws


def test_ddim_is_the_diffusions(dit):
    z = draw(noise_streams(1, LABELS, POSITIONS), (4, 8, 8), "cpu")
    loop = create_diffusion(str(OPTIONS["steps"])).ddim_sample_loop
    expected = loop(dit, z.shape, z, clip_denoised=False, model_kwargs=dict(y=torch.tensor(LABELS)), eta=0.0)
    assert in_batches(dit, 7, sampler="ddim", cfg_scale=1).equal(expected)
    assert not in_batches(dit, 7, sampler="ddpm", cfg_scale=1).equal(expected)


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


# ---- pixels -----------------------------------------------------------------------------------------------------------


def test_pixels_are_rounded_and_clamped():
    every = torch.arange(256).view(1, 1, 16, 16)
    assert to_uint8(every / 127.5 - 1).equal(every.to(torch.uint8))
    nearly = every / 127.5 - 1 + torch.tensor([-0.49, 0.49]).view(2, 1, 1, 1) / 127.5
    assert to_uint8(nearly).equal(every.to(torch.uint8).expand(2, 1, 16, 16))
    assert to_uint8(torch.tensor([-9.0, -1.001, 1.001, 9.0])).tolist() == [0, 0, 255, 255]
