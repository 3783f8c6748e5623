"""The cases of `benchmarks.speed` that sample, decode and encode. Each takes the Bench and its own settings and yields Rows."""

import copy
import itertools
import tempfile
from pathlib import Path

import torch

from autoencoder import SD_SCALE, Autoencoder
from benchmarks import official as bench_official
from benchmarks.harness import EXACT, GPU_ALONE, Row, apart, count_flops, count_waits, row_of
from benchmarks.training_cases import random_dit
from diffusion import create_diffusion
from finetune import store_frozen
from guidance import ALL_TIMESTEPS, Guidance, guided
from runtime.device import DTYPES
from sampling.samplers import run_sampler, sample_keyed, to_uint8
from sampling.store import Store, Writer

SCALE = 4.0
GATE_STEPS = 10
# of Stable Diffusion's autoencoder; the weights are random
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
    norm_num_groups=32,
    sample_size=256,
)
TINY_VAE = dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4)


def random_vae(bench):
    from diffusers import AutoencoderKL  # slow to import

    torch.manual_seed(0)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    with bench.device:
        return AutoencoderKL(**bench.small(VAE, TINY_VAE), **blocks).eval().requires_grad_(False)


def our_model(bench, model):
    """(the model as sample_ddp.py has it, the half precision that it computes in or None)."""
    model = model.requires_grad_(False)
    half = None if bench.half == "no" else DTYPES[bench.half]
    if half:
        store_frozen(model, half)
    if bench.compiled:
        model.compile_blocks()
    return model, half


def our_sampling(bench, model, labels, guidance=None, autoencoder=None):
    """sample(steps) -> latents, or images with an autoencoder, by the default sampler."""
    model, half = our_model(bench, model)
    guidance = guidance or Guidance("superclass", SCALE)
    keys = [(0, k) for k in range(len(labels))]

    def sample(steps):
        latents = sample_keyed(model, labels, keys, guidance, steps=steps, autocast=half)
        return autoencoder.decode(latents) if autoencoder else latents

    return sample


def labels_of(bench, n):
    return torch.linspace(0, bench.classes - 1, n).long().to(bench.device)


def predicted(bench, model, labels, x, half=None):
    """The guided prediction for x (N, C, h, w) in the middle of the process."""
    t = torch.full(x.shape[:1], 500, device=bench.device)
    with torch.no_grad(), torch.autocast(bench.device.type, half, enabled=half is not None):
        return guided(model, labels, Guidance("superclass", SCALE), [()] * len(labels))(x, t).float()


def same_samples(bench, model, twin, labels, x):
    """(gate, a prediction for x): samples of both in GATE_STEPS steps from the official code's random numbers, in float32."""
    rows = model.y_embedder.superclass_rows(labels)
    prediction = guided(model, labels, Guidance("superclass", SCALE), [()] * len(labels))
    shapes = itertools.chain([x.shape], itertools.repeat((2 * len(x), *x.shape[1:])))

    def draw_next():  # its start is one for both halves of the guided batch, the noise of a step is drawn for both
        return torch.randn(next(shapes), device=bench.device)[: len(x)]

    with bench.exact():
        torch.manual_seed(0)
        expected = bench_official.sample(bench.official, twin, labels, rows, GATE_STEPS, SCALE)
        torch.manual_seed(0)
        found = run_sampler(prediction, draw_next, steps=GATE_STEPS)
        return [(apart(found, expected), EXACT)], predicted(bench, model, labels, x)


def sampling(bench, name, what, model, batch, steps, goal, size=32, decode=False, rate=None, most=None):
    """Guided sampling against the official one; `rate`: least images/s, `most`: most seconds a call."""
    size, batch, steps = bench.small(size, 8), bench.small(batch, 2), bench.small(steps, 4)
    model = bench.small(model, "DiT-Ti/2")
    own = random_dit(bench, model, size)
    twin = bench_official.twin(bench.official, own)
    labels = labels_of(bench, batch)
    rows = own.y_embedder.superclass_rows(labels)
    x = torch.randn(batch, own.in_channels, size, size, device=bench.device)
    gate, expected = same_samples(bench, own, twin, labels, x)
    vae = random_vae(bench) if decode else None
    ours = our_sampling(bench, own, labels, autoencoder=Autoencoder(vae, SD_SCALE) if decode else None)
    half = None if bench.half == "no" else DTYPES[bench.half]
    found = bench.first(name, lambda: predicted(bench, own, labels, x, half))
    gate.append((apart(found, expected), bench.tolerance))

    def theirs(steps):
        return bench_official.sample(bench.official, twin, labels, rows, steps, SCALE, vae)

    def short():
        ours(2), theirs(2)

    work = 2 * batch * steps * count_flops(model, size)
    times = bench.time(lambda: ours(steps), lambda: theirs(steps), work=work, warm=short)
    row = row_of(name, what, times, goal, batch if rate or most else None, gate)
    yield row
    checked = dict(gate=row.gate, faults=row.faults)
    if rate:
        yield Row(f"{name}-rate", what, row.unit, row.ours, goal=rate, at_least=True, **checked)
    if most:
        yield Row(f"{name}-seconds", what, "s", times.ours, goal=most, **checked)


