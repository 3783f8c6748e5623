"""The networks give the same outputs as the published programs on the same weights, and refuse files that do not fit."""

import json
import warnings

import lpips
import numpy as np
import pytest
import timm
import torch
from helpers.tiny_models import PETS, refusal
from PIL import Image
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.models import alexnet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pytorch_fid import fid_score
    from pytorch_fid import inception as pytorch_fid_inception

from evaluation import features, networks, weights
from evaluation.metrics import Gaussian, features_root, frechet_distance, gaussian_root
from evaluation.named_networks import named_network
from runtime.files import sha256


def images(n, size, seed=0):
    """uint8 (n, 3, size, size), with structure at several scales"""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    x = F.interpolate(coarse, (size, size), mode="bicubic") + 0.1 * torch.randn(n, 3, size, size, generator=generator)
    return (255 * x).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the format of the published file."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(features.inception().module.net.state_dict(), path)
    return path


# ---- Inception -----------------------------------------------------------------------------------


def test_inception_equals_torch_fidelity_bit_for_bit(inception_file):
    x = images(3, 40)
    expected = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], inception_file)(x)
    network = features.inception(inception_file, spatial=True)
    outputs = network(x)
    assert outputs["features"].equal(expected[0]) and outputs["logits"].equal(expected[1])
    assert outputs["features"].std(0).min() >= 0 and outputs["features"].std() > 0.1
    assert network.record == {
        "name": "inception",
        "weights": sha256(inception_file),
        "resize": "tf1",
    }
    # ADM's spatial features: 7 channels of the first branch of the seventh block, (17, 17, 7) in TensorFlow's order
    maps = {}
    network.module.net.Mixed_6d.branch1x1.register_forward_hook(lambda *_: maps.update(out=_[-1]))
    spatial = network(x)["spatial"].reshape(3, 17, 17, 7)
    assert spatial[1, 4, 9, 6] == maps["out"][1, 6, 4, 9] and spatial.std() > 0


