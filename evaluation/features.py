"""The networks whose features the evaluation compares: Inception, LPIPS, timm models, TorchScript modules, classifiers.

Each is called with uint8 images (n, 3, H, W) on its device and returns a dict of float32 tensors: "features" (n, d) or
"logits" (n, classes), Inception both. Weights come from a local file, else from TORCH_HOME, else they are downloaded.
"""

import io
import re
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import lpips
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from checkpoint.torch_files import RETRY_HINT, check_file, check_finite, read_tensors
from runtime.files import sha256

RESIZES = {
    "tf1": "bilinear, corners aligned at the top left, as TensorFlow 1: torch-fidelity, ADM, the FID literature",
    "pytorch": "bilinear, half-pixel centres, no antialiasing: pytorch-fid",
    "clean": "bicubic, antialiased: clean-fid (arXiv 2104.11222)",
}
PUBLISHED = {  # what: address, and names that the same file has elsewhere; the name ends in the SHA-256's first digits
    "inception": (URL_INCEPTION_V3, "pt_inception-2015-12-05-6726825d.pth"),
    "lpips-trunk": ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",),
}
LPIPS_LEAST = 31  # pixels, under which AlexNet's feature maps vanish
SPATIAL_CHANNELS = 7  # of ADM's spatial features, 7 x 17 x 17


@dataclass(eq=False)
class Network:
    """`module` on its device; `record`: what its numbers depend on, for the result's JSON and for saved statistics."""

    name: str
    module: nn.Module
    record: dict = field(default_factory=dict)

    @torch.inference_mode()
    def __call__(self, images):
        return self.module(images)


# ---- weights -------------------------------------------------------------------------------------


def published_prefix(what):
    """First digits of the SHA-256 of the published file."""
    return re.search(r"-([0-9a-f]{8})\.pth$", PUBLISHED[what][0])[1]


def not_comparable(network):
    """Why its figures do not compare with published ones, None if they do."""
    weights, what = network.record["weights"], {"inception": "inception", "lpips": "lpips-trunk"}.get(network.name)
    if weights == "random":
        return f"the weights of {network.name} are random"
    if what and not weights.startswith(published_prefix(what)):
        return f"the weights of {network.name} have the SHA-256 {weights[:8]}…, the published ones {published_prefix(what)}…"


def find_weights(what, given):
    """Path of the weights "inception" or "lpips-trunk": the `given` one, else in TORCH_HOME, else downloaded to it."""
    if given:
        return Path(given)
    url, *others = PUBLISHED[what]
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    paths = [folder / name for name in (url.rsplit("/", 1)[1], *others)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        path = paths[0]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=published_prefix(what))
        except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: another hash
            reason = getattr(error, "reason", None) or error
            raise ValueError(
                f"{url} could not be downloaded ({reason}), expected the weights: fetch it elsewhere and pass it as "
                f"--{what}."
            ) from None
    found, expected = sha256(path), published_prefix(what)
    if not found.startswith(expected):
        raise ValueError(
            f"{path} has the SHA-256 {found[:8]}…, expected {expected}…: delete it, or pass a file as --{what}."
        )
    return path


def read_weights(path):
    """{name: tensor} of a safetensors file or of what `torch.save` wrote; no code in it is run."""
    check_file(path)
    try:
        ours = Path(path).suffix == ".safetensors"
        tensors = load_file(path) if ours else read_tensors(path, ("state_dict", "model"))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}), expected a safetensors file: {RETRY_HINT}.") from None
    check_finite(tensors, path)
    return tensors


def load(module, tensors, path, what):
    """Put `tensors` into the module, all and no others."""
    own = module.state_dict()
    kinds = [
        name for name, t in tensors.items() if name in own and own[name].is_floating_point() > t.is_floating_point()
    ]
    if kinds:
        raise ValueError(
            f"{path} has {kinds[0]} of {tensors[kinds[0]].dtype}, expected floating-point weights: name another file."
        )
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split(":", 1)[-1].split())[:120]
        raise ValueError(f"{path} does not fit {what} ({reason}…): name another file.") from None


