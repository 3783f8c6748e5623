"""The networks: bit for bit those of the published programs on the same weights, and what they refuse."""

import pickle
import urllib.error
import warnings

import lpips
import numpy as np
import pytest
import timm
import torch
from helpers.tiny_models import refusal
from PIL import Image
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.models import alexnet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pytorch_fid import fid_score
    from pytorch_fid import inception as pytorch_fid_inception

from evaluation import features
from evaluation.metrics import Gaussian, features_root, frechet_distance, gaussian_root


def images(n, size, seed=0):
    """uint8 (n, 3, size, size), of several scales"""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    x = F.interpolate(coarse, (size, size), mode="bicubic") + 0.1 * torch.randn(n, 3, size, size, generator=generator)
    return (255 * x).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the form of the published file."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(features.inception().module.net.state_dict(), path)
    return path


# ---- Inception -----------------------------------------------------------------------------------


def test_inception_is_torch_fidelitys_bit_for_bit(inception_file):
    x = images(3, 40)
    expected = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], inception_file)(x)
    network = features.inception(inception_file, spatial=True)
    found = network(x)
    assert found["features"].equal(expected[0]) and found["logits"].equal(expected[1])
    assert found["features"].std(0).min() >= 0 and found["features"].std() > 0.1
    assert network.record == {
        "name": "inception",
        "weights": features.sha256(inception_file),
        "resize": "tf1",
    }
    # ADM's spatial features: 7 channels of the first branch of the seventh block, (17, 17, 7) as TensorFlow lays them out
    maps = {}
    network.module.net.Mixed_6d.branch1x1.register_forward_hook(lambda *_: maps.update(out=_[-1]))
    spatial = network(x)["spatial"].reshape(3, 17, 17, 7)
    assert spatial[1, 4, 9, 6] == maps["out"][1, 6, 4, 9] and spatial.std() > 0


def test_fid_is_pytorch_fids_on_the_same_weights(inception_file, tmp_path, monkeypatch):
    load = torch.load(inception_file, weights_only=True)
    monkeypatch.setattr(pytorch_fid_inception, "load_state_dict_from_url", lambda *args, **kwargs: load)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = pytorch_fid_inception.InceptionV3([3])
    network = features.inception(inception_file, resize="pytorch")
    sides, expected = [], []
    for seed in (0, 1):
        x = images(6, 48, seed) // (1 + seed)
        paths = [tmp_path / f"{seed}-{i}.png" for i in range(len(x))]
        for path, image in zip(paths, x):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        with torch.inference_mode():
            expected.append(fid_score.get_activations(paths, reference, batch_size=6, num_workers=0))
        sides.append(network(x)["features"])
        np.testing.assert_allclose(sides[-1], expected[-1], rtol=1e-5, atol=1e-5)
    sets = [torch.from_numpy(side).double() for side in expected]
    assert frechet_distance(*map(features_root, sides)) == pytest.approx(
        frechet_distance(*map(features_root, sets)), rel=1e-6
    )
    # its own formula needs covariances of full rank: some of the 2,048 features
    few = [side[:, :4].double() for side in sides]
    found = frechet_distance(*(gaussian_root(Gaussian(6, x.mean(0), torch.cov(x.T))) for x in few))
    theirs = [s for side in expected for s in (side[:, :4].mean(0), np.cov(side[:, :4], rowvar=False))]
    assert found == pytest.approx(fid_score.calculate_frechet_distance(*theirs), rel=1e-6)


def test_resizes():
    x = images(2, 37)
    scaled = {name: features.Inception(name).scaled(x) for name in features.RESIZES}
    tf1 = interpolate_bilinear_2d_like_tensorflow1x(x.float(), (299, 299), align_corners=False)
    assert scaled["tf1"].equal((tf1 - 128) / 128)
    for i, channel in enumerate(x[1]):  # clean-fid's: Pillow's bicubic on floats
        clean = Image.fromarray(channel.numpy().astype(np.float32), mode="F").resize(
            (299, 299), Image.Resampling.BICUBIC
        )
        expected = (np.asarray(clean).clip(0, 255) - 128) / 128
        np.testing.assert_allclose(scaled["clean"][1, i], expected, atol=1e-4)
    assert (scaled["pytorch"] - scaled["clean"]).abs().max() > 0.01
    assert (scaled["pytorch"] - scaled["tf1"]).abs().max() > 0.1
    same = images(1, 299)
    for name in ("tf1", "clean"):
        torch.testing.assert_close(features.Inception(name).scaled(same), (same.float() - 128) / 128)


# ---- finding and reading weights -----------------------------------------------------------------


def test_weights_are_looked_for_in_torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(features, "published_prefix", lambda what: "0b5ea2a6")
    for name in ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"):
        path = tmp_path / "hub/checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
        with refusal("has the SHA-256 ", "expected 0b5ea2a6", "delete it, or pass a file as --inception"):
            features.find_weights("inception", None)
        monkeypatch.setattr(features, "sha256", lambda path: "0b5ea2a6" + 56 * "0")
        assert features.find_weights("inception", None) == path
        path.unlink()
        monkeypatch.undo()
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(features, "published_prefix", lambda what: "0b5ea2a6")
    assert features.find_weights("lpips-trunk", "here.pth").name == "here.pth"


