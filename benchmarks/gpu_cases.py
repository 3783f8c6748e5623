"""Cases of `benchmarks.gpu` that benchmarks.speed lacks: ceilings, time split, counts, layout, memory, the autoencoder.

Each takes the Bench and returns a dict of its results.
"""

import gc
import re
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from autoencoder import SD_SCALE, Autoencoder
from benchmarks.harness import Bench, count_waits
from benchmarks.sampling_cases import make_labels, our_model, random_vae
from benchmarks.training_cases import make_batch, our_training, random_dit
from finetune import METHODS, select, store_frozen
from guidance import Guidance, guided
from runtime.device import DTYPES
from sampling.samplers import SAMPLERS, sample_keyed
from training import memory

XL = "DiT-XL/2"
SCALE = 4.0
GIB = 2**30
KINDS = {  # kernels by what they compute, in this order
    "attention": re.compile("flash|fmha|attention|sdpa", re.I),
    "products": re.compile("gemm|cutlass|xmma|nvjet|cublas|splitk|conv", re.I),
    "copies": re.compile("memcpy|memset", re.I),
    "pointwise and reductions": re.compile(""),
}


def gpu_seconds(call: Callable, rounds: int = 5) -> float:
    """Return the median GPU time of `call()` by events, after two calls to warm up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[rounds // 2]


# ---- ceilings ------------------------------------------------------------------------------------


def products(bench: Bench) -> dict[str, float]:
    """Return rates of matrix products in TFLOP/s: large ones, and those of a block with 16,384 tokens."""
    half, found = DTYPES[bench.half], {}
    n = bench.small(8192, 64)
    shapes = {f"{n}^3": (n, n, n)}
    tokens, width = bench.small((16384, 1152), (64, 16))
    shapes |= {
        f"{tokens} x {a * width} x {b * width}": (tokens, a * width, b * width) for a, b in ((1, 3), (1, 4), (4, 1))
    }
    for name, (m, k, n) in shapes.items():
        for dtype, label in ((half, bench.half), (torch.float32, "TF32")):
            a, b = (torch.randn(*shape, device=bench.device, dtype=dtype) for shape in ((m, k), (k, n)))
            seconds = gpu_seconds(lambda: a @ b)  # noqa: B023
            found[f"product {label}, {name}"] = 2 * m * k * n / seconds / 1e12
    return found


def attentions(bench: Bench) -> dict[str, float]:
    """Return rates of attention in TFLOP/s, forward and backward, by kernel; heads of 72 as in DiT-XL/2."""
    found, half = {}, DTYPES[bench.half]
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    for images, tokens in bench.small([(64, 256), (16, 1024)], [(1, 16)]):
        shape = images, 16, tokens, 72
        q, k, v = (torch.randn(shape, device=bench.device, dtype=half, requires_grad=True) for _ in range(3))
        flop = 4 * images * 16 * tokens**2 * 72
        for kernel in kernels:
            try:
                with sdpa_kernel(kernel):
                    out = F.scaled_dot_product_attention(q, k, v)
                    grad = torch.ones_like(out)
                    forward = gpu_seconds(lambda: F.scaled_dot_product_attention(q, k, v))  # noqa: B023
                    backward = gpu_seconds(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))  # noqa: B023
            except RuntimeError:  # this GPU does not have it
                continue
            name = f"{kernel.name.split('_')[0].lower()} attention {bench.half}, {tokens} tokens"
            found |= {f"{name}, forward": flop / forward / 1e12, f"{name}, backward": 2.5 * flop / backward / 1e12}
    return found


def ceilings(bench: Bench) -> dict:
    """Return what the hardware can do: products and attention in TFLOP/s, a copy in TB/s (bytes read and written)."""
    source = torch.empty(bench.small(2**30, 2**10), device=bench.device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / gpu_seconds(lambda: target.copy_(source)) / 1e12
    return {"rates": products(bench) | {"copy (TB/s)": copy} | attentions(bench)}


# ---- a step in detail ----------------------------------------------------------------------------


def time_split(call: Callable) -> dict[str, float]:
    """Return GPU milliseconds of `call()` by kind of kernel, and the number of `launches`; {} if no kernel is recorded."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    times, launches = dict.fromkeys(KINDS, 0.0), 0
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kind = next(kind for kind, pattern in KINDS.items() if pattern.search(event.name))
            times[kind] += event.self_device_time_total / 1000
            launches += kind != "copies"
    return times | {"launches": launches} if launches else {}