@torch.no_grad()
def fill_randomly(module):
    """Weights that keep the size of a signal, the same at every call: for trying the program, not for figures."""
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        if p.ndim > 1:
            p.normal_(std=(2 / p[0].numel()) ** 0.5, generator=generator)
        elif name.endswith("bias"):
            p.zero_()


def finish(name, module, path, device, **choices):
    module = module.to(device).eval().requires_grad_(False)
    return Network(name, module, {"name": name, "weights": sha256(path) if path else "random", **choices})


# ---- Inception -----------------------------------------------------------------------------------


class Inception(nn.Module):
    """The Inception of the FID literature, in torch-fidelity's form: "features" (n, 2048) after the last pooling,
    "logits" (n, 1008) without the bias, as the Inception score takes them, and with `spatial` ADM's (n, 2023)."""

    def __init__(self, resize="tf1", spatial=False):
        super().__init__()
        self.resize, self.spatial = resize, spatial
        self.net = Unfilled("inception", ["2048", "logits_unbiased"], empty_file())

    def forward(self, images):
        x, found = self.scaled(images), {}
        for name, layer in self.net.named_children():
            if name == "fc":
                break
            if name == "Mixed_6d" and self.spatial:  # "mixed_6/conv:0" of the TensorFlow graph
                maps = layer.branch1x1(x)[:, :SPATIAL_CHANNELS]
                found["spatial"] = maps.permute(0, 2, 3, 1).flatten(1)
            x = layer(x)
        found["features"] = x.flatten(1)
        found["logits"] = found["features"].mm(self.net.fc.weight.T)
        return found

    def scaled(self, images):
        """uint8 (n, 3, H, W) -> float32 (n, 3, 299, 299), about [-1, 1]"""
        size = (FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE,) * 2
        x = images.float()
        if self.resize == "tf1":
            return (interpolate_bilinear_2d_like_tensorflow1x(x, size, align_corners=False) - 128) / 128
        if self.resize == "pytorch":
            return 2 * F.interpolate(x / 255, size, mode="bilinear", align_corners=False) - 1
        x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
        return (x - 128) / 128


class Unfilled(FeatureExtractorInceptionV3):
    """torch-fidelity's network without its loading, which would unpickle a file that is not checked."""

    filled = False

    def load_state_dict(self, tensors, *args, **kwargs):
        if tensors:
            return super().load_state_dict(tensors, *args, **kwargs)


def empty_file():
    file = io.BytesIO()
    torch.save({}, file)
    file.seek(0)
    return file


def inception(path=None, resize="tf1", spatial=False, device="cpu"):
    """The Inception with the weights at `path`, random ones without."""
    module = Inception(resize, spatial)
    if path:
        load(module.net, read_weights(path), path, "torch-fidelity's Inception")
    else:
        fill_randomly(module)
    return finish("inception", module, path, device, resize=resize)


# ---- LPIPS ---------------------------------------------------------------------------------------


class LpipsFeatures(nn.Module):
    """ "features" f (n, d) with |f_i - f_j|^2 = the LPIPS distance (arXiv 1801.03924, AlexNet, version 0.1) of images i, j.

    LPIPS is sum_l mean_hw sum_c w_lc (a_lchw - b_lchw)^2 of feature maps of unit length; w is not negative, so that
    f = the maps times sqrt(w / (h w)), stacked.
    """

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():  # of torchvision's older interface
            warnings.simplefilter("ignore", UserWarning)
            self.net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        assert all((lin.model[-1].weight >= 0).all() for lin in self.net.lins)

    def forward(self, images):
        if min(images.shape[2:]) < LPIPS_LEAST:
            raise ValueError(
                f"The images have {images.shape[3]} x {images.shape[2]} pixels, expected {LPIPS_LEAST} or more for LPIPS: "
                "leave it out with --lpips-trunk none."
            )
        maps = self.net.net(self.net.scaling_layer(images.float() / 127.5 - 1))
        parts = []
        for x, lin in zip(maps, self.net.lins):
            weight = lin.model[-1].weight / (x.shape[2] * x.shape[3])
            parts.append((lpips.normalize_tensor(x) * weight.sqrt()).flatten(1))
        return {"features": torch.cat(parts, dim=1)}


