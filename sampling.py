"""From labels to images: a noise stream per image, guidance, the sampler, and the decoding.

Shapes: N images, latents (N, C, h, w); labels (N,) rows of the class table.
"""

import hashlib

import torch

from diffusion import create_diffusion

SAMPLERS = ("ddpm", "ddim")


def noise_streams(seed, labels, positions):
    """One CPU generator per image, set by (seed, class, position) alone: no batch and no device changes a picture."""
    streams = []
    for label, position in zip(labels, positions):
        digest = hashlib.blake2b(f"{seed} {label} {position}".encode(), digest_size=8).digest()
        # torch's CPU generator is a Mersenne twister seeded by 32 bits
        streams.append(torch.Generator().manual_seed(int.from_bytes(digest[:4], "big")))
    return streams


def draw(streams, shape, device):
    """Standard normal (N, *shape), the i-th from the i-th stream."""
    return torch.stack([torch.randn(shape, generator=g) for g in streams]).to(device)


def superclass_guidance(model, labels, scale, channels=3):
    """The model as `f(x, t)` of N images under superclass guidance (arXiv 2402.18331, eq. 1):

    eps = eps(x|p) + scale * (eps(x|c) - eps(x|p)), p the superclass of class c, or the null class of a plain DiT.

    Guides the first `channels` channels (3 as in the official code, or "all"); the rest is the class's own. Scale 1
    is the class alone, with one forward pass of N rather than of 2N.
    """
    if scale == 1:
        return lambda x, t: model(x, t, labels)
    rows = torch.cat([labels, model.y_embedder.superclass_rows(labels)])

    def guided(x, t):
        out = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), rows, scale, channels)
        return out[: len(x)]

    return guided


def sample_latents(
    model, labels, positions, *, seed, cfg_scale, steps=250, sampler="ddpm", cfg_channels=3, progress=False
):
    """Latents (N, C, h, w) of `labels` (N,), image i from the noise stream (seed, labels[i], positions[i]).

    `sampler`: "ddpm" (arXiv 2006.11239) or "ddim" (arXiv 2010.02502, eta 0), with `steps` evenly spaced of the 1000
    timesteps.
    """
    device = model.pos_embed.device
    labels = torch.as_tensor(labels, device=device)
    streams = noise_streams(seed, labels.tolist(), positions)
    shape = (model.in_channels, model.input_size, model.input_size)
    diffusion = create_diffusion(str(steps))
    loop = {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop}[sampler]
    # the last step's noise, and all of DDIM's, is multiplied by zero
    idle = torch.zeros(len(labels), *shape, device=device)
    return loop(
        superclass_guidance(model, labels, cfg_scale, cfg_channels),
        idle.shape,
        draw(streams, shape, device),
        clip_denoised=False,
        progress=progress,
        device=device,
        step_noise=lambda x, i: idle if i == 0 or sampler == "ddim" else draw(streams, shape, device),
    )


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
