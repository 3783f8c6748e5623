"""The model on a GPU against the CPU in float64: prediction, gradients, layout, attention, compilation."""

from contextlib import nullcontext

import pytest
import torch
from helpers.gpu import (
    DEVICE,
    HALF,
    NUMBERS,
    PRECISIONS,
    assert_close,
    draw,
    exact,
    half_precision,
    make_trainer,
    small_dit,
    training_noise,
)
from torch._dynamo.utils import counters as dynamo
from torch.nn.attention import SDPBackend

from diffusion import create_diffusion
from finetune import METHODS, kind_of, select
from guidance import Guidance
from models import NormAndModulate
from runtime.device import DTYPES
from sampling.samplers import sample_keyed

LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])  # classes, then superclasses
T = torch.tensor([0, 1, 50, 250, 500, 750, 900, 999])


def autocast(precision):
    return torch.autocast(DEVICE.type, DTYPES[HALF[precision]]) if HALF[precision] != "no" else nullcontext()


# ---- layout --------------------------------------------------------------------------------------


def test_attention_backend(cuda_only, record_property):
    """Half precision has a fused kernel: flash or cuDNN attention from Ampere on, memory-efficient attention before."""
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    fast = {"FLASH_ATTENTION", "CUDNN_ATTENTION"} if ampere else {"EFFICIENT_ATTENTION"}
    for half, expected in ((half_precision(), fast), ("no", {"EFFICIENT_ATTENTION"})):
        for tokens in (256, 1024):
            q = torch.empty(2, 16, tokens, 72, device=DEVICE, dtype=DTYPES[half], requires_grad=True)
            found = SDPBackend(torch._fused_sdp_choice(q, q, q)).name
            record_property(f"attention {half} {tokens} tokens", found)
            assert found in expected, (half, tokens)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_residual_layout(compiled):
    """Every block gets and gives a contiguous residual stream, so that no LayerNorm copies it."""
    model, strided = small_dit().to(DEVICE), []
    if compiled:
        model.compile_blocks()
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: strided.extend((inputs[0].stride(), output.stride())))
    with autocast("bf16" if half_precision() == "bf16" else "fp16"):
        model(draw(8, 4, 32, 32).to(DEVICE), T.to(DEVICE), LABELS.to(DEVICE))
    assert set(strided) == {(64 * 384, 384, 1)} and len(strided) == 2 * len(model.blocks)


# ---- numbers -------------------------------------------------------------------------------------


@PRECISIONS
def test_forward(precision):
    tolerance = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 3e-3, "bf16": 2e-2}[precision]
    model, x = small_dit().eval(), draw(8, 4, 32, 32)
    with torch.no_grad():
        expected = small_dit().eval().double()(x.double(), T, LABELS)
        with autocast(precision):
            found = model.to(DEVICE)(x.to(DEVICE), T.to(DEVICE), LABELS.to(DEVICE))
    assert_close(found, expected, tolerance)


def gradients(model, dtype, device, precision="fp32", scale=1.0):
    """Return the gradients of the mean hybrid loss at the timesteps T by parameter name."""
    parameters = select(model, METHODS["finediffusion"])
    model = model.to(device, dtype).train()
    x, noise = (draw(8, 4, 32, 32, seed=seed).to(device, dtype) for seed in (1, 2))
    drop = torch.tensor([0, 0, 1, 0, 0, 0, 1, 0], device=device)
    inputs = {"y": torch.arange(8, device=device) % 5, "force_drop_ids": drop}
    with autocast(precision) if device == DEVICE else nullcontext():
        losses = create_diffusion("").training_losses(model, x, T.to(device), inputs, noise)
    (losses["loss"].mean() * scale).backward()
    return {name: p.grad / scale for name, p in parameters.items()}


