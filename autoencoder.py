"""The autoencoder between pixels and latents, and the scale of its latents; or none, for a model of pixels.

Images are (N, 3, H, W) in [-1, 1]; latents are (N, C, H/f, W/f), scaled to about unit variance (arXiv 2112.10752,
section 4.3.2).
"""

import hashlib
import os
import warnings
from pathlib import Path

import torch

from runtime.text import one_line

SD_SCALE = 0.18215  # scale of the Stable Diffusion autoencoders that DiT was trained with
DECODED_PIXELS = 2**19  # 8 images of 256 pixels, 2 of 512: 1.6 GiB in float32 for the published autoencoders
PUBLISHED_VAES = {  # repository and commit; nothing else is ever downloaded
    "ema": ("stabilityai/sd-vae-ft-ema", "f04b2c4b98319346dad8c65879f680b1997b204a"),
    "mse": ("stabilityai/sd-vae-ft-mse", "31f26fdeee1355a5c34592e401dd41e45d25a493"),
}


class Autoencoder:
    """A frozen autoencoder with its scale, or the identity on pixels.

    vae     a diffusers `AutoencoderKL`; None is the identity on pixels
    scale   factor that gives the latents about unit variance
    digest  of the encoder, see `hash_encoder`, taken before `vae` was rounded; None computes it when first needed

    Its attributes also are `channels`, C of the latents; `downscale`, f; and `dtype`, the one of the computation.
    """

    def __init__(self, vae: torch.nn.Module | None = None, scale: float = 1.0, digest: str | None = None):
        self.vae = vae
        self.digest = digest
        self.channels = 3 if vae is None else vae.config.latent_channels
        self.downscale = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.dtype = torch.float32 if vae is None else vae.dtype
        self.scale = scale
        if self.dtype != torch.float32:
            vae.to(memory_format=torch.channels_last)  # the layout that tensor cores are fastest with

    def latent_size(self, image_size: int) -> int:
        """Return the side of the latents of an image with side `image_size`; raise ValueError if f does not divide it."""
        if image_size < 1 or image_size % self.downscale:
            raise ValueError(
                f"The image size is {image_size}, expected a multiple of {self.downscale}, the autoencoder's downscaling: "
                "choose another --image-size."
            )
        return image_size // self.downscale

    def encoder_digest(self) -> str | None:
        """Return the digest of the encoder's weights, see `hash_encoder`; None on pixels."""
        if self.vae is not None and self.digest is None:
            self.digest = hash_encoder(self.vae)
        return self.digest

    @torch.no_grad()
    def encode_moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode images (N, 3, H, W); return mean and standard deviation of the scaled latents, float32 (N, C, H/f, W/f)."""
        if self.vae is None:
            return images, torch.zeros_like(images)
        posterior = self.vae.encode(images.to(self.dtype)).latent_dist
        return posterior.mean.float() * self.scale, posterior.std.float() * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents (N, C, H/f, W/f) to images, float32 (N, 3, H, W), not clamped to [-1, 1].

        A GPU decodes DECODED_PIXELS at a time, so that the memory does not grow with N.
        """
        if self.vae is None:
            return latents
        pixels = latents.shape[2] * latents.shape[3] * self.downscale**2
        parts = (latents.to(self.dtype) / self.scale).split(decoded_together(len(latents), pixels, latents.device))
        return torch.cat([self.vae.decode(part).sample.float() for part in parts])


def decoded_together(images: int, pixels: int, device: torch.device) -> int:
    """Return how many of `images`, with `pixels` each, a device decodes at a time: all of them on a CPU."""
    return max(1, DECODED_PIXELS // pixels) if device.type == "cuda" else images


def hash_encoder(vae: torch.nn.Module) -> str:
    """Return the SHA-256 (hex) of all that makes latents of images: the tensors of `encoder` and `quant_conv`.

    It covers names, shapes and values. The values are rounded to float16, so that a copy of the weights in float16 has
    the same digest. Autoencoders that differ only in the decoder, such as "ema" and "mse", have the same digest.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            values = tensor.float().half().cpu().contiguous().numpy()
            digest.update(f"{name} {values.shape}\n".encode())
            digest.update(values.tobytes())
    return digest.hexdigest()


def load_autoencoder(
    name: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Load an autoencoder.

    name   "ema" or "mse", which diffusers downloads once; a folder in diffusers' format; or "none", for pixels
    dtype  type of the computation. An autoencoder that would lose precision stays float32: a folder's, unless its
           config.json has `force_upcast` false

    Raises ValueError if it can neither be read nor downloaded.
    """
    if name == "none":
        return Autoencoder()
    from diffusers import AutoencoderKL  # slow to import, and not needed for pixels

    source, commit = PUBLISHED_VAES.get(name, (name, None))
    try:
        if not commit and not Path(name).is_dir():
            raise ValueError("no such folder")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # from the hub if it cannot be reached: in the message below
            config = AutoencoderKL.load_config(source, revision=commit)
            half_is_safe = name in PUBLISHED_VAES or not config.get("force_upcast", True)
            dtype = dtype if half_is_safe else torch.float32
            vae = AutoencoderKL.from_pretrained(source, revision=commit, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The autoencoder {source} could not be loaded ({one_line(error)}), expected {', '.join(PUBLISHED_VAES)} or a "
            "folder with config.json and weights in diffusers' format: pass such a folder as --vae."
        ) from None
    scale = SD_SCALE if name in PUBLISHED_VAES else vae.config.scaling_factor
    digest = None if dtype == torch.float32 else hash_encoder(vae)  # of the weights as stored
    torch.nn.Module.to(vae, device, dtype)  # diffusers' own `to` prints a warning
    return Autoencoder(vae.eval().requires_grad_(False), scale, digest)