def test_fid_equals_pytorch_fid_on_the_same_weights(inception_file, tmp_path, monkeypatch):
    weights = torch.load(inception_file, weights_only=True)
    monkeypatch.setattr(pytorch_fid_inception, "load_state_dict_from_url", lambda *args, **kwargs: weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = pytorch_fid_inception.InceptionV3([3])
    network = features.inception(inception_file, resize="pytorch")
    found, expected = [], []  # features (6, 2048) of two sets
    for seed in (0, 1):
        x = images(6, 48, seed) // (1 + seed)
        paths = [tmp_path / f"{seed}-{i}.png" for i in range(len(x))]
        for path, image in zip(paths, x):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        with torch.inference_mode():
            expected.append(fid_score.get_activations(paths, reference, batch_size=6, num_workers=0))
        found.append(network(x)["features"])
        np.testing.assert_allclose(found[-1], expected[-1], rtol=1e-5, atol=1e-5)
    fid = frechet_distance(*map(features_root, found))
    expected_sets = [torch.from_numpy(x).double() for x in expected]
    assert fid == pytest.approx(frechet_distance(*map(features_root, expected_sets)), rel=1e-6)
    # pytorch-fid's own formula needs covariances of full rank: take 4 of the 2,048 features
    few = [x[:, :4].double() for x in found]
    fid = frechet_distance(*(gaussian_root(Gaussian(6, x.mean(0), torch.cov(x.T))) for x in few))
    statistics = [s for x in expected for s in (x[:, :4].mean(0), np.cov(x[:, :4], rowvar=False))]
    assert fid == pytest.approx(fid_score.calculate_frechet_distance(*statistics), rel=1e-6)


def test_resizes():
    x = images(2, 37)
    scaled = {name: features.Inception(name).scale(x) for name in features.RESIZES}
    tf1 = interpolate_bilinear_2d_like_tensorflow1x(x.float(), (299, 299), align_corners=False)
    assert scaled["tf1"].equal((tf1 - 128) / 128)
    for i, channel in enumerate(x[1]):  # clean-fid uses Pillow's bicubic resize on floats
        clean = Image.fromarray(channel.numpy().astype(np.float32), mode="F").resize(
            (299, 299), Image.Resampling.BICUBIC
        )
        expected = (np.asarray(clean).clip(0, 255) - 128) / 128
        np.testing.assert_allclose(scaled["clean"][1, i], expected, atol=1e-4)
    assert (scaled["pytorch"] - scaled["clean"]).abs().max() > 0.01
    assert (scaled["pytorch"] - scaled["tf1"]).abs().max() > 0.1
    same = images(1, 299)
    for name in ("tf1", "clean"):
        torch.testing.assert_close(features.Inception(name).scale(same), (same.float() - 128) / 128)


# ---- LPIPS ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 31])
def test_distances_of_lpips_features_equal_lpips(tmp_path, size):
    torch.manual_seed(0)
    trunk = alexnet()
    torch.save(trunk.state_dict(), tmp_path / "alexnet.pth")
    network = features.lpips_features(tmp_path / "alexnet.pth")
    x = images(4, size)
    x = torch.cat([x, x[:1]])
    f = network(x)["features"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for name, p in reference.net.named_parameters():
        p.data = trunk.state_dict()[f"features.{name.split('.', 1)[1]}"]
    with torch.inference_mode():
        scaled = x / 127.5 - 1
        expected = torch.stack([reference(a[None].expand_as(scaled), scaled).flatten() for a in scaled])
    found = (f[:, None] - f).square().sum(2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found[0, 4] == 0 and found[0, 1] > 0.01 and expected.max() > 0.1


def test_images_too_small_for_lpips_are_refused():
    with refusal("30 x 30 pixels", "expected 31 or more", "--lpips-trunk none"):
        features.lpips_features()(images(1, 30))


# ---- named networks ------------------------------------------------------------------------------


def save_timm_model(tmp_path, model, **sizes):
    """Save a timm model's weights as DDP names them; return the model and the path."""
    torch.manual_seed(1)
    net = timm.create_model(model, **sizes).eval()
    path = tmp_path / f"{model}.pth"
    torch.save({"state_dict": {f"module.{name}": p for name, p in net.state_dict().items()}}, path)
    return net, path


@pytest.mark.parametrize("model, size", [("test_resnet", 160), ("test_vit", 160)])
def test_timm_model_with_local_weights(tmp_path, model, size):
    net, path = save_timm_model(tmp_path, model, num_classes=7)
    config = timm.data.resolve_model_data_config(net)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    assert config["input_size"] == (3, size, size)
    x = images(2, size)
    with torch.inference_mode():
        scaled = (x / 255 - mean) / std
        expected, logits = net.forward_head(net.forward_features(scaled), pre_logits=True), net(scaled)
    network = named_network(f"{model}={path}")
    torch.testing.assert_close(network(x)["features"], expected)
    assert network.name == model and network.record["weights"] == sha256(path)
    torch.testing.assert_close(named_network(f"{model}={path}", "logits")(x)["logits"], logits)


def test_timm_model_at_another_input_size(tmp_path):
    _, path = save_timm_model(tmp_path, "test_vit")
    x = images(2, 64)
    network = named_network(f"test_vit@64={path}")
    assert network(x)["features"].shape == (2, 64) and network.module.size == (64, 64)
    assert network.module.model.pos_embed.shape[1] == 17  # resampled to 4 x 4 patches and the class token


SCALING = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 96, 96], "interpolation": "bilinear"}


def test_a_timm_model_with_a_tag_of_the_hub_is_scaled_by_the_config_beside_it(tmp_path):
    """timm's registry lacks the tags of its iNaturalist classifiers: their config.json has mean and deviation."""
    net, path = save_timm_model(tmp_path, "test_resnet", num_classes=7)
    spec = f"reader:test_resnet.ft_inat21={path}"
    with refusal("has no tag 'ft_inat21' of test_resnet, expected the config.json", "put it beside .*test_resnet.pth"):
        named_network(spec, "logits")
    config = {
        "architecture": "test_resnet",
        "num_classes": 7,
        "pretrained_cfg": SCALING,
        "label_names": list("abcdefg"),
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = named_network(spec, "logits")
    assert network.name == "reader" and network.module.size == (96, 96) and network.module.mode == "bilinear"
    assert network.classes == list("abcdefg") and network.record["config"] == sha256(tmp_path / "config.json")
    x = images(2, 96)
    mean, std = (torch.tensor(SCALING[key])[:, None, None] for key in ("mean", "std"))
    with torch.inference_mode():
        torch.testing.assert_close(network(x)["logits"], net((x / 255 - mean) / std))
    # the config of another model is not this one's
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "test_vit"}))
    assert named_network(f"test_resnet={path}").module.size == (160, 160)
    for scaling in (SCALING | {"std": [0, 0.5, 0.6]}, SCALING | {"mean": 1}, {}):
        (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": scaling}))
        with refusal("config.json is damaged \\(", "expected the mean, std", "download it again"):
            named_network(spec, "logits")


def test_class_names_beside_a_classifier(tmp_path):
    _, path = save_timm_model(tmp_path, "test_resnet", num_classes=6)
    spec, file = f"test_resnet={path}", tmp_path / "test_resnet.classes.txt"
    names = [*PETS.classes[::-1], "wolf"]
    file.write_text("\n".join(names) + "\n")
    network = named_network(spec, "logits")
    assert network.classes == names and networks.match_outputs(network, 6, PETS).tolist() == [4, 3, 2, 1, 0, -1]
    with refusal("test_resnet.classes.txt has 6 classes, expected the 7 outputs"):
        networks.match_outputs(network, 7, PETS)
    network.classes = ["lion", *names[1:]]
    with refusal("test_resnet.classes.txt lacks 1 classes of .* \\('puma'\\)"):
        networks.match_outputs(network, 6, PETS)
    # names that came with the weights may be of another kind
    network.classes_file = None
    with refusal("The classifier has 6 classes, expected the 5 of pets", "STEM.classes.txt"):
        networks.match_outputs(network, 6, PETS)
    network.classes = ["Felis catus", "a", "b", "c", "d"]
    assert networks.match_outputs(network, 5, PETS).tolist() == [0, 1, 2, 3, 4]
    for text in ("", "a\n\nb\n", "a\na\n"):
        file.write_text(text)
        with refusal("test_resnet.classes.txt is not a list of class names"):
            named_network(spec, "logits")


def test_dinov2_is_found_in_torch_home_in_the_form_of_its_release(tmp_path, monkeypatch):
    """The release has timm's names and a mask token; here it is small."""
    create, sizes = timm.create_model, dict(embed_dim=16, depth=2, num_heads=2)
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **options | sizes))
    torch.manual_seed(0)
    net = timm.create_model("vit_large_patch14_dinov2.lvd142m", img_size=224).eval()
    file = tmp_path / "hub/checkpoints/dinov2_vitl14_pretrain.pth"
    file.parent.mkdir(parents=True)
    torch.save(net.state_dict() | {"mask_token": torch.zeros(1, 16)}, file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with refusal("dinov2_vitl14_pretrain.pth has the SHA-256", "expected d5383ea8…", "--features dinov2=FILE"):
        named_network("dinov2")
    network = named_network(f"dinov2={file}")
    assert network.name == "dinov2" and "published ones d5383ea8…" in features.why_not_comparable(network)
    monkeypatch.setitem(weights.SHA256, "dinov2", sha256(file))
    network = named_network("dinov2")
    assert features.why_not_comparable(network) is None
    x = images(2, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():  # the class token after the last norm
        expected = net.forward_features((x / 255 - mean[:, None, None]) / std[:, None, None])[:, 0]
    torch.testing.assert_close(network(x)["features"], expected)
    assert named_network("dinov2", random=True).record == {"name": "dinov2", "weights": "random", "preset": "dinov2"}


def test_weights_that_do_not_fit_a_timm_model_are_refused(tmp_path):
    _, path = save_timm_model(tmp_path, "test_vit")
    with refusal("does not fit timm's test_resnet"):
        named_network(f"test_resnet={path}")


@pytest.mark.parametrize(
    "spec", ["no_such_model=file.pth", "test_vit@big=file.pth", "test_vit@=", "missing.pt", "test_vit"]
)
def test_specs_that_name_no_network_are_refused(spec):
    with refusal("file|FILE"):
        named_network(spec)


class Means(torch.nn.Module):
    def forward(self, x):
        return x.float().mean((2, 3))


class Maps(torch.nn.Module):
    def forward(self, x):
        return x.float()


def test_torchscript_modules(tmp_path):
    x = images(2, 20)
    for module in (Means(), Maps()):
        torch.jit.script(module).save(tmp_path / f"{type(module).__name__}.pt")
    network = named_network(str(tmp_path / "Means.pt"))
    assert network.name == "Means" and network(x)["features"].equal(x.float().mean((2, 3)))
    with refusal(r"returns \(2, 3, 20, 20\) for 2 images", "expected "):
        named_network(str(tmp_path / "Maps.pt"))(x)
    (tmp_path / "text.pt").write_text("no module")
    with refusal("cannot be read as TorchScript"):
        named_network(str(tmp_path / "text.pt"))


def test_random_weights_are_the_same_on_every_call():
    x = images(2, 32)
    for spec in ("test_vit@32", "test_resnet"):
        one, two = (named_network(spec, random=True) for _ in range(2))
        assert one(x)["features"].equal(two(x)["features"]) and one.record["weights"] == "random"
    one, two = (features.lpips_features() for _ in range(2))
    assert one(x)["features"].equal(two(x)["features"])
