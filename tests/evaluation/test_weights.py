"""Weights of the evaluation's networks: which file is found, downloaded or refused."""

import hashlib
import io
import pickle
import urllib.error
import urllib.request

import pytest
import torch
from helpers.tiny_models import refusal

from evaluation import features, weights
from evaluation.weights import PUBLISHED, find_network_weights, published_digits, read_network_weights

BODY = b"weights"
DIGITS = hashlib.sha256(BODY).hexdigest()[:8]


# ---- published files -----------------------------------------------------------------------------


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty TORCH_HOME, in which files of the bytes BODY count as the published ones."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "published_digits", lambda flag: DIGITS)
    return tmp_path / "hub/checkpoints"


def serve(monkeypatch, body, length=None, url=None):
    """Have `urlopen` return these bytes; length, url: the size that the server claims, where it redirects to."""

    def urlopen(request, timeout):
        reply = io.BytesIO(body)
        reply.url = url or request.full_url
        reply.headers = {"Content-Length": str(len(body) if length is None else length)}
        return reply

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_published_files_are_named_by_their_sha256():
    assert published_digits("inception") == "6726825d" and published_digits("lpips-trunk") == "7be5be79"
    assert all(names[0].startswith("https://") for names in PUBLISHED.values())


@pytest.mark.parametrize("name", ["weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"])
def test_published_files_are_found_in_torch_home(torch_home, name):
    torch_home.mkdir(parents=True)
    (torch_home / name).write_bytes(BODY)
    assert find_network_weights("inception", None) == torch_home / name
    (torch_home / name).write_bytes(b"other weights")
    words = "has the SHA-256 ", f"expected {DIGITS}", "delete it, or pass another file as --inception"
    with refusal(*words):
        find_network_weights("inception", None)


def test_given_files_are_taken_as_they_are():
    assert find_network_weights("lpips-trunk", "here.pth").name == "here.pth"


def test_published_files_are_downloaded_once(torch_home, monkeypatch, capsys):
    serve(monkeypatch, BODY)
    path = find_network_weights("lpips-trunk", None)
    assert path == torch_home / "alexnet-owt-7be5be79.pth" and path.read_bytes() == BODY
    assert "alexnet-owt-7be5be79.pth: 100%" in capsys.readouterr().err  # the progress bar
    serve(monkeypatch, b"not downloaded again")
    assert find_network_weights("lpips-trunk", None) == path and [*torch_home.iterdir()] == [path]


@pytest.mark.parametrize(
    "reply, words",
    [
        (dict(body=BODY, length=8), "it ended after 7 of 8 bytes"),
        (dict(body=b""), "it ended after 0 of an unknown number of bytes"),
        (dict(body=b"other weights"), "its SHA-256 is .*, expected " + DIGITS),
        (dict(body=BODY, url="http://example.org/alexnet.pth"), "it was moved to http://example.org/alexnet.pth"),
    ],
)
def test_bad_downloads_are_refused_and_leave_nothing(torch_home, monkeypatch, reply, words):
    serve(monkeypatch, **reply)
    with refusal("alexnet", r"could not be downloaded \(" + words, "pass it as --lpips-trunk"):
        find_network_weights("lpips-trunk", None)
    assert [*torch_home.iterdir()] == []


def test_an_unreachable_server_is_reported_in_one_sentence(torch_home, monkeypatch):
    def urlopen(request, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with refusal("alexnet", "could not be downloaded", "no route to host", "as --lpips-trunk"):
        find_network_weights("lpips-trunk", None)


# ---- reading -------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self):  # an attacker's pickle would run this
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
        ({"fc.bias": torch.tensor([1.0, torch.nan])}, ["finite", "fc.bias"]),
    ],
)
def test_files_without_weights_are_refused(tmp_path, content, words, capsys):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with refusal(*words):
        read_network_weights(path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("network", [features.inception, features.lpips_features])
def test_weights_of_another_network_are_refused(tmp_path, network):
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with refusal("other.pth", "expected |does not fit", "name another file"):
        network(tmp_path / "other.pth")