@PRECISIONS
def test_gradients(precision):
    """The gradients of each kind of parameter; fp16 at the first scale of the gradient scaler."""
    tolerance = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 2e-2}[precision]
    expected = gradients(small_dit(), torch.float64, torch.device("cpu"))
    found = gradients(small_dit(), torch.float32, DEVICE, precision, 65536.0 if precision == "fp16" else 1.0)
    assert all(grad.dtype == torch.float32 for grad in found.values())
    kinds = {kind: [name for name in found if kind_of(name) == kind] for kind in map(kind_of, found)}
    for kind, names in kinds.items():
        flat = [torch.cat([grads[name].flatten().cpu() for name in names]) for grads in (found, expected)]
        assert_close(*flat, tolerance, kind)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_norm_and_modulate(scale):
    """Outputs and gradients of NormAndModulate against autograd in float64."""
    exact()
    shapes = {"x": (4, 64, 384), "weight": (384,), "bias": (384,), "shift": (4, 1, 384), "scale": (4, 1, 384)}
    tensors = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors["x"] *= scale
    own, reference = (
        {name: t.clone().to(*place).requires_grad_() for name, t in tensors.items()}
        for place in ((DEVICE, torch.float32), ("cpu", torch.float64))
    )
    found = NormAndModulate.apply(*own.values(), 1e-6)
    normal = torch.nn.functional.layer_norm(reference["x"], (384,), reference["weight"], reference["bias"], 1e-6)
    expected = normal * (1 + reference["scale"]) + reference["shift"]
    assert_close(found, expected, 1e-5)
    grad = draw(4, 64, 384, seed=9)
    found.backward(grad.to(DEVICE)), expected.backward(grad.double())
    for name in tensors:
        assert_close(own[name].grad, reference[name].grad, 1e-5, name)


# ---- compilation ---------------------------------------------------------------------------------


def graphs(call):
    """Return how many graphs `call()` compiles."""
    before = dynamo["frames"]["ok"]
    call()
    assert not sum(dynamo["graph_break"].values())
    return dynamo["frames"]["ok"] - before


@pytest.mark.parametrize("half", ["no", "half"])
def test_compiled_training(half):
    """Compiled steps equal eager ones. Blocks share a graph, the last layer has one; as many for a preview, a smaller part."""
    exact()
    half = "no" if half == "no" else half_precision()
    sides = [make_trainer(small_dit(), half) for _ in range(2)]
    sides[1].model.compile_blocks()
    x, labels, noise = draw(8, 4, 32, 32, seed=3), torch.arange(8) % 5, training_noise(8, 32)
    smaller = x[:3], labels[:3], {name: values[:3] for name, values in noise.items()}
    dynamo.clear()
    terms = [sides[0].step(x, labels, noise), None]

    def preview():
        sides[1].model.eval()
        with torch.no_grad(), sides[1].accelerator.autocast():
            sides[1].model(x.to(DEVICE), noise["t"].to(DEVICE), labels.to(DEVICE))
        sides[1].model.train()

    def compiled():
        terms[1] = sides[1].step(x, labels, noise)

    assert graphs(compiled) == 2 and graphs(preview) == 2 and graphs(compiled) == 0
    assert graphs(lambda: sides[1].step(*smaller)) == 2
    assert graphs(lambda: sides[1].step(x, labels, noise)) == 0
    sides[1] = make_trainer(small_dit(), half)  # the first step again, of a fresh model
    sides[1].model.compile_blocks()
    compiled()
    assert_close(terms[1][:3], terms[0][:3], 1e-5 if half == "no" else 1e-2)
    for name, average in sides[0].ema.average.items():
        if NUMBERS:
            assert (sides[1].ema.average[name] - average).abs().max() <= 2.1e-5, (
                name
            )  # AdamW moves by 1e-4, a tenth here


@pytest.mark.parametrize("half", ["no", "half"])
def test_compiled_sampling(half):
    exact()
    half = "no" if half == "no" else half_precision()
    latents = []
    for compiled in (False, True):
        model = small_dit().eval().requires_grad_(False).to(DEVICE)
        if compiled:
            model.compile_blocks()
        dtype = None if half == "no" else DTYPES[half]
        options = dict(sampler="ddim", steps=8, autocast=dtype)
        call = lambda: sample_keyed(model, [0, 3], [(0, 0), (0, 1)], Guidance(scale=2.0), **options)  # noqa: B023, E731
        dynamo.clear()
        latents.append(call())
        assert dynamo["frames"]["ok"] == 2 * compiled and not sum(dynamo["graph_break"].values())
    assert_close(latents[1], latents[0], 1e-4 if half == "no" else 5e-2)
