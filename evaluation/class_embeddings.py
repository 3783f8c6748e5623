"""A vision-language model as the classifier: its image tower, and the embeddings of the class names by its text tower.

The logit of an image for a class is a scale times the cosine of their embeddings, as in CLIP (arXiv 2103.00020). The
embeddings are in a safetensors file that tools/class_embeddings.py writes:

    embeddings  float32 (classes, d), rows of length 1
    metadata    "json": {"format", "names": of the classes, "logit_scale": factor of the cosine, "quick_gelu": activation of
                the towers, "input": mean, std, input_size and interpolation of the images, "model": whose text tower it was}
"""

import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from evaluation.features import Network
from evaluation.named_networks import INPUT_KEYS, named_network
from runtime.files import atomic_write, sha256
from runtime.text import one_line

FORMAT = "finediffusion-class-embeddings-1"
LENGTH = 1e-3  # error of the length of an embedding that is accepted


def save_class_embeddings(path: str | os.PathLike, embeddings: torch.Tensor, record: dict):
    """Write a file of class embeddings (classes, d), see the module docstring; record: its "json" without "format"."""
    metadata = {"json": json.dumps({"format": FORMAT, **record})}
    arrays = {"embeddings": embeddings.float().contiguous()}
    atomic_write(path, lambda part: save_file(arrays, part, metadata))


def read_class_embeddings(path: str | os.PathLike) -> tuple[torch.Tensor, dict]:
    """Return the embeddings, float32 (classes, d), and the record of a file.

    Raises ValueError if the file is absent, damaged or another one, or if the embeddings are not of length 1.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}, expected one of tools.class_embeddings: check the path.")
    try:
        with safe_open(path, "pt") as file:
            embeddings, record = file.get_tensor("embeddings"), json.loads((file.metadata() or {})["json"])
        names, scaling = record["names"], record["input"]
        if record["format"] != FORMAT or embeddings.shape != (len(names), embeddings.shape[1]):
            raise ValueError(f"{len(names)} names and embeddings {tuple(embeddings.shape)}")
        if not (len(set(names)) == len(names) and all(isinstance(name, str) for name in names)):
            raise ValueError("the names are not different ones")
        if not math.isfinite(record["logit_scale"]) or not scaling.keys() >= set(INPUT_KEYS):
            raise ValueError("the scale of the logits or of the input is absent")
        lengths = torch.linalg.vector_norm(embeddings.float(), dim=1)
        if not (abs(lengths - 1) < LENGTH).all():
            raise ValueError("an embedding is not of length 1")
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a file of class embeddings ({one_line(error)}), expected one of tools.class_embeddings: write it "
            "again."
        ) from None
    return embeddings.float(), record


class EmbeddingClassifier(nn.Module):
    """uint8 (n, 3, H, W) -> "logits" (n, classes): scale times the cosines of image and class embeddings.

    tower: uint8 images -> {"logits": embeddings (n, d)}
    embeddings: (classes, d), rows of length 1
    path: of the embeddings, for messages
    """

    def __init__(self, tower: nn.Module, embeddings: torch.Tensor, scale: float, path: str | os.PathLike):
        super().__init__()
        self.tower, self.scale, self.path = tower, scale, path
        self.register_buffer("embeddings", embeddings)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.tower(images)["logits"]
        if x.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"{self.path} has embeddings of {self.embeddings.shape[1]} values, expected the {x.shape[1]} of the image tower: "
                "name the model that they were made with."
            )
        return {"logits": self.scale * F.normalize(x, dim=1) @ self.embeddings.T}


def embedding_classifier(
    spec: str, path: str | os.PathLike, random: bool = False, device: str | torch.device = "cpu"
) -> Network:
    """Return the classifier of an image tower and a file of class embeddings.

    spec: the image tower, as for `named_networks.named_network`; the weights may be those of a complete CLIP of open_clip
    path: the embeddings

    Raises ValueError as `read_class_embeddings` and `named_network` do, and if the tower has another activation.
    """
    embeddings, record = read_class_embeddings(path)
    tower = named_network(spec, "logits", random, device, record["input"], embeddings.shape[1])
    model = spec.rpartition("=")[0]
    if "_clip_" in model and ("quickgelu" in model) != bool(record.get("quick_gelu")):
        found = "has" if record.get("quick_gelu") else "lacks"
        raise ValueError(
            f"The text tower of {path} {found} QuickGELU, expected the same of {model}: name timm's model with "
            f"{'quickgelu' if record.get('quick_gelu') else 'clip alone'} in its name."
        )
    module = EmbeddingClassifier(tower.module, embeddings, record["logit_scale"], path).to(device).eval()
    options = {"class_embeddings": sha256(path)}
    return Network(tower.name, module.requires_grad_(False), tower.record | options, record["names"], Path(path))