def alone(bench, name, what, model, batch, steps, rate, size):
    """Guided sampling, how many images a second."""
    size, batch, steps = bench.small(size, 8), bench.small(batch, 2), bench.small(steps, 4)
    model = bench.small(model, "DiT-Ti/2")
    ours = our_sampling(bench, random_dit(bench, model, size), labels_of(bench, batch))
    bench.first(name, lambda: ours(2))
    work = 2 * batch * steps * count_flops(model, size)
    row = row_of(name, what, bench.time(lambda: ours(steps), work=work, warm=lambda: ours(2)), images=batch)
    row.goal, row.at_least = rate, True
    yield row


def interval(bench, name, what, model, batch, steps, goal, size=32):
    """Guided sampling with half of its steps, the later ones, outside the interval, against all inside."""
    size, batch, steps = bench.small(size, 8), bench.small(batch, 2), bench.small(steps, 4)
    own = random_dit(bench, bench.small(model, "DiT-Ti/2"), size)
    labels = labels_of(bench, batch)
    timesteps = create_diffusion(str(steps)).timestep_map
    intervals = (
        (timesteps[steps // 2], 999),
        ALL_TIMESTEPS,
        (ALL_TIMESTEPS[0] - 1, ALL_TIMESTEPS[1]),
    )  # the last leaves nothing out
    half, whole, everything = (
        our_sampling(bench, own, labels, Guidance("superclass", SCALE, interval=interval)) for interval in intervals
    )
    gate = [(apart(everything(GATE_STEPS), whole(GATE_STEPS)), bench.tolerance)]
    bench.first(name, lambda: (half(2), whole(2)))
    times = bench.time(lambda: half(steps), lambda: whole(steps), warm=lambda: (half(2), whole(2)))
    yield row_of(name, what, times, goal, gate=gate, against="without an interval")


def loop(bench, name, what, batch, steps, goal, size=32):
    """The sampler's own time: its loop around a model that gives the same numbers at once, milliseconds a step."""
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

    gate = [(apart(run(ours), run(theirs)), EXACT)]
    times = bench.time(lambda: run(ours), lambda: run(theirs))
    times.ours, times.other = times.ours / steps, times.other / steps
    yield row_of(name, what, times, goal, gate=gate)


# ---- the autoencoder, and what is around the networks ---------------------------------------------------------------


def encode(bench, name, what, batch, rate, image=256):
    """How many images a second become moments, in `half` as tools.encode_latents has it."""
    batch, image = bench.small(batch, 2), bench.small(image, 64)
    vae = random_vae(bench)
    autoencoder = Autoencoder(copy.deepcopy(vae).to(DTYPES[bench.half]), SD_SCALE)
    images = torch.rand(batch, 3, image, image, device=bench.device) * 2 - 1
    with bench.exact():
        expected = Autoencoder(vae, SD_SCALE).encode_moments(images[:2])[0]
    gate = [(apart(autoencoder.encode_moments(images[:2])[0], expected), bench.tolerance)]
    times = bench.time(lambda: autoencoder.encode_moments(images))
    row = row_of(name, what, times, images=batch, gate=gate)
    row.goal, row.at_least = rate, True
    yield row


def outside(bench, name, what, model, batch, batches, steps, goal, size=32):
    """What sample_ddp.py takes beside the networks: noise, sampler, pixels and PNGs; as a share of the whole.

    The networks alone are the same number of calls on the same inputs.
    """
    size, batch, steps = bench.small(size, 8), bench.small(batch, 2), bench.small(steps, 4)
    model, half = our_model(bench, random_dit(bench, bench.small(model, "DiT-Ti/2"), size))
    autoencoder = Autoencoder(random_vae(bench), SD_SCALE)
    labels = labels_of(bench, batch)
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

        def whole(steps, batches):
            with Writer(store.write) as writer:
                for i in range(batches):
                    mine = numbers[i * batch : (i + 1) * batch]
                    latents = sample_keyed(model, labels, [(0, k) for k in mine], guidance, steps=steps, autocast=half)
                    pixels = to_uint8(autoencoder.decode(latents)).permute(0, 2, 3, 1).contiguous().numpy()
                    for k, picture in zip(mine, pixels):
                        writer.put(k, picture)

        bench.first(name, lambda: whole(2, 1))
        times = bench.time(
            lambda: whole(steps, batches), lambda: networks(steps, batches), warm=lambda: (whole(2, 1), networks(2, 1))
        )
    row = row_of(name, what, times, goal=1 / (1 - goal), images=batch * batches, against="the networks alone")
    row.what += f"; the goal is {goal:.0%} outside"
    yield row


def waits(bench, name, what, model, batch, size=32):
    """How often a step of the sampler waits for the GPU, ours and the official."""
    size, batch = bench.small(size, 8), bench.small(batch, 2)
    model = bench.small(model, "DiT-Ti/2")
    own, labels = random_dit(bench, model, size), labels_of(bench, batch)
    ours = our_sampling(bench, own, labels)
    sides = [ours]
    if bench.official:
        twin, rows = bench_official.twin(bench.official, own), own.y_embedder.superclass_rows(labels)
        sides.append(lambda steps: bench_official.sample(bench.official, twin, labels, rows, steps, SCALE))
    counts = []
    for side in sides:
        side(2)  # the first puts tables on the GPU
        few, many = (count_waits(lambda: side(steps)) for steps in (2, 12))  # noqa: B023
        counts.append((many - few) / 10)
    yield Row(name, what, "waits", *counts, goal=0, faults=[] if bench.gpu else [GPU_ALONE])
