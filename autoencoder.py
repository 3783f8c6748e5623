"""The autoencoder between pixels and latents, and its scale; or none, for a model that works on pixels.

Images are (N, 3, H, W) in [-1, 1]; latents are (N, C, H/f, W/f), scaled to about unit variance (arXiv 2112.10752,
section 4.3.2).
"""

import warnings
from pathlib import Path

import torch

SD_SCALE = 0.18215  # of the Stable Diffusion autoencoders that DiT was trained with
PUBLISHED = {  # repository, and its commit: nothing else is downloaded, whatever a file names
    "ema": ("stabilityai/sd-vae-ft-ema", "f04b2c4b98319346dad8c65879f680b1997b204a"),
    "mse": ("stabilityai/sd-vae-ft-mse", "31f26fdeee1355a5c34592e401dd41e45d25a493"),
}


class Autoencoder:
    """A frozen diffusers `AutoencoderKL`; `vae=None` is the identity on pixels.

    `channels`: C of the latents; `downscale`: f; `scale`: what the latents were multiplied by.
    """

    def __init__(self, vae=None, scale=1.0):
        self.vae = vae
        self.channels = 3 if vae is None else vae.config.latent_channels
        self.downscale = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.dtype = torch.float32 if vae is None else vae.dtype
        self.scale = scale
        if self.dtype != torch.float32:
            vae.to(memory_format=torch.channels_last)  # as tensor cores take it

    def latent_size(self, image_size):
        """Side of the latent of an image of side `image_size`; ValueError where it does not divide."""
        if image_size < 1 or image_size % self.downscale:
            raise ValueError(
                f"The image size is {image_size}, expected a multiple of {self.downscale}, by which the autoencoder "
                "shrinks: choose another --image-size."
            )
        return image_size // self.downscale

    @torch.no_grad()
    def encode_moments(self, images):
        """Images -> mean and standard deviation of the scaled latents, float32."""
        if self.vae is None:
            return images, torch.zeros_like(images)
        posterior = self.vae.encode(images.to(self.dtype)).latent_dist
        return posterior.mean.float() * self.scale, posterior.std.float() * self.scale

    @torch.no_grad()
    def decode(self, latents):
        """Scaled latents -> images, float32, not clamped."""
        if self.vae is None:
            return latents
        return self.vae.decode(latents.to(self.dtype) / self.scale).sample.float()


def load_autoencoder(name, device="cpu", dtype=torch.float32):
    """`name`: "ema" or "mse" (downloaded by diffusers when absent), a folder in diffusers' form, or "none".

    It computes in `dtype` where its precision allows: the published two do, a folder's where its config.json has
    `force_upcast` false; others stay float32. ValueError where it can neither be read nor be downloaded.
    """
    if name == "none":
        return Autoencoder()
    from diffusers import AutoencoderKL  # slow to import; pixels do not need it

    source, commit = PUBLISHED.get(name, (name, None))
    try:
        if not commit and not Path(name).is_dir():
            raise ValueError("there is no such folder")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the hub, when it cannot be reached: said below
            config = AutoencoderKL.load_config(source, revision=commit)
            allows = name in PUBLISHED or not config.get("force_upcast", True)
            kind = dtype if allows else torch.float32
            vae = AutoencoderKL.from_pretrained(source, revision=commit, torch_dtype=kind)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"The autoencoder {source} could not be loaded ({reason}), expected {', '.join(PUBLISHED)} or a folder "
            "with config.json and weights in diffusers' form: pass such a folder as --vae."
        ) from None
    scale = SD_SCALE if name in PUBLISHED else vae.config.scaling_factor
    return Autoencoder(vae.to(device).eval().requires_grad_(False), scale)
