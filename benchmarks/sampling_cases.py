"""Cases of `benchmarks.speed` that sample, decode and encode.

Each takes the Bench, its name and its settings, and yields Rows.
"""

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from autoencoder import SD_SCALE, Autoencoder
from benchmarks import official
from benchmarks.harness import (
    EXACT,
    NEEDS_GPU,
    Bench,
    Row,
    count_flops,
    count_waits,
    make_row,
    relative_difference,
)
from benchmarks.training_cases import random_dit
from diffusion import create_diffusion
from finetune import store_frozen
from guidance import ALL_TIMESTEPS, Guidance, guided
from runtime.device import DTYPES
from sampling.samplers import run_sampler, sample_keyed, to_uint8
from sampling.speed import speed_up
from sampling.store import Store, Writer

SCALE = 4.0
GATE_STEPS = 10
# the size of Stable Diffusion's autoencoder
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=32,
    sample_size=256,
)
TINY_VAE = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4)


# ---- models --------------------------------------------------------------------------------------


def random_vae(bench: Bench) -> nn.Module:
    """Return an `AutoencoderKL` with random weights."""
    from diffusers import AutoencoderKL  # slow to import

    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    with bench.device:
        return AutoencoderKL(**bench.small(VAE, TINY_VAE), **blocks).eval().requires_grad_(False)


def our_model(bench: Bench, model: nn.Module) -> tuple[nn.Module, torch.dtype | None]:
    """Prepare a model as sample_ddp.py does; return it with its half precision, or None for float32."""
    model = model.requires_grad_(False)
    half = None if bench.half == "no" else DTYPES[bench.half]
    if half:
        store_frozen(model, half)
    speed_up(model, half, bench.compiled, swaps=False)
    return model, half


def our_sampling(
    bench: Bench,
    model: nn.Module,
    labels: torch.Tensor,
    guidance: Guidance | None = None,
    autoencoder: Autoencoder | None = None,
) -> Callable:
    """Return sample(steps) -> latents, or images with an autoencoder, with the default sampler."""
    model, half = our_model(bench, model)
    guidance = guidance or Guidance("superclass", SCALE)
    keys = [(0, k) for k in range(len(labels))]

    def sample(steps):
        latents = sample_keyed(model, labels, keys, guidance, steps=steps, autocast=half)
        return autoencoder.decode(latents) if autoencoder else latents

    return sample


def make_labels(bench: Bench, n: int) -> torch.Tensor:
    """Return n evenly spaced labels."""
    return torch.linspace(0, bench.classes - 1, n).long().to(bench.device)


def predict_once(
    bench: Bench, model: nn.Module, labels: torch.Tensor, x: torch.Tensor, half: torch.dtype | None = None
) -> torch.Tensor:
    """Return the guided prediction for x (N, C, h, w) at timestep 500."""
    t = torch.full(x.shape[:1], 500, device=bench.device)
    with torch.no_grad(), torch.autocast(bench.device.type, half, enabled=half is not None):
        return guided(model, labels, Guidance("superclass", SCALE), [()] * len(labels))(x, t).float()


def compare_samples(
    bench: Bench, model: nn.Module, twin: nn.Module, labels: torch.Tensor, x: torch.Tensor
) -> tuple[list[tuple[float, float]], torch.Tensor]:
    """Sample both sides in float32 from the official random numbers; return the gate and our prediction for x."""
    rows = model.y_embedder.superclass_rows(labels)
    prediction = guided(model, labels, Guidance("superclass", SCALE), [()] * len(labels))
    shapes = itertools.chain([x.shape], itertools.repeat((2 * len(x), *x.shape[1:])))

    # the official code draws its start once for both halves of the guided batch, and the noise of a step for each half
    def draw_next():
        return torch.randn(next(shapes), device=bench.device)[: len(x)]

    with bench.exact():
        torch.manual_seed(0)
        expected = official.sample(bench.official, twin, labels, rows, GATE_STEPS, SCALE)
        torch.manual_seed(0)
        found = run_sampler(prediction, draw_next, steps=GATE_STEPS)
        return [(relative_difference(found, expected), EXACT)], predict_once(bench, model, labels, x)


# ---- sampling ------------------------------------------------------------------------------------


