"""From labels to images: a noise stream for each image, the samplers, and pixels.

Shapes: N images; latents (N, C, h, w); labels (N,), rows of the class table.
"""

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
    predict: Callable, draw_next: Callable, sampler: str = "ddpm", steps: int = 250, progress: bool = False
) -> torch.Tensor:
    """Return latents (N, C, h, w) sampled from noise.

    predict     f(x, t) -> (N, 2C, h, w), or (N, C, h, w) for a solver; t (N,) is one timestep in 0..999
    draw_next   f() -> standard normal noise (N, C, h, w): the initial noise, then for "ddpm" that of each step but the last
    sampler     "ddpm" (arXiv 2006.11239) or "ddim" (arXiv 2010.02502, eta 0) on evenly spaced timesteps, "dpm++"
                (DPM-Solver++ 2M, arXiv 2211.01095) or "unipc" (UniPC-2, arXiv 2302.04867) on `solver_timesteps`
    steps       1 to 1000; each calls `predict` once
    """
    x = draw_next()
    if sampler in ("dpm++", "unipc"):
        return run_solver(predict, x, sampler, solver_timesteps(steps), progress)
    diffusion = create_diffusion(str(steps))
    loop = {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop}[sampler]
    unused = torch.zeros_like(x)  # the noise of the last step, and all of DDIM's, is multiplied by zero
    return loop(
        predict,
        x.shape,
        x,
        clip_denoised=False,
        progress=progress,
        device=x.device,
        step_noise=lambda x, i: unused if i == 0 or sampler == "ddim" else draw_next(),
    )


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
    """Return latents from noise x (N, C, h, w) by a multistep solver of order 2 of diffusers.

    predict, sampler  as in `run_sampler`; a learned variance is ignored
    timesteps         int64 (steps,), decreasing. The last step goes from the last of them to the predicted x_0, as in DDIM
    """
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler  # slow to import

    process = create_diffusion("")
    kind = {"dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}[sampler]
    scheduler = kind(trained_betas=process.betas, solver_order=2, prediction_type="epsilon")
    scheduler.set_timesteps(len(timesteps))
    sigmas = np.sqrt(1 / process.alphas_cumprod[timesteps] - 1)
    scheduler.timesteps = torch.from_numpy(timesteps)
    scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
    scheduler.set_begin_index(0)
    for t in tqdm(scheduler.timesteps, disable=not progress):
        noise = predict(x, torch.full((len(x),), int(t), device=x.device))[:, : x.shape[1]]
        x = scheduler.step(noise, t, x, return_dict=False)[0]
    return x


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
) -> torch.Tensor:
    """Return latents (N, C, h, w) of `labels` (N,); see `run_sampler`.

    keys      a tuple for each image, which determines everything random in it
    autocast  half precision of the model, torch.bfloat16 or torch.float16, or None
    """
    device = model.pos_embed.device
    labels = torch.as_tensor(labels, device=device)
    streams = [noise_stream(*key) for key in keys]
    shape = (model.in_channels, model.input_size, model.input_size)
    prediction = guided(model, labels, guidance, keys)

    def predict(x, t):
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return prediction(x, t).float()

    return run_sampler(predict, lambda: draw_noise(streams, shape, device), sampler, steps, progress)


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
