"""Networks that the evaluation compares images by: Inception and LPIPS; those of the user are in named_networks.py.

Each is called with uint8 images (n, 3, H, W) on its device and returns a dict of float32 tensors: "features" (n, d),
"logits" (n, classes), or both.
"""

import io
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import lpips
import torch
from torch import nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from evaluation.weights import fill_randomly, load_strictly, published_digits, read_network_weights
from runtime.files import sha256

RESIZES = {
    "tf1": "bilinear, top-left corners aligned, as in TensorFlow 1: torch-fidelity, ADM, the FID literature",
    "pytorch": "bilinear, half-pixel centres, no antialiasing: pytorch-fid",
    "clean": "bicubic, antialiased: clean-fid (arXiv 2104.11222)",
}
LPIPS_MIN_SIZE = 31  # pixels; AlexNet's last feature maps are empty below it
SPATIAL_CHANNELS = 7  # channels of ADM's spatial features, which are 7 x 17 x 17


@dataclass(eq=False)
class Network:
    """A named module on its device.

    record: everything its features depend on, for metrics.json and saved statistics: "name", "weights" (SHA-256 or
            "random") and options such as "resize"
    classes: names of a classifier's outputs, None if unknown
    classes_file: the file that the user made of them, None if they came with the weights
    """

    name: str
    module: nn.Module | None  # None if its features are only known from saved statistics
    record: dict = field(default_factory=dict)
    classes: list[str] | None = None
    classes_file: Path | None = None

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 images (n, 3, H, W) -> {"features": (n, d), "logits": (n, classes)}, or one of the two."""
        return self.module(images)


def make_network(
    name: str, module: nn.Module, path: str | os.PathLike | None, device: str | torch.device, **options
) -> Network:
    """Return a frozen `Network` on `device`; `path`: its weights, None if they are random."""
    module = module.to(device).eval().requires_grad_(False)
    return Network(name, module, {"name": name, "weights": sha256(path) if path else "random", **options})


def why_not_comparable(network: Network) -> str | None:
    """Return why metrics of this network do not compare with published ones, None if they do."""
    weights = network.record["weights"]
    if weights == "random":
        return f"the weights of {network.name} are random"
    published = {"inception": "inception", "lpips": "lpips-trunk"}.get(network.name) or network.record.get("preset")
    if published and not weights.startswith(digits := published_digits(published)):
        return f"the weights of {network.name} have the SHA-256 {weights[:8]}…, the published ones {digits[:8]}…"


# ---- Inception -----------------------------------------------------------------------------------


class Inception(nn.Module):
    """The Inception network of the FID literature, in torch-fidelity's form.

    uint8 (n, 3, H, W) -> "features" (n, 2048) after the last pooling, "logits" (n, 1008) without the bias, as the
    Inception score takes them, and if `spatial` ADM's "spatial" (n, 2023).

    resize: a key of RESIZES
    """

    def __init__(self, resize: str = "tf1", spatial: bool = False):
        super().__init__()
        self.resize, self.spatial = resize, spatial
        self.net = UnloadedInception("inception", ["2048", "logits_unbiased"], empty_file())

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x, outputs = self.scale(images), {}
        for name, layer in self.net.named_children():
            if name == "fc":
                break
            if name == "Mixed_6d" and self.spatial:  # "mixed_6/conv:0" of the TensorFlow graph
                maps = layer.branch1x1(x)[:, :SPATIAL_CHANNELS]
                outputs["spatial"] = maps.permute(0, 2, 3, 1).flatten(1)
            x = layer(x)
        outputs["features"] = x.flatten(1)
        outputs["logits"] = outputs["features"].mm(self.net.fc.weight.T)
        return outputs

    def scale(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (n, 3, H, W) -> float32 (n, 3, 299, 299), about [-1, 1]"""
        size = (FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE,) * 2
        x = images.float()
        if self.resize == "tf1":
            return (interpolate_bilinear_2d_like_tensorflow1x(x, size, align_corners=False) - 128) / 128
        if self.resize == "pytorch":
            return 2 * F.interpolate(x / 255, size, mode="bilinear", align_corners=False) - 1
        x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
        return (x - 128) / 128


class UnloadedInception(FeatureExtractorInceptionV3):
    """torch-fidelity's network without its own loading, which would unpickle an unchecked file."""

    def load_state_dict(self, tensors, *args, **kwargs):
        if tensors:  # its constructor passes the empty dict of `empty_file`
            return super().load_state_dict(tensors, *args, **kwargs)


def empty_file() -> io.BytesIO:
    """Return an in-memory `torch.save` file of an empty dict."""
    file = io.BytesIO()
    torch.save({}, file)
    file.seek(0)
    return file


def inception(
    path: str | os.PathLike | None = None,
    resize: str = "tf1",
    spatial: bool = False,
    device: str | torch.device = "cpu",
) -> Network:
    """Return `Inception` with the weights at `path`, random ones if None."""
    module = Inception(resize, spatial)
    if path:
        load_strictly(module.net, read_network_weights(path), path, "torch-fidelity's Inception")
    else:
        fill_randomly(module)
    return make_network("inception", module, path, device, resize=resize)


# ---- LPIPS ---------------------------------------------------------------------------------------


class LpipsFeatures(nn.Module):
    """uint8 (n, 3, H, W) -> "features" f (n, d), with |f_i - f_j|^2 the LPIPS distance of images i and j.

    LPIPS (arXiv 1801.03924, AlexNet, version 0.1) is sum_l mean_hw sum_c w_lc (a_lchw - b_lchw)^2 of unit-length feature
    maps a, b. Since w >= 0, f is the feature maps times sqrt(w / (h w)), flattened and concatenated over layers.
    """

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():  # torchvision warns about its older interface
            warnings.simplefilter("ignore", UserWarning)
            self.net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        assert all((lin.model[-1].weight >= 0).all() for lin in self.net.lins)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if min(images.shape[2:]) < LPIPS_MIN_SIZE:
            raise ValueError(
                f"The images have {images.shape[3]} x {images.shape[2]} pixels, expected {LPIPS_MIN_SIZE} or more for LPIPS: "
                "leave it out with --lpips-trunk none."
            )
        maps = self.net.net(self.net.scaling_layer(images.float() / 127.5 - 1))
        parts = []
        for x, lin in zip(maps, self.net.lins):
            weight = lin.model[-1].weight / (x.shape[2] * x.shape[3])
            parts.append((lpips.normalize_tensor(x) * weight.sqrt()).flatten(1))
        return {"features": torch.cat(parts, dim=1)}


def lpips_features(path: str | os.PathLike | None = None, device: str | torch.device = "cpu") -> Network:
    """Return `LpipsFeatures` with torchvision's AlexNet at `path` as its trunk, a random trunk if None."""
    module = LpipsFeatures()
    trunk = module.net.net
    if path:
        tensors = read_network_weights(path)
        # LPIPS's slice2.3.bias is torchvision's features.3.bias
        sources = {name: f"features.{name.split('.', 1)[1]}" for name in trunk.state_dict()}
        missing = [source for source in sources.values() if source not in tensors]
        if missing:
            raise ValueError(f"{path} lacks {missing[0]}, expected torchvision's AlexNet: name another file.")
        renamed = {name: tensors[source] for name, source in sources.items()}
        load_strictly(trunk, renamed, path, "torchvision's AlexNet")
    else:
        fill_randomly(trunk)
    return make_network("lpips", module, path, device, net="alex", version="0.1")
