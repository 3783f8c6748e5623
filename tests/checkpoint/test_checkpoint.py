"""Weights of others: what loads, what is refused, what is downloaded; our adapters and states are in test_adapters.py."""

import argparse
import copy
import hashlib
import http.server
import io
import threading

import pytest
import torch
from helpers.tiny_models import PETS, TinyDiT, awake, described, golden, refusal, same
from safetensors.torch import save_file

from checkpoint import download
from checkpoint.download import DIT_FILES, download_file, find_weights
from checkpoint.format import read_weights
from checkpoint.loading import TABLE, build_model, load_weights
from finetune import kind_of
from models import DiT_models
from runtime.files import atomic_write

PLAIN = {key.removeprefix("state/"): value for key, value in golden("plain_dit")[0].items() if "state/" in key}
TINY = described(PETS, model="tiny", latent_size=8, channels=4)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(DiT_models, "tiny", TinyDiT)


@pytest.fixture
def plain(tmp_path):
    """A plain DiT as DiT is published: 5 classes and the null class, no LayerNorm affine."""
    torch.save(PLAIN, tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


def tiered():
    return build_model(TINY)


# ---- files of others --------------------------------------------------------------------------------------------------


def test_a_plain_dit_leaves_norms_and_the_table_new(plain):
    model = tiered()
    before = copy.deepcopy(model.state_dict())
    absent = load_weights(model, *read_weights(plain)[:1], plain, new_table=True)
    assert set(absent) == {name for name in before if kind_of(name) == "norm"} | {TABLE}
    assert same(model.state_dict(), before | {name: PLAIN[name] for name in PLAIN if name != TABLE})
    assert all((before[name] == name.endswith("weight")).all() for name in before if kind_of(name) == "norm")


@pytest.mark.parametrize("kept", ["ema", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_the_official_form_loads_strictly(tmp_path, kept, prefix, zipped):
    ours, theirs = awake(tiered(), 1), awake(tiered(), 2)
    record = {
        "model": {prefix + name: value + (kept == "ema") for name, value in theirs.state_dict().items()},
        "ema": {prefix + name: value for name, value in theirs.state_dict().items()},
        "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]},
        "args": argparse.Namespace(model="DiT-XL/2", num_classes=10000, feature_path=None),
    }
    if kept == "model":
        del record["ema"]
    torch.save(record, tmp_path / "0000100.pt", _use_new_zipfile_serialization=zipped)
    tensors, description = read_weights(tmp_path / "0000100.pt")
    assert (
        description is None
        and load_weights(ours, tensors, "official") == []
        and same(ours.state_dict(), theirs.state_dict())
    )


def changed(**changes):
    tensors = dict(awake(tiered()).state_dict()) | changes
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"blocks.1.attn.qkv.bias": None}, ["missing blocks.1.attn.qkv.bias"]),
        ({"blocks.1.norm1.bias": None}, ["missing blocks.1.norm1.bias"]),  # all norms of the blocks, or none
        ({"final_layer.norm_final.bias": None}, ["missing final_layer.norm_final.bias"]),
        ({TABLE: None}, [f"missing {TABLE}"]),
        ({TABLE: PLAIN[TABLE]}, [rf"of another shape {TABLE} \(6, 32\), here \(7, 32\)"]),
        ({"extra": torch.zeros(1), "blocks.1.gamma_attn": torch.ones(())}, ["unexpected extra, blocks.1.gamma_attn"]),
        ({"pos_embed": None, "parents": torch.zeros(5)}, ["missing pos_embed", "unexpected parents"]),
        (dict.fromkeys(PLAIN), ["missing pos_embed, x_embedder.proj.weight, x_embedder.proj.bias and 2. more"]),
    ],
)
def test_what_does_not_fit_is_named(changes, words):
    model = tiered()
    before = copy.deepcopy(model.state_dict())
    with refusal("file.pt does not fit", *words):
        load_weights(model, changed(**changes), "file.pt")
    assert same(model.state_dict(), before)