def host_milliseconds(call: Callable, rounds: int = 5) -> float:
    """Return the median time that the CPU takes to queue `call()`."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begun))
    torch.cuda.synchronize()
    return sorted(times)[rounds // 2]


def step_details(bench: Bench, batch: int = 64) -> dict:
    """Return GPU and host time, time split and waits of a training step and of a guided forward pass."""
    size, model = bench.small(32, 8), bench.small(XL, "DiT-Ti/2")
    step = our_training(bench, random_dit(bench, model, size))
    moments, _, labels, _ = make_batch(bench, bench.small(batch, 2), size)
    calls = {"training step": lambda: step(moments, labels)}
    for count in (bench.small(batch // 2, 2), 1):
        calls[f"guided prediction, {count}"] = prediction(bench, model, size, count)
    found = {}
    for name, call in calls.items():
        call(), call()  # compiles
        found[name] = {"ms": 1000 * gpu_seconds(call), "host ms": host_milliseconds(call), "waits": count_waits(call)}
        found[name] |= time_split(call)
    return {"steps": found}


def prediction(bench: Bench, model: str, size: int, count: int) -> Callable:
    """Return a call that makes one guided forward pass for `count` images."""
    model, half = our_model(bench, random_dit(bench, model, size))
    predict = guided(model, make_labels(bench, count), Guidance("superclass", SCALE), [()] * count)
    x = torch.randn(count, model.in_channels, size, size, device=bench.device)

    @torch.no_grad()
    def call():
        with torch.autocast(bench.device.type, half, enabled=half is not None):
            return predict(x, 500)

    return call


def sampler_waits(bench: Bench) -> dict:
    """Return how often a step of each sampler waits for the GPU."""
    size = bench.small(32, 8)
    model, half = our_model(bench, random_dit(bench, bench.small(XL, "DiT-Ti/2"), size))
    found = {}
    for name in (*SAMPLERS, "interval"):
        interval = {"interval": (300, 700)} if name == "interval" else {}
        options = dict(sampler="ddpm" if interval else name, autocast=half)
        guidance = Guidance("superclass", SCALE, **interval)
        run = lambda steps: sample_keyed(model, [0], [(0, 0)], guidance, steps=steps, **options)  # noqa: B023, E731
        run(2)
        few, many = (count_waits(lambda: run(steps)) for steps in (2, 6))  # noqa: B023
        found[name] = (many - few) / 4
    return {"waits": found}


def layout(bench: Bench) -> dict:
    """Return the time of a forward pass whose residual stream is stored transposed, over that of ours."""
    call = prediction(bench, bench.small(XL, "DiT-Ti/2"), bench.small(32, 8), bench.small(32, 2))
    contiguous = gpu_seconds(call, rounds=20)
    before = torch.Tensor.contiguous  # the model makes the stream contiguous after its patch embedding
    try:
        torch.Tensor.contiguous = lambda x, **options: x if x.ndim == 3 else before(x, **options)
        transposed = gpu_seconds(call, rounds=20)
    finally:
        torch.Tensor.contiguous = before
    return {"ms": {"contiguous": 1000 * contiguous, "transposed": 1000 * transposed}, "ratio": contiguous / transposed}


# ---- memory and the autoencoder ------------------------------------------------------------------


def peak_memory(bench: Bench) -> dict:
    """Return forecast, allocated and reserved GiB of a step, by method and image size."""
    found = {}
    for method in ("finediffusion", "full"):
        for size, images in bench.small([(32, 64), (64, 16)], [(8, 2)]):
            gc.collect()
            torch.cuda.empty_cache()
            model = random_dit(bench, bench.small(XL, "DiT-Ti/2"), size).train()
            parameters = select(model, METHODS[method])
            store_frozen(model, DTYPES[bench.half])
            autocast = lambda: torch.autocast("cuda", DTYPES[bench.half], enabled=bench.half != "no")  # noqa: E731
            forecast = memory.forecast(model, parameters, memory.activation_bytes(model, autocast))
            torch.cuda.empty_cache()
            step = our_training(bench, model, method, compiled=False)
            moments, _, labels, _ = make_batch(bench, images, size)
            step(moments, labels)
            torch.cuda.reset_peak_memory_stats()
            step(moments, labels)
            sizes = sum(forecast.need(images).values()), torch.cuda.max_memory_allocated()
            sizes = (*sizes, torch.cuda.max_memory_reserved())
            found[f"{method}, {8 * size} pixels, {images} images"] = [size / GIB for size in sizes]
            del model, parameters, step
    return {"memory": found}


def coding(bench: Bench) -> dict:
    """Return images/s of the autoencoder at 256 pixels, in float32 with TF32 and in half precision."""
    images = torch.rand(bench.small(64, 2), 3, *[bench.small(256, 64)] * 2, device=bench.device) * 2 - 1
    found = {}
    for label, half in (("TF32", "no"), (bench.half, bench.half)):
        autoencoder = Autoencoder(random_vae(bench).to(DTYPES[half]), SD_SCALE)
        latents, _ = autoencoder.encode_moments(images)
        encoding = gpu_seconds(lambda: autoencoder.encode_moments(images), 3)  # noqa: B023
        decoding = gpu_seconds(lambda: autoencoder.decode(latents), 3)  # noqa: B023
        found |= {f"encode, {label}": len(images) / encoding, f"decode, {label}": len(images) / decoding}
    return {"images/s": found}