def test_published_files():
    assert (
        features.published_prefix("inception") == "6726825d" and features.published_prefix("lpips-trunk") == "7be5be79"
    )
    assert all(names[0].startswith("https://") for names in features.PUBLISHED.values())


def test_no_network_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(url, path, hash_prefix):
        assert hash_prefix == "7be5be79"
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with refusal("alexnet", r"could not be downloaded \(no route to host\)", "expected ", "as --lpips-trunk"):
        features.find_weights("lpips-trunk", None)


class Trap:
    def __reduce__(self):  # what an attacker's pickle would run
        return print, ("ran",)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["There is no file"]),
        (b"", ["is not a checkpoint"]),
        (b"<html>not found</html>", ["is not a checkpoint"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", ["is not a checkpoint"]),
        (pickle.dumps({"fc.bias": Trap()}, protocol=2), ["holds pickled code"]),
        ([1, 2], ["holds list", "expected tensors by name"]),
        ({}, ["holds dict"]),
        ({"fc.bias": torch.tensor([1.0, torch.nan])}, ["not finite in fc.bias"]),
    ],
)
def test_files_that_are_no_weights(tmp_path, content, words, capsys):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with refusal(*words):
        features.read_weights(path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("network", [features.inception, features.lpips_features])
def test_weights_of_another_network(tmp_path, network):
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with refusal("other.pth", "expected |does not fit", "name another file"):
        network(tmp_path / "other.pth")


# ---- LPIPS ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 31])
def test_lpips_features_are_lpips(tmp_path, size):
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


def test_images_too_small_for_lpips():
    with refusal("30 x 30 pixels", "expected 31 or more", "--lpips-trunk none"):
        features.lpips_features()(images(1, 30))


# ---- named networks ------------------------------------------------------------------------------


def saved(tmp_path, model, **sizes):
    torch.manual_seed(1)
    net = timm.create_model(model, **sizes).eval()
    path = tmp_path / f"{model}.pth"
    torch.save({"state_dict": {f"module.{name}": p for name, p in net.state_dict().items()}}, path)
    return net, path


@pytest.mark.parametrize("model, size", [("test_resnet", 160), ("test_vit", 160)])
def test_a_timm_model_with_a_local_file(tmp_path, model, size):
    net, path = saved(tmp_path, model, num_classes=7)
    config = timm.data.resolve_model_data_config(net)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    assert config["input_size"] == (3, size, size)
    x = images(2, size)
    with torch.inference_mode():
        scaled = (x / 255 - mean) / std
        before, logits = net.forward_head(net.forward_features(scaled), pre_logits=True), net(scaled)
    network = features.named_network(f"{model}={path}")
    torch.testing.assert_close(network(x)["features"], before)
    assert network.name == model and network.record["weights"] == features.sha256(path)
    torch.testing.assert_close(features.named_network(f"{model}={path}", "logits")(x)["logits"], logits)


def test_another_input_size(tmp_path):
    _, path = saved(tmp_path, "test_vit")
    x = images(2, 64)
    network = features.named_network(f"test_vit@64={path}")
    assert network(x)["features"].shape == (2, 64) and network.module.size == (64, 64)
    assert network.module.model.pos_embed.shape[1] == 17  # of 4 x 4 patches and the class token, resampled


def test_a_file_that_does_not_fit_a_timm_model(tmp_path):
    _, path = saved(tmp_path, "test_vit")
    with refusal("does not fit timm's test_resnet"):
        features.named_network(f"test_resnet={path}")


@pytest.mark.parametrize(
    "spec", ["no_such_model=file.pth", "test_vit@big=file.pth", "test_vit@=", "missing.pt", "test_vit"]
)
def test_specs_that_name_no_network(spec):
    with refusal("file|FILE"):
        features.named_network(spec)


class Means(torch.nn.Module):
    def forward(self, x):
        return x.float().mean((2, 3))


class Maps(torch.nn.Module):
    def forward(self, x):
        return x.float()


def test_a_torchscript_module(tmp_path):
    x = images(2, 20)
    for module in (Means(), Maps()):
        torch.jit.script(module).save(tmp_path / f"{type(module).__name__}.pt")
    network = features.named_network(str(tmp_path / "Means.pt"))
    assert network.name == "Means" and network(x)["features"].equal(x.float().mean((2, 3)))
    with refusal(r"returns \(2, 3, 20, 20\) for 2 images", "expected "):
        features.named_network(str(tmp_path / "Maps.pt"))(x)
    (tmp_path / "text.pt").write_text("no module")
    with refusal("cannot be read as TorchScript"):
        features.named_network(str(tmp_path / "text.pt"))


def test_random_weights_are_the_same_every_time():
    x = images(2, 32)
    for spec in ("test_vit@32", "test_resnet"):
        one, two = (features.named_network(spec, random=True) for _ in range(2))
        assert one(x)["features"].equal(two(x)["features"]) and one.record["weights"] == "random"
    one, two = (features.lpips_features() for _ in range(2))
    assert one(x)["features"].equal(two(x)["features"])
