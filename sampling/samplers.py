"""From labels to images: a noise stream for each image, the samplers, and pixels.

Shapes: N images; latents (N, C, h, w); labels (N,), rows of the class table.
"""

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from tqdm import tqdm

from diffusion import create_diffusion
from guidance import Guidance, guided, hash_integer
from models import DiT

SAMPLERS = ("ddpm", "ddim", "dpm++", "unipc")


# ---- noise ---------------------------------------------------------------------------------------


def noise_stream(*key: Hashable) -> np.random.Generator:
    """Return a stream of random numbers that `key` alone determines, whatever the batch, process or device.

    Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by a 128-bit hash: the
    probability that two of 500,000 images share a stream is 4e-28.
    """
    return np.random.Generator(np.random.Philox(key=hash_integer(" ".join(map(str, key)))))


def draw_noise(
    streams: Sequence[np.random.Generator], shape: Sequence[int], device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Draw standard normal float32 noise (N, *shape), the i-th from the i-th stream.

    Does not wait for a GPU: the copy is queued behind its computations.
    """
    on_gpu = torch.device(device).type == "cuda"
    noise = torch.empty(len(streams), *shape, pin_memory=on_gpu)
    for stream, out in zip(streams, noise.numpy()):
        stream.standard_normal(dtype=np.float32, out=out)
    return noise.to(device, non_blocking=on_gpu)


# ---- samplers ------------------------------------------------------------------------------------


def run_sampler(
    predict: Callable,
    draw_next: Callable,
    sampler: str = "ddpm",
    steps: int = 250,
    progress: bool = False,
    init: torch.Tensor | None = None,
    strength: float = 1.0,
) -> torch.Tensor:
    """Return latents (N, C, h, w) sampled from noise, or from noisy latents.

    predict     f(x, t) -> (N, 2C, h, w), or (N, C, h, w) for a solver; t is a timestep in 0..999, an int
    draw_next   f() -> standard normal noise (N, C, h, w): the initial noise, then for "ddpm" that of each step but the last
    sampler     "ddpm" (arXiv 2006.11239) or "ddim" (arXiv 2010.02502, eta 0) on evenly spaced timesteps, "dpm++"
                (DPM-Solver++ 2M, arXiv 2211.01095) or "unipc" (UniPC-2, arXiv 2302.04867) on `solver_timesteps`
    steps       1 to 1000; each calls `predict` once
    init        latents (N, C, h, w) to vary (SDEdit, arXiv 2108.01073): the initial noise is added to them at the timestep
                where the last `steps_to_make(steps, strength)` steps begin, and these steps are made
    strength    0 to 1: 0 returns `init`, 1 ignores it
    """
    count = steps if init is None else steps_to_make(steps, strength)
    if not count:
        return init
    x = draw_next()
    diffusion = create_diffusion(str(steps))
    solver = sampler in ("dpm++", "unipc")
    timesteps = (solver_timesteps(steps).tolist() if solver else diffusion.timestep_map[::-1])[-count:]
    if count < steps:
        x = create_diffusion("").q_sample(init, timesteps[0], x)
    if solver:
        return run_solver(predict, x, sampler, np.array(timesteps), progress)
    loop = {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop}[sampler]
    timesteps = iter(timesteps)  # ints: to read the tensor that the loop passes waits for a GPU
    unused = torch.zeros_like(x)  # the noise of the last step, and all of DDIM's, is multiplied by zero
    return loop(
        lambda x, _: predict(x, next(timesteps)),
        x.shape,
        x,
        clip_denoised=False,
        progress=progress,
        device=x.device,
        step_noise=lambda x, i: unused if i == 0 or sampler == "ddim" else draw_next(),
        steps=count,
    )


def steps_to_make(steps: int, strength: float) -> int:
    """Return how many of a sampler's steps a variation makes: strength x steps, rounded down as in diffusers."""
    return int(steps * strength + 1e-9)  # 0.29 x 100 is 28.999... in binary


def solver_timesteps(steps: int) -> np.ndarray:
    """Return the timesteps of the solvers, int64 (steps,) from 999 down to 0, evenly spaced in their square root.

    The noise level changes fastest near 0. Of spacings even in the timestep, in its root or in the log of the
    signal-to-noise ratio, this one has the smallest error, or nearly so, from 5 to 50 steps: benchmarks/solvers_*.md.
    """
    squares = np.linspace(999**0.5, 0, steps) ** 2
    return np.maximum(np.floor(squares + 0.5).astype(np.int64), np.arange(steps)[::-1])  # no timestep twice


@torch.no_grad()
def run_solver(
    predict: Callable, x: torch.Tensor, sampler: str, timesteps: np.ndarray, progress: bool = False
) -> torch.Tensor:
    """Return latents from noise x (N, C, h, w) by a multistep solver of order 2.

    predict, sampler  as in `run_sampler`; a learned variance is ignored
    timesteps         int64 (steps,), decreasing. The last step goes from the last of them to the predicted x_0, as in DDIM
    """
    process = create_diffusion("")
    sigmas = np.sqrt(1 / process.alphas_cumprod[timesteps] - 1)  # noise levels
    sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
    step = {"dpm++": dpm_steps, "unipc": unipc_steps}[sampler](sigmas)
    for t in tqdm(timesteps.tolist(), disable=not progress):
        x = step(predict(x, t)[:, : x.shape[1]], x)
    return x


def dpm_steps(sigmas: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return step(noise, x) -> x of DPM-Solver++ 2M, to be called in order for the noise levels `sigmas` but the last."""
    from diffusers import DPMSolverMultistepScheduler  # slow to import

    scheduler = DPMSolverMultistepScheduler(solver_order=2, prediction_type="epsilon")
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas, scheduler.timesteps = sigmas, torch.arange(len(sigmas) - 1)  # the timesteps are only counted
    scheduler.set_begin_index(0)
    return lambda noise, x: scheduler.step(noise, 0, x, return_dict=False)[0]


def unipc_steps(sigmas: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return step(noise, x) -> x of UniPC-2, to be called in order for the noise levels `sigmas` but the last.

    UniPC (arXiv 2302.04867) with B(h) = e^h - 1, which predicts x_0: a predictor (UniP-2), whose result the next prediction
    corrects (UniC-2). All coefficients are scalars on the CPU, so that no step waits for a GPU. diffusers' scheduler, with
    the same numbers, computes them on the GPU.
    """
    alphas = [1 / (sigma**2 + 1) ** 0.5 for sigma in sigmas]
    stds = [sigma * alpha for sigma, alpha in zip(sigmas, alphas)]
    log_snrs = [alpha.log() - std.log() for alpha, std in zip(alphas, stds)]  # lambda, half the log of SNR
    last, outputs = None, deque(maxlen=2)  # x of the last step, corrected, and the last two predictions of x_0
    numbers = itertools.count()

    def interval(i, order):
        """Return scale, gain and (rk, rho) of the step from level i to i + 1: x <- scale x - gain (x_0 + ...)."""
        h = log_snrs[i + 1] - log_snrs[i]
        phi = torch.expm1(-h)  # h phi_1(h) = B(h)
        scale, gain = stds[i + 1] / stds[i], alphas[i + 1] * phi
        if order == 1:
            return scale, gain, None, (0.0, 0.5)
        rk = (log_snrs[i - 1] - log_snrs[i]) / h
        phi_1 = phi / -h - 1
        phi_2 = phi_1 / -h - 1 / 2
        rks = torch.stack([rk, torch.ones(())])
        rhos = torch.linalg.solve(torch.stack([rks**0, rks]), torch.stack([phi_1 / phi, phi_2 * 2 / phi]))
        return scale, gain, rk, rhos.unbind()

    def order_at(i):
        return min(2, i + 1, len(sigmas) - 1 - i)  # 1 in the first step and in the last

    def slope(rk):
        """Return the change between the predictions over rk, the ratio of the steps in log SNR; 0 if the order is 1."""
        return 0.0 if rk is None else (outputs[-2] - outputs[-1]) / rk

    def step(noise, x):
        nonlocal last
        i = next(numbers)
        x_0 = (x - stds[i] * noise) / alphas[i]
        if i:  # correct the last step by this prediction
            scale, gain, rk, (rho, rho_new) = interval(i - 1, order_at(i - 1))
            change = rho * slope(rk) + rho_new * (x_0 - outputs[-1])
            x = scale * last - gain * outputs[-1] - gain * change
        outputs.append(x_0)
        last = x
        scale, gain, rk, _ = interval(i, order_at(i))
        return scale * x - gain * x_0 - gain * (0.5 * slope(rk))

    return step


# ---- sampling a model ----------------------------------------------------------------------------


def sample_keyed(
    model: DiT,
    labels: Sequence[int],
    keys: Sequence[tuple],
    guidance: Guidance,
    *,
    sampler: str = "ddpm",
    steps: int = 250,
    progress: bool = False,
    autocast: torch.dtype | None = None,
    fill: int = 0,
    init: torch.Tensor | None = None,
    strength: float = 1.0,
) -> torch.Tensor:
    """Return latents (N, C, h, w) of `labels` (N,); see `run_sampler`.

    keys      a tuple for each image, which determines everything random in it
    autocast  half precision of the model, torch.bfloat16 or torch.float16, or None
    fill      sample at least this many images, of which only the N are returned: a compiled model would compile again for
              a smaller batch
    init      latents (N, C, h, w) to vary, with a strength of 0 to 1
    """
    device, images = model.pos_embed.device, len(labels)
    more = max(0, fill - images)
    labels, keys = torch.as_tensor(labels, device=device), [*keys, *keys[:1] * more]
    labels = torch.cat([labels, labels[:1].expand(more)])
    if init is not None:
        init = torch.cat([init, init[:1].expand(more, *init.shape[1:])])
    streams = [noise_stream(*key) for key in keys]
    shape = (model.in_channels, model.input_size, model.input_size)
    prediction = guided(model, labels, guidance, keys)

    def predict(x, t):
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return prediction(x, t).float()

    options = dict(progress=progress, init=init, strength=strength)
    return run_sampler(predict, lambda: draw_noise(streams, shape, device), sampler, steps, **options)[:images]


def sample_latents(
    model: DiT,
    labels: Sequence[int],
    positions: Sequence[int],
    *,
    seed: int,
    cfg_scale: float,
    steps: int = 250,
    sampler: str = "ddpm",
    cfg_channels: int | str = 3,
    progress: bool = False,
) -> torch.Tensor:
    """Return latents (N, C, h, w) of `labels` (N,) under superclass guidance.

    positions: (N,). The key of image i is (seed, labels[i], positions[i]), as in sample.py.
    """
    keys = [(seed, int(label), int(position)) for label, position in zip(labels, positions)]
    guidance = Guidance("superclass", cfg_scale, channels=cfg_channels)
    return sample_keyed(model, labels, keys, guidance, sampler=sampler, steps=steps, progress=progress)


def sample_latents_official(
    model: DiT,
    labels: Sequence[int],
    *,
    seed: int,
    cfg_scale: float,
    steps: int = 250,
    cfg_channels: int | str = 3,
    progress: bool = False,
) -> torch.Tensor:
    """Return latents (N, C, h, w) of `labels` (N,) as the official `sample.py` samples them.

    It sets torch's global seed, and draws noise for both halves of the guided batch.
    """
    device = model.pos_embed.device
    torch.manual_seed(seed)
    labels = torch.as_tensor(labels, device=device)
    size = model.input_size
    z = torch.randn(len(labels), model.in_channels, size, size, device=device)
    z = torch.cat([z, z])
    rows = torch.cat([labels, model.y_embedder.superclass_rows(labels)])
    samples = create_diffusion(str(steps)).p_sample_loop(
        model.forward_with_cfg,
        z.shape,
        z,
        clip_denoised=False,
        model_kwargs=dict(y=rows, cfg_scale=cfg_scale, cfg_channels=cfg_channels),
        progress=progress,
        device=device,
    )
    return samples[: len(labels)]


# ---- images --------------------------------------------------------------------------------------


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Round images (N, 3, H, W) in [-1, 1] to uint8 on the CPU; values outside are clamped."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()


def check_finite_images(images: torch.Tensor, names: Sequence[str]):
    """Raise ValueError with the name of the first of the images (N, 3, H, W) that is not finite."""
    bad = (~images.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise ValueError(
            f"{names[bad[0]]} is not finite, expected finite pixels: check --ckpt and --cfg-scale, and --mixed-precision and "
            "--tf32 if given."
        )
