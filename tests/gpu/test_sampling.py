"""Sampling on a GPU against the CPU: noise, samplers, guidances, batches, waits, recorded forward passes."""

import pytest
import torch
from helpers.gpu import (
    DEVICE,
    NUMBERS,
    PARENTS,
    assert_close,
    assert_same,
    draw,
    exact,
    half_precision,
    small_dit,
)

from guidance import FORMULAS, Guidance, guided
from runtime.device import DTYPES
from sampling.samplers import SAMPLERS, draw_noise, noise_stream, sample_keyed, to_uint8
from sampling.speed import Graphs, linear_gelu, speed_up

CPU = torch.device("cpu")


def sampling_dit(device, name="DiT-Ti/2", size=8, channels=3):
    """Return a DiT with a null row, ready to sample."""
    model = small_dit(name, size, channels, null_row=True)
    return model.to(device).eval().requires_grad_(False)


def other_weights(model, table_rows=None):
    """Return other values for the norms and the table, as autoguidance and domain guidance swap them in."""
    weights = {name: p.clone() + 0.1 for name, p in model.named_parameters() if ".norm" in name}
    table = model.y_embedder.embedding_table.weight
    return weights | {"y_embedder.embedding_table.weight": (table.clone() - 0.1)[:table_rows]}


def guidance_of(kind, model, **more):
    weights = {"autoguidance": (None,), "domain": (1,)}
    others = other_weights(model, *weights[kind]) if kind in weights else None
    return Guidance(kind, 3.0, 2.0, other_weights=others, **more)


def sample_on(device, sampler="ddim", steps=8, kind="superclass", count=4, tf32=False, **more):
    """Return latents (count, 3, 8, 8); number k is the same for any count."""
    exact()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    model = sampling_dit(device)
    labels, keys = [k % len(PARENTS) for k in range(count)], [(0, k) for k in range(count)]
    return sample_keyed(model, labels, keys, guidance_of(kind, model), sampler=sampler, steps=steps, **more)


# ---- noise and pictures --------------------------------------------------------------------------


def test_pinned_noise(cuda_only):
    """Noise is right although the GPU is behind: pinned memory is not reused before it is copied."""
    streams, expected = ([noise_stream(0, k) for k in range(8)] for _ in range(2))
    torch.cuda._sleep(10**8)  # cycles
    found = [draw_noise(streams, (4, 32, 32), DEVICE) for _ in range(500)]
    for noise in found:
        assert_same({"noise": noise}, {"noise": draw_noise(expected, (4, 32, 32))})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures(sampler):
    """Images of a GPU are those of the CPU, but for rounding errors."""
    expected, found = (sample_on(device, sampler) for device in (CPU, DEVICE))
    assert_close(found, expected, 1e-3)
    equal = (to_uint8(found) == to_uint8(expected)).float().mean().item()
    assert equal >= 0.995 or not NUMBERS
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        assert_close(sample_on(DEVICE, sampler, tf32=True), expected, 2e-2)


@pytest.mark.parametrize("half", ["no", "half"])
def test_batches(half):
    """An image does not depend on the batch size, but for rounding errors."""
    options = dict(autocast=None if half == "no" else DTYPES[half_precision()])
    expected = sample_on(DEVICE, count=32, **options)
    for count in (1, 7):
        assert_close(sample_on(DEVICE, count=count, **options), expected[:count], 1e-4 if half == "no" else 5e-2)


@pytest.mark.parametrize("kind", FORMULAS)
def test_guidances(kind):
    """Guided predictions equal the CPU's, and the swapped weights come back."""
    exact()
    x, labels, keys, found = draw(4, 3, 8, 8), torch.tensor([0, 1, 2, 4]), [(0, k) for k in range(4)], {}
    for device in (CPU, DEVICE):
        model = sampling_dit(device)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        f = guided(model, labels.to(device), guidance_of(kind, model), keys)
        found[device] = [f(x.to(device), t) for t in (500, 499)]
        assert_same(model.state_dict(), before)
    for mine, expected in zip(found[DEVICE], found[CPU]):
        assert_close(mine, expected, 1e-4)


# ---- waits and speed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["superclass", "chain", "interval"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_waits_in_sampling(cuda_only, sampler, kind):
    model = sampling_dit(DEVICE)
    more = {"interval": (300, 700)} if kind == "interval" else {}
    guidance = guidance_of("superclass" if kind == "interval" else kind, model, **more)
    labels = torch.zeros(2, dtype=torch.long, device=DEVICE)
    for mode in ("default", "error"):  # the first run fills the allocator and copies tables
        torch.cuda.set_sync_debug_mode(mode)
        options = dict(sampler=sampler, steps=4, autocast=DTYPES[half_precision()])
        sample_keyed(model, labels, [(0, 0), (0, 1)], guidance, **options)


@pytest.mark.parametrize("kind", ["superclass", "autoguidance", "domain"])
def test_graph(cuda_only, kind):
    """Recorded forward passes are the eager ones bit for bit: two batch sizes in turn, swapped weights, two guidances."""
    exact()
    plain, graphed = sampling_dit(DEVICE), sampling_dit(DEVICE)
    graphed.forward = Graphs(graphed.forward, graphed.y_embedder.embedding_table.weight, 16)
    predictions = {}
    for model in (plain, graphed):
        guidance = guidance_of(kind, model)
        fs = [guided(model, torch.arange(n, device=DEVICE), guidance, [(0, k) for k in range(n)]) for n in (2, 5)]
        found = predictions[model] = []
        for t in (900, 500, 0):
            for f, n in zip(fs, (2, 5)):
                found.append(f(draw(n, 3, 8, 8, seed=t).to(DEVICE), t).clone())
    for mine, expected in zip(predictions[graphed], predictions[plain]):
        assert_same({"": mine}, {"": expected})
    assert len(graphed.forward.recorded) == (2 if kind == "superclass" else 4)


@pytest.mark.parametrize("half", ["no", "half"])
def test_speed_up(half):
    """All that makes sampling faster changes latents by rounding alone, and GELU in the product is GELU."""
    dtype = None if half == "no" else DTYPES[half_precision()]
    latents = []
    for fast in (False, True):
        model = sampling_dit(DEVICE)
        if fast:
            speed_up(model, dtype, compiled=False, swaps=False)
        latents.append(sample_keyed(model, [0, 3], [(0, 0), (0, 1)], Guidance(scale=2.0), steps=8, autocast=dtype))
    assert_close(latents[1], latents[0], 1e-4 if half == "no" else 5e-2)
    x, weight, bias = (draw(*shape, seed=i).to(DEVICE, dtype) for i, shape in enumerate([(8, 64), (96, 64), (96,)]))
    expected = torch.nn.functional.gelu(x.double() @ weight.double().T + bias.double(), approximate="tanh")
    assert_close(linear_gelu(x, weight, bias), expected, 1e-5 if half == "no" else 1e-2)