def sampling(
    bench: Bench,
    name: str,
    about: str,
    model: str,
    batch: int,
    steps: int,
    goal: float,
    size: int = 32,
    decode: bool = False,
    rate: float | None = None,
    most: float | None = None,
) -> Iterator[Row]:
    """Time guided sampling against the official one; `rate`: smallest images/s, `most`: largest seconds per call."""
    size, batch, steps = bench.small(size, 8), bench.small(batch, 2), bench.small(steps, 4)
    model = bench.small(model, "DiT-Ti/2")
    own = random_dit(bench, model, size)
    twin = official.twin(bench.official, own)
    labels = make_labels(bench, batch)
    rows = own.y_embedder.superclass_rows(labels)
    x = torch.randn(batch, own.in_channels, size, size, device=bench.device)
    gate, expected = compare_samples(bench, own, twin, labels, x)
    vae = random_vae(bench) if decode else None
    ours = our_sampling(bench, own, labels, autoencoder=Autoencoder(vae, SD_SCALE) if decode else None)
    half = None if bench.half == "no" else DTYPES[bench.half]
    found = bench.first_call(name, lambda: predict_once(bench, own, labels, x, half))
    gate.append((relative_difference(found, expected), bench.tolerance))

    def theirs(steps):
        return official.sample(bench.official, twin, labels, rows, steps, SCALE, vae)

    def short():
        ours(2), theirs(2)

    work = 2 * batch * steps * count_flops(model, size)
    times = bench.time(lambda: ours(steps), lambda: theirs(steps), work=work, warm=short)
    row = make_row(name, about, times, goal, batch if rate or most else None, gate)
    yield row
    checked = dict(gate=row.gate, faults=row.faults)
    if rate:
        yield Row(f"{name}-rate", about, row.unit, row.ours, goal=rate, at_least=True, **checked)
    if most:
        yield Row(f"{name}-seconds", about, "s", times.ours, goal=most, **checked)


def sampling_rate(
    bench: Bench, name: str, about: str, model: str, batch: int, steps: int, rate: float, size: int
) -> Iterator[Row]:
    """Measure the images/s of guided sampling; `rate` is the goal."""
    size, batch, steps = bench.small(size, 8), bench.small(batch, 2), bench.small(steps, 4)
    model = bench.small(model, "DiT-Ti/2")
    ours = our_sampling(bench, random_dit(bench, model, size), make_labels(bench, batch))
    bench.first_call(name, lambda: ours(2))
    work = 2 * batch * steps * count_flops(model, size)
    row = make_row(name, about, bench.time(lambda: ours(steps), work=work, warm=lambda: ours(2)), images=batch)
    row.goal, row.at_least = rate, True
    yield row


