"""The resources of a run: the forecast of GPU memory, and file sizes."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import ROOT, described, tiny_dit
from helpers.tiny_runs import TINY

import finetune
import train
from autoencoder import Autoencoder
from checkpoint.description import Base, ModelDescription
from checkpoint.format import save_adapter
from checkpoint.loading import build_model
from finetune import METHODS, kind_of, select, store_frozen
from hierarchy import Hierarchy
from models import DiT_models
from training import memory
from training.state import DECISIVE_FLAGS, save_state

SHARED = ROOT.parent / "shared/data/inat2021_categories.csv"


def test_saved_bytes_of_a_linear_layer():
    """A product x w^T saves x for the gradient of w, and the parameter w for the gradient of x."""
    layer = torch.nn.Linear(8, 4)
    x = torch.ones(16, 8)
    assert memory.saved_bytes(lambda: layer(x), layer) == x.nbytes
    layer.weight.requires_grad_(False)
    assert memory.saved_bytes(lambda: layer(x), layer) == 0
    square = torch.ones(16, 8, requires_grad=True)
    assert memory.saved_bytes(lambda: square**2 + square.sin(), layer) == square.nbytes  # saved twice, counted once


@pytest.mark.parametrize("images", [1, 3])
def test_activations_grow_linearly_with_the_images(images):
    model = tiny_dit().train()
    select(model, METHODS["finediffusion"])
    ones = torch.zeros(images, dtype=torch.long)
    run = lambda: model(torch.zeros(images, 4, 8, 8), ones, ones, ones)  # noqa: E731
    per_image, per_pass = memory.activation_bytes(model, nullcontext)
    assert memory.saved_bytes(run, model) == images * per_image + per_pass and per_image > 100 * per_pass


def test_copies_of_trained_weights_are_counted_once():
    """Under autocast full fine-tuning saves half-precision copies of the matrices, for any number of images."""
    model = tiny_dit().train()
    select(model, METHODS["full"])
    _, per_pass = memory.activation_bytes(model, lambda: torch.autocast("cpu", torch.bfloat16))
    first = ("x_embedder.proj.weight", "t_embedder.mlp.0.weight")  # their inputs need no gradient
    names = [name for name, _ in model.named_parameters() if kind_of(name) == "matrix" and name not in first]
    assert per_pass == pytest.approx(2 * sum(model.get_parameter(name).numel() for name in names), rel=0.02)


def test_frozen_matrices_save_no_activations():
    """FineDiffusion saves at most 0.70 of the bytes of full fine-tuning, for DiT-S/4 at 256 pixels."""
    saved = {}
    for method in ("finediffusion", "full"):
        model = DiT_models["DiT-S/4"](num_classes=4).train()
        select(model, METHODS[method])
        saved[method], _ = memory.activation_bytes(model, nullcontext)
        model.grad_checkpointing = True
        kept, _ = memory.activation_bytes(model, nullcontext)  # inputs of 12 blocks, and a block computed again
        assert 0.15 * saved[method] < kept < 0.2 * saved[method]
    assert saved["finediffusion"] / saved["full"] <= 0.70


def test_the_forecast_counts_weights_trained_parameters_and_activations():
    model = tiny_dit()
    trained = select(model, METHODS["bitfit"])
    need = memory.forecast(model, trained, (1000, 500)).need(8)
    assert need["weights"] == sum(t.numel() * 4 for t in model.parameters()) + model.y_embedder.ancestors.numel() * 8
    assert need["gradients, moments and EMA"] == 16 * sum(p.numel() for p in trained.values())
    assert need["activations"] == 8500
    half = memory.forecast(model.half(), trained, (1000, 500), vae=torch.nn.Linear(10, 10)).need(8)
    assert half["weights"] == (need["weights"] - 56) / 2 + 56 + 440


FORECAST = memory.Forecast(weights=10 * memory.GIB, training=0, per_image=memory.GIB, per_pass=0)


def test_the_forecast_advises_if_memory_is_insufficient():
    def describe(gib, processes=1):
        return memory.describe_forecast(FORECAST, 32, gib * memory.GIB, processes)

    enough, little = describe(80), describe(32)
    assert "about 42.0 GiB" in enough and "of 80.0" in enough and "--micro-batch" not in enough
    assert "too much, pass --micro-batch 18 " in little  # (32 - 0.6) / 1.10 - 10 = 18.5
    assert "too much, pass --micro-batch 17 " in describe(32, processes=2)  # NCCL takes 0.8
    assert "--micro-batch" not in describe(8).split("too much")[1]
    assert " of " not in memory.describe_forecast(FORECAST, 32)


@pytest.mark.parametrize(
    "wanted, gib, processes, images",
    [
        ("auto", 80, 1, 52),  # all images fit
        ("auto", 32, 1, 18),  # 52 in 3 passes of 18, 17 and 17
        ("auto", 32, 8, 13),  # room for 17.8: 4 passes of 13
        (None, 24, 1, 11),  # room for 11.3: 5 passes of 11
        ("auto", 4, 1, 1),  # not even one fits; the log says so
        (30, 24, 1, 26),  # as given: 2 passes
        ("auto", None, 1, 52),  # a CPU
    ],
)
def test_micro_batch_auto_is_the_largest_that_fits(wanted, gib, processes, images):
    capacity = gib and gib * memory.GIB
    found = memory.choose_images(wanted, 52, FORECAST, capacity, processes)
    assert found == images
    if wanted != 30 and gib and gib > 4:
        room = memory.room_bytes(capacity, processes)
        assert sum(FORECAST.need(found).values()) <= room
        passes = -(-52 // found)
        larger = -(-52 // (passes - 1)) if passes > 1 else None  # one pass less
        assert larger is None or sum(FORECAST.need(larger).values()) > room


def test_the_encoder_limits_the_images_too():
    forecast = replace(FORECAST, encoding=2 * memory.GIB)
    assert forecast.largest(20 * memory.GIB) == 5 and forecast.largest(9 * memory.GIB) == 0


@pytest.mark.parametrize("method, half", [("finediffusion", True), ("full", True), ("difffit-orig", False)])
def test_activations_follow_from_a_few_blocks(method, half, monkeypatch):
    """The forecast of --dry-run, which builds no complete model, is that of the training."""
    monkeypatch.setattr(finetune, "VECTOR_GAMMA_BLOCKS", 3)  # of 4: blocks of two kinds
    hierarchy = Hierarchy(("a", "b", "c"), ("x", "y"), [0, 1, 1])
    autocast = (lambda: torch.autocast("cpu", torch.bfloat16)) if half else nullcontext
    found = []
    for device, measure in (("cpu", memory.activation_bytes), ("meta", memory.activation_bytes_by_depth)):
        with torch.device(device):
            model = build_model(described(hierarchy, method)).train()
        select(model, METHODS[method])
        store_frozen(model, torch.bfloat16 if half else torch.float32)
        found.append(measure(model, autocast))
    assert found[0] == found[1]


def test_running_out_of_gpu_memory_advises_too(command, images, base, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 31.7"
        )

    monkeypatch.setattr(train, "forward_backward", full)
    flags = "--model DiT-Ti/2 --vae none --image-size 8 --global-batch-size 20 --num-workers 0".split()
    result = command(train.main, *flags, "--data-path", images, "--resume", base, "--results-dir", tmp_path)
    sentence = result.err.strip().split("\n")[-1]
    assert result.code == 2 and "full with 20 images in a forward pass (CUDA out of memory), expected room" in sentence
    assert "--micro-batch 10" in sentence and "--grad-checkpointing" in sentence


# ---- file sizes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """File sizes in bytes for DiT-XL/2 on iNaturalist, with class names if the list of them is available."""
    folder, hierarchy = tmp_path_factory.mktemp("xl"), Hierarchy.load("inat2021")
    if SHARED.is_file():
        rows = SHARED.read_text().splitlines()[1:]
        hierarchy = Hierarchy.from_class_names([row.split(",")[1] for row in rows]).keep()
    flags = {name: None for name in DECISIVE_FLAGS}
    description = ModelDescription(
        model="DiT-XL/2",
        image_size=256,
        latent_size=32,
        channels=4,
        vae="mse",
        method="finediffusion",
        embedder="tiered",
        hierarchy=hierarchy,
        step=200_000,
        base=Base("pretrained_models/DiT-XL-2-256x256.pt", "0" * 64),
        data="0" * 64,
        settings=flags,
    )
    with torch.device("meta"):
        model = build_model(description)
    zeros = {name: torch.zeros(p.shape) for name, p in select(model, METHODS["finediffusion"]).items()}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        save_adapter(folder / name, zeros, model, description, dtype)
    parameters = {name: torch.nn.Parameter(zero.clone()) for name, zero in zeros.items()}
    optimizer = torch.optim.AdamW(parameters.values())
    optimizer.state = {p: {"step": torch.ones(()), "exp_avg": p + 0, "exp_avg_sq": p + 0} for p in parameters.values()}
    open_row = {"terms": torch.zeros(100, 4, 256), "norms": torch.zeros(100)}
    save_state(folder / "state", parameters, {}, zeros, optimizer, open_row, replace(description, epoch=0))
    total = sum(p.numel() for p in model.parameters())
    return {path.name: path.stat().st_size for path in folder.iterdir()} | {"parameters": total}


def test_sizes_of_adapters_and_states(written):
    assert written["fp32"] <= 48.7e6 and written["bf16"] <= 24.4e6
    # the official checkpoint: model, EMA, and two moments of the trained parameters, in float32
    official = 4 * (2 * written["parameters"] + 2 * 12_153_632)
    assert written["state"] <= official / 28


@pytest.mark.skipif(not SHARED.is_file(), reason="the class names of iNaturalist are not in the repository")
def test_an_adapter_holds_the_class_names_of_inaturalist(written):
    assert 48_614_528 + 80_000 < written["fp32"] <= 48.7e6


# ---- the autoencoder in the loop -----------------------------------------------------------------


def test_images_are_encoded_in_the_parts_of_the_forward_passes(command, images64, tmp_path, monkeypatch):
    encoded, encode = [], Autoencoder.encode_moments

    def counted(self, images):
        encoded.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(Autoencoder, "encode_moments", counted)
    vae = str(ROOT / "examples/glyphs/vae")
    flags = "--model DiT-Ti/2 --image-size 64 --global-batch-size 8 --micro-batch 3 --max-steps 1 --resume none".split()
    more = "--vae", vae, "--num-workers", 0, "--preview-images", 0, "--results-dir", tmp_path, "--data-path", images64
    result = command(train.main, *flags, *more)
    assert result.code == 0 and encoded == [3, 3, 2] and "3 per forward pass" in result.out, result.err


def test_the_forecast_counts_encoding():
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(128, 256)), dtype=torch.float32)
    assert memory.encoder_bytes(vae, 256) / memory.GIB == pytest.approx(0.165, rel=0.01)
    assert memory.encoder_bytes(vae, 512) == pytest.approx(4 * memory.encoder_bytes(vae, 256))
    assert memory.encoder_bytes(None, 256) == 0
    model = tiny_dit()
    small, large = (memory.forecast(model, {}, (10, 5), encoding=size).need(4) for size in (1, 1000))
    assert small["activations"] == 45 and large["activations"] == 4000


def test_running_out_of_memory_while_encoding_advises_too(command, images64, tmp_path, monkeypatch):
    def full(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Autoencoder, "encode_moments", full)
    flags = "--model DiT-Ti/2 --image-size 64 --global-batch-size 8 --max-steps 1 --resume none --num-workers 0".split()
    result = command(train.main, *flags, "--vae", "none", "--results-dir", tmp_path, "--data-path", images64)
    sentence = result.err.strip().split("\n")[-1]
    assert result.code == 2 and "full with 8 images in a forward pass" in sentence and "--micro-batch 4" in sentence


def test_running_out_of_memory_in_the_forecast_advises_too(command, images, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(memory, "activation_bytes", full)
    result = command(train.main, *TINY, "--resume", "none", "--results-dir", tmp_path, "--data-path", images)
    sentence = result.err.strip().split("\n")[-1]
    assert (
        result.code == 2 and "full with 2 images in a forward pass" in sentence and "--grad-checkpointing" in sentence
    )
