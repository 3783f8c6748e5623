"""From labels to images: a noise stream per image, the sampler, and pixels.

Shapes: N images, latents (N, C, h, w); labels (N,) rows of the class table.
"""

import numpy as np
import torch
from tqdm import tqdm

from diffusion import create_diffusion
from guidance import Guidance, guided, hash_integer

SAMPLERS = ("ddpm", "ddim", "dpm++", "unipc")


def noise_stream(*key):
    """A stream of standard normal numbers, set by `key` alone: no batch, process or device changes a picture.

    Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by a 128-bit hash: that two
    of 500,000 images share a stream has a chance of 4e-28.
    """
    return np.random.Generator(np.random.Philox(key=hash_integer(" ".join(map(str, key)))))


def draw_noise(streams, shape, device="cpu"):
    """Standard normal float32 (N, *shape), the i-th from the i-th stream.

    A GPU is not waited for: the copy is queued behind what it computes.
    """
    on_gpu = torch.device(device).type == "cuda"
    noise = torch.empty(len(streams), *shape, pin_memory=on_gpu)
    for stream, out in zip(streams, noise.numpy()):
        stream.standard_normal(dtype=np.float32, out=out)
    return noise.to(device, non_blocking=on_gpu)


# ---- samplers -------------------------------------------------------------------------------------------------------


def run_sampler(predict, draw_next, sampler="ddpm", steps=250, progress=False):
    """Latents (N, C, h, w) from noise.

    predict     f(x, t) -> (N, 2C, h, w), or (N, C, h, w) for a solver, t (N,) one timestep in 0..999
    draw_next   f() -> standard normal (N, C, h, w): the start, then for "ddpm" one for each step but the last
    sampler     "ddpm" (arXiv 2006.11239) or "ddim" (arXiv 2010.02502, eta 0) on evenly spaced timesteps, "dpm++"
                (DPM-Solver++ 2M, arXiv 2211.01095) or "unipc" (UniPC-2, arXiv 2302.04867) on those of `solver_timesteps`
    steps       1 to 1000, each one call of `predict`
    """
    x = draw_next()
    if sampler in ("dpm++", "unipc"):
        return run_solver(predict, x, sampler, solver_timesteps(steps), progress)
    diffusion = create_diffusion(str(steps))
    loop = {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop}[sampler]
    idle = torch.zeros_like(x)  # the last step's noise, and all of DDIM's, is multiplied by zero
    return loop(
        predict,
        x.shape,
        x,
        clip_denoised=False,
        progress=progress,
        device=x.device,
        step_noise=lambda x, i: idle if i == 0 or sampler == "ddim" else draw_next(),
    )


def solver_timesteps(steps):
    """Where the solvers look, from 999 down to 0: int64 (steps,), even in the square root of the timestep.

    The noise level changes fastest near 0. Among spacings even in timestep, its root, and the log of the
    signal-to-noise ratio this one has the smallest error, or nearly so, from 5 steps to 50: benchmarks/solvers_*.md.
    """
    squares = np.linspace(999**0.5, 0, steps) ** 2
    return np.maximum(np.floor(squares + 0.5).astype(np.int64), np.arange(steps)[::-1])  # each timestep once


@torch.no_grad()
def run_solver(predict, x, sampler, timesteps, progress=False):
    """The latents to which diffusers' multistep solver of order 2 takes x (N, C, h, w); see `walk`.

    `timesteps`: int64 (steps,), falling. From the last of them, 0, the last step goes to the x_0 predicted there, as
    DDIM's does. Of a learned variance nothing is used.
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


# ---- a model's pictures ---------------------------------------------------------------------------------------------


def sample_keyed(model, labels, keys, guidance, *, sampler="ddpm", steps=250, progress=False, autocast=None):
    """Latents (N, C, h, w) of `labels` (N,), all that is random in the i-th set by the tuple `keys[i]`; see `walk`.

    `autocast`: the half precision in which the model computes, torch.bfloat16 or torch.float16.
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
    model, labels, positions, *, seed, cfg_scale, steps=250, sampler="ddpm", cfg_channels=3, progress=False
):
    """Latents (N, C, h, w) of `labels` (N,) under superclass guidance, image i keyed (seed, labels[i], positions[i])."""
    keys = [(seed, int(label), int(position)) for label, position in zip(labels, positions)]
    guidance = Guidance("superclass", cfg_scale, channels=cfg_channels)
    return sample_keyed(model, labels, keys, guidance, sampler=sampler, steps=steps, progress=progress)


def sample_latents_official(model, labels, *, seed, cfg_scale, steps=250, cfg_channels=3, progress=False):
    """As the official `sample.py`: one global stream set by `seed`, drawn for both halves of the guided batch."""
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


def to_uint8(images):
    """(N, 3, H, W) in [-1, 1] -> uint8, rounded."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()


def check_finite_images(images, names):
    """ValueError where an image of (n, 3, H, W) is not finite; `names`: what to call each."""
    bad = (~images.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise ValueError(
            f"{names[bad[0]]} is not finite, expected pixels: check --ckpt and --cfg-scale and, where they are given, "
            "--mixed-precision and --tf32."
        )