def interval(
    bench: Bench, name: str, about: str, model: str, batch: int, steps: int, goal: float, size: int = 32
) -> Iterator[Row]:
    """Time sampling with guidance in the first half of its steps only, against guidance in all steps."""
    size, batch, steps = bench.small(size, 8), bench.small(batch, 2), bench.small(steps, 4)
    own = random_dit(bench, bench.small(model, "DiT-Ti/2"), size)
    labels = make_labels(bench, batch)
    timesteps = create_diffusion(str(steps)).timestep_map
    intervals = (
        (timesteps[steps // 2], 999),
        ALL_TIMESTEPS,
        (ALL_TIMESTEPS[0] - 1, ALL_TIMESTEPS[1]),  # all timesteps too, but checked one by one
    )
    half, full, everything = (
        our_sampling(bench, own, labels, Guidance("superclass", SCALE, interval=interval)) for interval in intervals
    )
    gate = [(relative_difference(everything(GATE_STEPS), full(GATE_STEPS)), bench.tolerance)]
    bench.first_call(name, lambda: (half(2), full(2)))
    times = bench.time(lambda: half(steps), lambda: full(steps), warm=lambda: (half(2), full(2)))
    yield make_row(name, about, times, goal, gate=gate, against="without an interval")


def loop(bench: Bench, name: str, about: str, batch: int, steps: int, goal: float, size: int = 32) -> Iterator[Row]:
    """Time the sampler alone, in milliseconds per step: its loop around a model that returns a constant."""
    shape = (batch, 4, size, size)
    torch.manual_seed(0)
    z = torch.randn(shape, device=bench.device)
    output = 0.1 * torch.randn(batch, 8, size, size, device=bench.device)
    ours, theirs = create_diffusion(str(steps)), bench.official.create_diffusion(str(steps))

    def run(diffusion):
        torch.manual_seed(0)
        return diffusion.p_sample_loop(
            lambda x, t: output, shape, z, clip_denoised=False, progress=False, device=bench.device
        )

    gate = [(relative_difference(run(ours), run(theirs)), EXACT)]
    times = bench.time(lambda: run(ours), lambda: run(theirs))
    times.ours, times.other = times.ours / steps, times.other / steps
    yield make_row(name, about, times, goal, gate=gate)


# ---- autoencoder, and time outside the networks --------------------------------------------------


def encode(bench: Bench, name: str, about: str, batch: int, rate: float, image: int = 256) -> Iterator[Row]:
    """Measure the images/s of the VAE encoder, in `half` as tools.encode_latents runs it; `rate` is the goal."""
    batch, image = bench.small(batch, 2), bench.small(image, 64)
    vae = random_vae(bench)
    autoencoder = Autoencoder(copy.deepcopy(vae).to(DTYPES[bench.half]), SD_SCALE)
    images = torch.rand(batch, 3, image, image, device=bench.device) * 2 - 1
    with bench.exact():
        expected = Autoencoder(vae, SD_SCALE).encode_moments(images[:2])[0]
    gate = [(relative_difference(autoencoder.encode_moments(images[:2])[0], expected), bench.tolerance)]
    times = bench.time(lambda: autoencoder.encode_moments(images))
    row = make_row(name, about, times, images=batch, gate=gate)
    row.goal, row.at_least = rate, True
    yield row


def outside(
    bench: Bench,
    name: str,
    about: str,
    model: str,
    batch: int,
    batches: int,
    steps: int,
    goal: float,
    size: int = 32,
) -> Iterator[Row]:
    """Time sample_ddp.py against its networks alone; the rest is noise, sampler, pixels and PNGs.

    The networks alone make the same number of calls on the same inputs. goal: largest share of time outside them
    """
    size, batch, steps = bench.small(size, 8), bench.small(batch, 2), bench.small(steps, 4)
    model, half = our_model(bench, random_dit(bench, bench.small(model, "DiT-Ti/2"), size))
    autoencoder = Autoencoder(random_vae(bench), SD_SCALE)
    labels = make_labels(bench, batch)
    guidance = Guidance("superclass", SCALE)
    prediction = guided(model, labels, guidance, [()] * batch)
    x = torch.randn(batch, model.in_channels, size, size, device=bench.device)
    t = torch.full((batch,), 500, device=bench.device)
    numbers = range(batch * batches)

    @torch.no_grad()
    def networks(steps, batches):
        with torch.autocast(bench.device.type, half, enabled=half is not None):
            for _ in range(batches):
                for _ in range(steps):
                    prediction(x, t)
                autoencoder.decode(x)

    with tempfile.TemporaryDirectory() as folder:
        store = Store(
            Path(folder, "samples"),
            labels.cpu().repeat(batches),
            [str(k) for k in range(bench.classes)],
            8 * size,
            "png",
        )

        def complete(steps, batches):
            with Writer(store.write) as writer:
                for i in range(batches):
                    mine = numbers[i * batch : (i + 1) * batch]
                    latents = sample_keyed(model, labels, [(0, k) for k in mine], guidance, steps=steps, autocast=half)
                    pixels = to_uint8(autoencoder.decode(latents)).permute(0, 2, 3, 1).contiguous().numpy()
                    for k, image in zip(mine, pixels):
                        writer.put(k, image)

        bench.first_call(name, lambda: complete(2, 1))
        times = bench.time(
            lambda: complete(steps, batches),
            lambda: networks(steps, batches),
            warm=lambda: (complete(2, 1), networks(2, 1)),
        )
    row = make_row(name, about, times, goal=1 / (1 - goal), images=batch * batches, against="the networks alone")
    row.about += f"; the goal is {goal:.0%} outside"
    yield row


def waits(bench: Bench, name: str, about: str, model: str, batch: int, size: int = 32) -> Iterator[Row]:
    """Count how often a step of the sampler waits for the GPU, ours and the official one."""
    size, batch = bench.small(size, 8), bench.small(batch, 2)
    model = bench.small(model, "DiT-Ti/2")
    own, labels = random_dit(bench, model, size), make_labels(bench, batch)
    sides = []
    if bench.official:
        twin, rows = official.twin(bench.official, own), own.y_embedder.superclass_rows(labels)
        sides = [lambda steps: official.sample(bench.official, twin, labels, rows, steps, SCALE)]
    sides.insert(0, our_sampling(bench, own, labels))
    counts = []
    for side in sides:
        side(2)  # the first call copies tables to the GPU
        few, many = (count_waits(lambda: side(steps)) for steps in (2, 12))  # noqa: B023
        counts.append((many - few) / 10)
    yield Row(name, about, "waits", *counts, goal=0, faults=[] if bench.gpu else [NEEDS_GPU])
