"""Real images that sample_ddp.py varies (SDEdit, arXiv 2108.01073)."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from autoencoder import Autoencoder
from dataset.images import image_tensor, read_crop
from dataset.listing import list_files
from hierarchy import Hierarchy
from runtime.text import shorten


class InitImages:
    """The images of a folder by class. Image `position` of a class is its sorted file number `position` modulo their count.

    folder     in any layout of a data set; classes may be absent
    hierarchy  of the model
    wanted     labels of the images to sample

    Raises ValueError if one of these classes has no image in the folder.
    """

    def __init__(self, folder: str | os.PathLike, hierarchy: Hierarchy, wanted: Sequence[int]):
        listing = list_files(folder, hierarchy, partial=True)
        self.root, self.files = Path(listing.root), [[] for _ in hierarchy.classes]
        for path, label in zip(listing.paths, listing.labels):
            self.files[label].append(path)
        missing = [hierarchy.classes[label] for label in np.unique(wanted) if not self.files[label]]
        if missing:
            raise ValueError(
                f"{folder} has no images of {len(missing)} classes that are to be sampled ({shorten(missing)}), expected at "
                "least one for each: add some, or name another --init-images."
            )

    def path(self, label: int, position: int) -> Path:
        """Return the file that image `position` of a class varies."""
        files = self.files[label]
        return self.root / files[position % len(files)]

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the files' names and sizes, by class."""
        sizes = [[(path, (self.root / path).stat().st_size) for path in files] for files in self.files]
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()

    def latents(
        self,
        labels: Sequence[int],
        positions: Sequence[int],
        image_size: int,
        autoencoder: Autoencoder,
        device: str | torch.device,
    ) -> torch.Tensor:
        """Return the mean latents (N, C, h, w) of the centre crops of N images. Raises ValueError if one cannot be read."""
        crops = [read_crop(self.path(label, k), image_size) for label, k in zip(labels, positions)]
        images = torch.stack([image_tensor(np.array(crop)) for crop in crops])
        return autoencoder.encode_moments(images.to(device))[0]
