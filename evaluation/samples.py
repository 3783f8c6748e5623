"""The settings that sample_ddp.py writes beside its samples."""

import json
import os
from pathlib import Path

from evaluation.image_sets import Folder, ImageSet
from runtime.text import one_line


def read_sample_settings(path: str | os.PathLike) -> dict | None:
    """Read settings.json of a folder of samples, or of the folder that an .npz was made from; None if there is none."""
    path = Path(path)
    path = (path if path.is_dir() else path.with_suffix("")) / "settings.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({one_line(error)}), expected the settings that sample_ddp.py writes: restore or remove it."
        ) from None


def check_complete(images: ImageSet, settings: dict):
    """Raise ValueError if a folder of samples has another number of images than its settings say.

    images: an opened set, see `evaluation.image_sets.open_set`
    """
    expected = settings.get("num_fid_samples")
    if isinstance(images, Folder) and expected not in (None, len(images)):
        raise ValueError(
            f"{images.path} has {len(images):,} images, but sample_ddp.py was to make {expected:,}: run the same "
            "sample_ddp.py command again, which completes it, or remove the images of other runs."
        )