def lpips_features(path=None, device="cpu"):
    """LPIPS with torchvision's AlexNet at `path` as its trunk, a random one without."""
    module = LpipsFeatures()
    trunk = module.net.net
    if path:
        tensors = read_weights(path)
        own = {
            name: f"features.{name.split('.', 1)[1]}" for name in trunk.state_dict()
        }  # slice2.3.bias: features.3.bias
        missing = [name for name in own.values() if name not in tensors]
        if missing:
            raise ValueError(f"{path} lacks {missing[0]}, expected torchvision's AlexNet: name another file.")
        load(trunk, {name: tensors[source] for name, source in own.items()}, path, "torchvision's AlexNet")
    else:
        fill_randomly(trunk)
    return finish("lpips", module, path, device, net="alex", version="0.1")


# ---- networks that the user names ----------------------------------------------------------------


class TimmNetwork(nn.Module):
    """A timm model behind an antialiased resize to its own input size and its own normalisation."""

    def __init__(self, model, size, key):
        super().__init__()
        config = timm.data.resolve_model_data_config(model)
        self.model, self.key, self.size = model, key, (size or config["input_size"][-1],) * 2
        self.mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name])[:, None, None])

    def forward(self, images):
        x = F.interpolate(images.float(), self.size, mode=self.mode, align_corners=False, antialias=True)
        x = self.model.forward_features((x.clamp(0, 255) / 255 - self.mean) / self.std)
        return {self.key: self.model.forward_head(x, pre_logits=self.key == "features")}


class ScriptNetwork(nn.Module):
    """A TorchScript module that maps uint8 (n, 3, H, W) to (n, d)."""

    def __init__(self, path, key):
        super().__init__()
        self.path, self.key = path, key
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model = torch.jit.load(path, map_location="cpu")
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().split("\n")[0][:100]
            raise ValueError(
                f"{path} cannot be read as TorchScript ({reason}): name another file, or MODEL=FILE."
            ) from None

    def forward(self, images):
        found = self.model(images)
        if not torch.is_tensor(found) or found.ndim != 2 or len(found) != len(images):
            shape = tuple(found.shape) if torch.is_tensor(found) else type(found).__name__
            raise ValueError(
                f"{self.path} returns {shape} for {len(images)} images, expected (images, numbers): change it."
            )
        return {self.key: found.float()}


def named_network(spec, key="features", random=False, device="cpu"):
    """The network that `--features` or `--classifier` names: `MODEL[@SIZE]=FILE`, a timm model with the side of its input
    and its weights (`MODEL[@SIZE]` alone if `random`), or the path of a TorchScript file. `key`: "features" or "logits"."""
    name, _, path = spec.rpartition("=")
    if not name and not (random and not Path(spec).exists()):
        return finish(Path(spec).stem, ScriptNetwork(spec, key), spec, device)
    name, path = (name, path) if name else (spec, None)
    model, at, size = name.partition("@")
    if not timm.is_model(model) or path == "" or not re.fullmatch("[1-9][0-9]*" if at else "", size):
        raise ValueError(f"{spec!r} names no timm model, expected MODEL=FILE, MODEL@SIZE=FILE or a TorchScript file.")
    tensors = read_weights(path) if path else None
    return finish(name, timm_network(model, int(size or 0), key, tensors, path), path, device)


def timm_network(model, size, key, tensors, path):
    sizes, head = {}, timm.get_pretrained_cfg(model).classifier
    if tensors is not None and isinstance(head, str):  # as many classes as the file has, none where it has no head
        weight = tensors.get(f"{head}.weight")
        sizes["num_classes"] = 0 if weight is None else len(weight)
    try:
        net = timm.create_model(model, pretrained=False, **sizes, **({"img_size": size} if size else {}))
    except TypeError:  # a convolutional network takes any size
        net = timm.create_model(model, pretrained=False, **sizes)
    if tensors is None:
        fill_randomly(net)
    else:
        # for a vision transformer: published names to timm's, and the position embedding to another size
        convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        load(net, convert(tensors, net) if convert else tensors, path, f"timm's {model}")
    return TimmNetwork(net, size, key)