# ---- damaged and dangerous files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip.pt", "legacy.pt", "x.safetensors"])
def test_truncated_files(tmp_path, form):
    path, weights = tmp_path / form, {f"blocks.{i}.weight": torch.randn(8, 8) for i in range(4)}
    if form == "x.safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=form == "zip.pt")
    assert same(read_weights(path)[0], weights)
    data = path.read_bytes()
    for length in range(0, len(data), 23):
        path.write_bytes(data[:length])
        with refusal(form):
            read_weights(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head></html>\n",
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2700611775\n",
        "404: Not Found",
        '{"message": "Not Found"}',
    ],
)
def test_files_that_are_something_else(tmp_path, text):
    for name, words in (("dit.pt", "is (not a|truncated or not a) checkpoint"), ("dit.safetensors", "is damaged")):
        (tmp_path / name).write_text(text)
        with refusal(name, words, "download it again"):
            read_weights(tmp_path / name)
    with refusal("no file", "absent.pt"):
        read_weights(tmp_path / "absent.pt")


@pytest.mark.parametrize("record", [[torch.zeros(1)], {}, {"model": {"a": 1}}, {"ema": {}}, {"step": 3}])
def test_pickles_without_tensors_by_name(tmp_path, record):
    torch.save(record, tmp_path / "x.pt")
    with refusal("x.pt holds (list|dict), expected tensors by name"):
        read_weights(tmp_path / "x.pt")


# ---- downloads --------------------------------------------------------------------------------------------------------

BODY = bytes(range(256)) * 40


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A local DIT_URL; `size` is what it says the file has, `hits` what was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        size, hits = len(BODY), []

        def do_GET(self):
            self.hits.append(self.path)
            found = self.path.endswith(".pt")
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(self.size if found else 0))
            self.end_headers()
            self.wfile.write(BODY if found else b"")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(download, "DIT_URL", f"http://127.0.0.1:{httpd.server_port}/models/")
        monkeypatch.setattr(download, "DIT_FOLDER", tmp_path / "pretrained")
        monkeypatch.setitem(DIT_FILES, "DiT-XL-2-256x256.pt", hashlib.sha256(BODY).hexdigest())
        monkeypatch.chdir(tmp_path)
        yield Handler
        httpd.shutdown()
        thread.join()


def test_dits_own_files_are_downloaded_once(server, tmp_path):
    name = "DiT-XL-2-256x256.pt"
    for _ in range(2):
        assert find_weights(name) == tmp_path / "pretrained" / name
    assert find_weights(tmp_path / "elsewhere" / name) == tmp_path / "pretrained" / name
    assert server.hits == [f"/models/{name}"]
    assert [path.name for path in (tmp_path / "pretrained").iterdir()] == [name]
    assert (tmp_path / "pretrained" / name).read_bytes() == BODY


def test_files_that_are_there_and_other_names_are_not_downloaded(server, tmp_path):
    own = tmp_path / "DiT-XL-2-512x512.pt"
    own.touch()
    assert find_weights(own) == own and find_weights("DiT-S-8.pt").name == "DiT-S-8.pt" and server.hits == []


def test_a_download_that_ends_early_leaves_nothing(server, tmp_path):
    server.size = len(BODY) + 1
    with refusal("could not be downloaded", f"after {len(BODY)} of {len(BODY) + 1} bytes", "pass its path"):
        find_weights("DiT-XL-2-256x256.pt")
    assert list((tmp_path / "pretrained").iterdir()) == []


def test_a_download_of_other_bytes_leaves_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setitem(DIT_FILES, "DiT-XL-2-256x256.pt", "0" * 64)
    with refusal("could not be downloaded", "its SHA-256 is", "expected 000000000000…"):
        find_weights("DiT-XL-2-256x256.pt")
    assert list((tmp_path / "pretrained").iterdir()) == []


def test_a_download_that_is_led_elsewhere_must_stay_encrypted(tmp_path, monkeypatch):
    reply = io.BytesIO(BODY)
    reply.url, reply.headers = "http://example.org/dit.pt", {"Content-Length": str(len(BODY))}
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda url, timeout: reply)
    with refusal("could not be downloaded", "it was moved to http://example.org/dit.pt"):
        download_file("https://example.org/dit.pt", tmp_path / "x")


def test_a_download_that_is_not_there(server, tmp_path, monkeypatch):
    with refusal("absent could not be downloaded", "Not Found"):
        download_file(download.DIT_URL + "absent", tmp_path / "x")
    monkeypatch.setattr(download, "DIT_URL", "http://127.0.0.1:1/")
    with refusal("could not be downloaded", "refused"):
        find_weights("DiT-XL-2-256x256.pt")
    assert list((tmp_path / "pretrained").iterdir()) == []


# ---- writing ----------------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    atomic_write(path, lambda part: part.write_text("first"))

    def fail(part):
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, fail)
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    atomic_write(path, lambda part: part.write_text("second"))
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]
