"""Cached latents of four images."""

import numpy as np
import torch
from helpers.tiny_models import THREE_PETS

from dataset import latents

NAMES = ["beagle/1.png", "beagle/2.png", "manx/ü\r\u2028.png", "pug/\udcff.png"]  # the last is not UTF-8


def write_latents(root, seed=0, **changes):
    """Write latents of 4 images in 2 chunks, the second image replaced by the first; return the moments."""
    moments = np.random.default_rng(seed).standard_normal((4, 2, 8, 3, 3)).astype(np.float16)
    info = dict(images=4, flips=2, channels=4, size=3, chunk=3, image_list="abc")
    info |= dict(hierarchy=THREE_PETS.to_dict()) | changes
    root.mkdir(exist_ok=True)
    latents.create_moments_file(root, info)
    np.save(root / "moments.npy", moments)
    hashes = [latents.chunk_hash(root, info, k) for k in range(2)]
    latents.write_metadata(root, info, NAMES, torch.tensor([0, 0, 1, 2]), hashes, skipped=[(1, 0)])
    return moments
