"""Find files of weights, and download DiT's two checkpoints."""

import http.client
import os
import urllib.request
from pathlib import Path

from runtime.files import atomic_write, sha256
from runtime.progress import progress_bar
from runtime.text import one_line

DIT_URL = "https://dl.fbaipublicfiles.com/DiT/models/"
DIT_FILES = {  # name: SHA-256, or None if it is not known
    "DiT-XL-2-256x256.pt": "9ec1876e4c03471bca126663a30e2d1b20610b6d2f87850a39a36f25cc685521",
    "DiT-XL-2-512x512.pt": None,
}
RELEASED = {  # checkpoints of the official release: name: where to get it
    "FineDiffusion-iNat.pt": "https://drive.google.com/file/d/1BdwaIgSrAhI6qSuJkkSOtVrVNh-puNwC/view",
    "FineDiffusion-iNat-512.pt": "https://drive.google.com/file/d/1EjMxlp3GbBkiNf9ObtTzT7aiAwc3qoDf/view",
    "FineDiffusion-VegFru.pt": "https://drive.google.com/file/d/1YZm83UnNbYdM-sw1vBcacc8DUa7r7uD_/view",
}
DIT_FOLDER = Path("pretrained_models")


def find_weights(name: str | os.PathLike) -> Path:
    """Return the path of a file of weights; DiT's two checkpoints are downloaded to `pretrained_models/` if absent."""
    path = Path(name)
    if path.is_file() or path.name not in DIT_FILES:
        return path
    path = DIT_FOLDER / path.name
    if not path.is_file():
        atomic_write(path, lambda part: download_file(DIT_URL + path.name, part, DIT_FILES[path.name]))
    return path


def where_to_get(path: str | os.PathLike) -> str:
    """Return what to do if there is no file of weights at `path`."""
    url = RELEASED.get(Path(path).name)
    return f"download it from {url} to this path" if url else "check the path"


def find_starting_weights(resume: str | None, model: str, image_size: int) -> Path | None:
    """Return the path of the weights that a new run starts from: --resume, or else DiT's checkpoint; None for "none".

    Raises ValueError if --resume is not given and there is no published checkpoint of this model and size.
    """
    if resume == "none":
        return None
    default = f"DiT-XL-2-{image_size}x{image_size}.pt"
    if resume is None and (model != "DiT-XL/2" or default not in DIT_FILES):
        raise ValueError(
            f"There is no published {model} of {image_size} pixels to start from: pass --resume FILE, or "
            "--resume none to start from random weights."
        )
    return find_weights(resume or default)


def download_file(url: str, path: Path, known: str | None = None, advice: str = "fetch it elsewhere and pass its path"):
    """Download a file over https (or http, for an http url) with a progress bar; call it through `atomic_write`.

    known: the file's SHA-256 in hex, or its first digits
    advice: end of the error message

    Raises ValueError if the server fails, redirects to another scheme, or sends an incomplete file or another SHA-256.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "FineDiffusion"})  # some servers refuse urllib's own
    try:
        with urllib.request.urlopen(request, timeout=60) as reply, open(path, "wb") as file:
            if reply.url.split(":")[0] != url.split(":")[0]:
                raise OSError(f"it was moved to {reply.url}")
            size = int(reply.headers["Content-Length"] or 0)
            with progress_bar(total=size, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[1]) as bar:
                while block := reply.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
        if not 0 < size == path.stat().st_size:
            raise OSError(f"it ended after {path.stat().st_size} of {size or 'an unknown number of'} bytes")
        if known and not sha256(path).startswith(known):
            raise OSError(f"its SHA-256 is {sha256(path)[:12]}…, expected {known[:12]}…")
    except (OSError, http.client.HTTPException) as error:  # OSError: urllib's errors too
        raise ValueError(f"{url} could not be downloaded ({one_line(error)}): {advice}.") from None
