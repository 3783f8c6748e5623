"""Networks that the user names with --features and --classifier: timm models and TorchScript modules.

Beside a file of weights may lie two more:

    config.json       of a timm model, as the Hugging Face Hub has it: mean, deviation and size of the input, label names
    STEM.classes.txt  beside the classifier STEM.pt, STEM.safetensors, ...: the class of each output, one per line
"""

import json
import math
import os
import re
import sys
import warnings
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn import functional as F

from evaluation.features import Network, make_network
from evaluation.weights import fill_randomly, find_network_weights, load_strictly, read_network_weights
from runtime.files import sha256
from runtime.text import one_line

# networks that need no name and no file: timm's model; weights.PUBLISHED has the file
PRESETS = {"dinov2": "vit_large_patch14_dinov2.lvd142m@224"}  # as in dgm-eval (arXiv 2306.04675)
INPUT_KEYS = ("mean", "std", "input_size", "interpolation")  # of "pretrained_cfg" in a config.json

# ---- modules -------------------------------------------------------------------------------------


class TimmNetwork(nn.Module):
    """A timm model after an antialiased resize to its input size and its own normalisation.

    uint8 (n, 3, H, W) -> {key: (n, d)}

    size: pixels per side of the input, 0 for the model's own
    key: "features" (before the head) or "logits"
    """

    def __init__(self, model: nn.Module, size: int, key: str):
        super().__init__()
        config = timm.data.resolve_model_data_config(model)
        self.model, self.key, self.size = model, key, (size or config["input_size"][-1],) * 2
        self.mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name])[:, None, None])

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = F.interpolate(images.float(), self.size, mode=self.mode, align_corners=False, antialias=True)
        x = self.model.forward_features((x.clamp(0, 255) / 255 - self.mean) / self.std)
        return {self.key: self.model.forward_head(x, pre_logits=self.key == "features")}


class ScriptNetwork(nn.Module):
    """A TorchScript module that maps uint8 (n, 3, H, W) to (n, d); returns {key: (n, d)}."""

    def __init__(self, path: str | os.PathLike, key: str):
        super().__init__()
        self.path, self.key = path, key
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model = torch.jit.load(path, map_location="cpu")
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read as TorchScript ({one_line(error, 100)}), expected a TorchScript file: "
                "name another file, or MODEL=FILE."
            ) from None

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.model(images)
        if not torch.is_tensor(x) or x.ndim != 2 or len(x) != len(images):
            shape = tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
            raise ValueError(
                f"{self.path} returns {shape} for {len(images)} images, expected ({len(images)}, dimensions): "
                "name another file."
            )
        return {self.key: x.float()}


# ---- files beside the weights --------------------------------------------------------------------


def read_config(path: str | os.PathLike, model: str) -> dict:
    """Read the config.json beside a timm model's weights; {} if there is none, or if it is of another architecture.

    model: with or without a tag

    Raises ValueError if it is damaged or does not say how the input is scaled.
    """
    file = Path(path).parent / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("architecture") != model.partition(".")[0]:
            return {}
        given = {key: config["pretrained_cfg"][key] for key in INPUT_KEYS}
        (channels, height, width), interpolation = given["input_size"], given["interpolation"]
        values = [*given["mean"], *given["std"]]
        is_scaling = len(given["mean"]) == len(given["std"]) == channels == 3 and all(map(math.isfinite, values))
        if not (is_scaling and min(given["std"]) > 0 and 0 < height == width and isinstance(interpolation, str)):
            raise ValueError(f"{INPUT_KEYS[0]} to {INPUT_KEYS[-1]} are {list(given.values())}")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged ({one_line(error)}), expected the mean, std, input_size and interpolation of {model}: download "
            "it again."
        ) from None
    names = config.get("label_names")
    names = list(names.values()) if isinstance(names, dict) else names
    is_text = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return {"input": given, "classes": names if is_text else None, "file": file}


def read_class_names(file: Path) -> list[str]:
    """Read the class names of a classifier's outputs. Raises ValueError if one is empty or occurs twice."""
    try:
        names = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError:
        names = []
    if "" in names or len(set(names)) < len(names) or not names:
        raise ValueError(f"{file} is not a list of class names, expected a different one on each line: write it again.")
    return names


# ---- loading -------------------------------------------------------------------------------------


def named_network(
    spec: str,
    key: str = "features",
    random: bool = False,
    device: str | torch.device = "cpu",
    scaling: dict | None = None,
    outputs: int | None = None,
) -> Network:
    """Return the network of a --features or --classifier value.

    spec: "MODEL[@SIZE]=FILE", a timm model, pixels per side of its input, and its weights; "MODEL[@SIZE]" if `random`;
          either after "NAME:", which names the network in the report; the path of a TorchScript file; or "PRESET" or
          "PRESET=FILE", see PRESETS
    key: "features" or "logits"
    scaling: INPUT_KEYS of a timm model; if None, those of its config.json, or else timm's
    outputs: number of outputs of a timm model with random weights; if None, timm's

    Raises ValueError if `spec` has none of these forms, or the file is absent or does not fit.
    """
    preset, _, path = spec.partition("=")
    if preset in PRESETS and not (random and not path):
        spec = f"{preset}:{PRESETS[preset]}={find_network_weights(preset, path)}"
    elif preset in PRESETS:
        spec = f"{preset}:{PRESETS[preset]}"
    left, _, path = spec.rpartition("=")
    if not left and not (random and not Path(spec).exists()):
        network = make_network(Path(spec).stem, ScriptNetwork(spec, key), spec, device)
        return with_classes(network, spec, {}) if key == "logits" else network
    left, path = (left, path) if left else (spec, None)
    name, _, model = left.rpartition(":")
    model, at, size = model.partition("@")
    if not timm.is_model(model) or path == "" or not re.fullmatch("[1-9][0-9]*" if at else "", size):
        raise ValueError(
            f"{spec!r} names no timm model, expected MODEL=FILE, MODEL@SIZE=FILE, NAME:MODEL=FILE or a TorchScript file."
        )
    tensors, config = (read_network_weights(path), read_config(path, model)) if path else (None, {})
    module = timm_network(model, int(size or 0), key, tensors, path, scaling or config.get("input"), outputs)
    options = {"config": sha256(config["file"])} if config else {}
    options |= {"preset": preset} if preset in PRESETS else {}
    network = make_network(name or left, module, path, device, **options)
    return with_classes(network, path, config) if key == "logits" and path else network


def with_classes(network: Network, path: str | os.PathLike, config: dict) -> Network:
    """Set the class names of a classifier from the files beside its weights; config: of `read_config`."""
    file = Path(path).with_suffix(".classes.txt")
    if file.is_file():
        network.classes, network.classes_file = read_class_names(file), file
    else:
        network.classes = config.get("classes")
    return network


def timm_network(
    model: str,
    size: int,
    key: str,
    tensors: dict[str, torch.Tensor] | None,
    path: str | None,
    scaling: dict | None = None,
    outputs: int | None = None,
) -> TimmNetwork:
    """Build a timm model and load `tensors`, read from `path`, or random weights if None; see `TimmNetwork`.

    scaling: INPUT_KEYS of the model's config.json; if None, timm's for this model
    outputs: number of outputs with random weights; if None, timm's

    Raises ValueError if the model's tag is unknown to timm and `scaling` is None.
    """
    architecture, _, tag = model.partition(".")
    options = {"pretrained_cfg_overlay": scaling} if scaling else {}
    try:
        head = timm.get_pretrained_cfg(model).classifier
    except RuntimeError:  # an unknown tag
        if path and not scaling:
            raise ValueError(
                f"timm {timm.__version__} has no tag {tag!r} of {architecture}, expected the config.json of {model}, which has "
                f"the mean and deviation of its input: put it beside {path}."
            ) from None
        model, head = architecture, timm.get_pretrained_cfg(architecture).classifier
    if tensors is None and outputs:
        options["num_classes"] = outputs
    if tensors is not None and isinstance(head, str):  # as many classes as the file has, 0 if it has no head
        weight = tensors.get(f"{head}.weight")
        projection = tensors.get("visual.proj")  # (width, d) of a CLIP of open_clip, which timm takes for the head
        weight = projection.T if weight is None and projection is not None else weight
        options["num_classes"] = 0 if weight is None else len(weight)
    try:
        net = timm.create_model(model, pretrained=False, **options, **({"img_size": size} if size else {}))
    except TypeError:  # convolutional networks have no img_size and take any size
        net = timm.create_model(model, pretrained=False, **options)
    if tensors is None:
        fill_randomly(net)
    else:
        # for vision transformers: convert published names to timm's and resample the position embedding
        convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        load_strictly(net, convert(tensors, net) if convert else tensors, path, f"timm's {model}")
    return TimmNetwork(net, size, key)
