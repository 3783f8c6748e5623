"""The cases of `benchmarks.speed` that train. Each takes the Bench and its own settings and yields Rows."""

import copy
import gc
import itertools
from contextlib import nullcontext

import torch
from accelerate import Accelerator

from benchmarks import official as bench_official
from benchmarks.harness import EXACT, GPU_ALONE, Row, apart, count_flops, count_waits, row_of
from diffusion import create_diffusion
from finetune import EMA, METHODS, adamw, select, store_frozen
from hierarchy import Hierarchy
from models import DiT_models
from runtime.device import DTYPES
from runtime.private import accelerator_state, reset_accelerate, restore_accelerator_state
from training import memory
from training.step import GuardedOptimizer, draw_step_noise, forward_backward, sample_posterior

STD = 0.02  # of the layers that a new DiT has at zero: else they would hide all the rest
PEFT = "finediffusion"


def random_dit(bench, name, size):
    """A DiT for latents of side `size`, for iNaturalist's classes and superclasses, none of its layers zero."""
    torch.manual_seed(0)
    hierarchy = Hierarchy.load("inat2021")
    sizes = dict(num_super_classes=hierarchy.num_super_classes, parents=hierarchy.parents[: bench.classes])
    with bench.device:
        model = DiT_models[name](input_size=size, num_classes=bench.classes, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=STD)
    return model.to(bench.device).eval()


def our_training(bench, model, method=PEFT, half=None, compiled=None):
    """step(x, y) -> (4, n) as `forward_backward`: one step of train.py, x cached moments; also step(x, y, drawn numbers)."""
    half = bench.half if half is None else half
    reset_accelerate()  # another precision needs another Accelerator
    accelerator = Accelerator(mixed_precision=half, cpu=not bench.gpu)
    state = accelerator_state()  # which the next one would replace
    device = bench.device
    parameters = select(model, METHODS[method])
    store_frozen(model, DTYPES[half])
    model.train()
    if bench.compiled if compiled is None else compiled:
        model.compile_blocks()
    ema = EMA(parameters, 0.9999)
    wrapped, optimizer = accelerator.prepare(model, adamw(parameters, 1e-4, 1e-4))
    update = GuardedOptimizer(accelerator, optimizer, parameters.values())
    diffusion, numbers = create_diffusion(""), itertools.count()

    def step(x, y, r=None):
        restore_accelerator_state(state)
        number = next(numbers)
        r = r or draw_step_noise(0, number, len(y), (4, *x.shape[-2:]), True, 0.1, 0.0, device)
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        latents = sample_posterior(x, r["flip"], r["posterior"], None)
        terms = forward_backward(accelerator, wrapped, diffusion, latents, y, r)
        update.step()
        ema.update(number)
        return terms

    return step


def batch_of(bench, n, size, image=None):
    """(moments of n latents and of their mirror images, float16, as they are cached; latents; labels; images or None)."""
    generator = torch.Generator().manual_seed(1)
    moments = torch.randn(n, 2, 8, size, size, generator=generator).half()
    latents = moments[:, 0, :4].float()
    labels = torch.randint(bench.classes, (n,), generator=generator)
    images = torch.randn(n, 3, image, image, generator=generator) if image else None
    tensors = moments, latents, labels, images
    return [t.pin_memory() if bench.gpu and t is not None else t for t in tensors]


def same_losses(bench, model, batch, loss_of, steps=3):
    """(gate, drawn numbers and loss of a first step): the first PEFT steps of ours and of the other side, in float32.

    `loss_of(seed, latents, labels, drawn numbers)` is the other side's.
    """
    moments, latents, labels, _ = batch
    draws = [bench_official.stream(seed, latents.shape, bench.device) for seed in range(steps)]
    ours = our_training(bench, copy.deepcopy(model), half="no", compiled=False)
    with bench.exact():
        expected = torch.tensor([loss_of(seed, latents, labels, r) for seed, r in enumerate(draws)])
        found = torch.stack([ours(moments, labels, r)[0].mean() for r in draws]).cpu()
    return [(apart(found, expected), EXACT)], draws[0], expected[0]


def official_losses(bench, twin):
    step = bench_official.training(bench.official, copy.deepcopy(twin))

    def loss(seed, latents, labels, r):
        torch.manual_seed(seed)
        return step(latents, labels)

    return loss


def full_losses(bench, model, moments):
    step = our_training(bench, copy.deepcopy(model), "full", half="no", compiled=False)
    return lambda seed, latents, labels, r: step(moments, labels, r)[0].mean().item()


def step(bench, name, what, model, batch, goal, rate=None, size=32, vae=None):
    """A PEFT step against the official one, latents to both; with `vae`, a function that makes one, images to the official."""
    size, batch, model = bench.small(size, 8), bench.small(batch, 2), bench.small(model, "DiT-Ti/2")
    own = random_dit(bench, model, size)
    twin = bench_official.twin(bench.official, own)
    moments, latents, labels, images = data = batch_of(bench, batch, size, 8 * size if vae else None)
    gate, r, expected = same_losses(bench, own, data, official_losses(bench, twin))
    ours = our_training(bench, own)
    theirs = bench_official.training(bench.official, twin, vae and vae(bench))
    found = bench.first(name, lambda: ours(moments, labels, r)[0].mean().cpu())
    times = bench.time(
        lambda: ours(moments, labels),
        lambda: theirs(images if vae else latents, labels),
        work=batch * count_flops(model, size, PEFT),
    )
    gate.append((apart(found, expected), bench.tolerance))
    row = row_of(name, what, times, goal, batch if rate else None, gate)
    yield row
    if rate:
        yield Row(f"{name}-rate", what, row.unit, row.ours, goal=rate, at_least=True, gate=row.gate, faults=row.faults)


def methods(bench, name, what, model, batch, goal, size=32):
    """A PEFT step against a step of full fine-tuning, both ours."""
    size, batch, model = bench.small(size, 8), bench.small(batch, 2), bench.small(model, "DiT-Ti/2")
    own = random_dit(bench, model, size)
    moments, _, labels, _ = data = batch_of(bench, batch, size)
    gate, r, expected = same_losses(bench, own, data, full_losses(bench, own, moments), steps=1)
    other = copy.deepcopy(own)
    ours, theirs = our_training(bench, own), our_training(bench, other, "full")
    sides = bench.first(name, lambda: [side(moments, labels, r)[0].mean().cpu() for side in (ours, theirs)])
    gate += [(apart(found, expected), bench.tolerance) for found in sides]
    work = batch * count_flops(model, size, PEFT)
    times = bench.time(lambda: ours(moments, labels), lambda: theirs(moments, labels), work=work)
    yield row_of(name, what, times, goal, gate=gate, against="full")


def precisions(bench, name, what, model, batch, half, goal=None, size=32):
    """A PEFT step in half precision against one in float32, both ours."""
    size, batch, model = bench.small(size, 8), bench.small(batch, 2), bench.small(model, "DiT-Ti/2")
    own = random_dit(bench, model, size)
    moments, _, labels, _ = batch_of(bench, batch, size)
    r = bench_official.stream(0, (batch, 4, size, size), bench.device)
    ours, theirs = our_training(bench, copy.deepcopy(own), half=half), our_training(bench, own, half="no")
    losses = bench.first(name, lambda: [side(moments, labels, r)[0].mean() for side in (ours, theirs)])
    times = bench.time(lambda: ours(moments, labels), lambda: theirs(moments, labels))
    yield row_of(name, what, times, goal, gate=[(apart(*losses), bench.tolerance_of(half))], against="float32")


def alone(bench, name, what, model, batch, rate, size):
    """A PEFT step, how many images a second."""
    size, batch, model = bench.small(size, 8), bench.small(batch, 2), bench.small(model, "DiT-Ti/2")
    own = random_dit(bench, model, size)
    moments, _, labels, _ = batch_of(bench, batch, size)
    ours = our_training(bench, own)
    bench.first(name, lambda: ours(moments, labels))
    times = bench.time(lambda: ours(moments, labels), work=batch * count_flops(model, size, PEFT))
    row = row_of(name, what, times, images=batch)
    row.goal, row.at_least = rate, True
    yield row


def update(bench, name, what, model, goal):
    """The optimizer's step and the average's after it, on the parameters of a model alone: no forward or backward pass."""
    model = bench.small(model, "DiT-Ti/2")
    with torch.device("meta"):
        ours = DiT_models[model](num_classes=bench.classes, num_super_classes=11)
    torch.manual_seed(0)
    theirs = bench_official.as_large(bench.official, ours).to_empty(device=bench.device)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=STD)
    average = copy.deepcopy(theirs).requires_grad_(False)
    chosen = select(theirs, METHODS[PEFT])
    assert chosen.keys() == select(ours, METHODS[PEFT]).keys()
    own = {key: torch.nn.Parameter(p.detach().clone()) for key, p in chosen.items()}
    grads = {key: torch.randn_like(p) for key, p in chosen.items()}
    accelerator = Accelerator(cpu=not bench.gpu)
    ema, optimizer = EMA(own, 0.9), accelerator.prepare(adamw(own, 1e-4, 1e-4))
    step = GuardedOptimizer(accelerator, optimizer, own.values())
    official = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0)

    def mine():
        for key, p in own.items():
            p.grad = grads[key]
        step.step()
        ema.update(0)

    def others():
        for key, p in chosen.items():
            p.grad = grads[key]
        official.step()
        bench.official.update_ema(average, theirs, decay=0.9)

    for _ in range(2):
        mine(), others()
    averages = dict(average.named_parameters())
    moved = 1e-4  # a step of AdamW
    gate = [
        (max((p - chosen[key]).abs().max().item() for key, p in own.items()) / moved, 1e-3),
        (max((a - averages[key]).abs().max().item() for key, a in ema.average.items()) / moved, 1e-3),
    ]
    # in float32: AdamW reads p, gradient and two moments and writes three of them; the norm reads; the average 2 and 1
    work = 11 * 4 * sum(p.numel() for p in own.values())
    yield row_of(name, what, bench.time(mine, others, "copy", work), goal, gate=gate)


# ---- what is counted -----------------------------------------------------------------------------


def flops(bench, name, what, model, size, goal):
    """FLOP of a PEFT step over those of a full step; a count, the same everywhere."""
    full, peft = (count_flops(model, size, method) / 1e9 for method in ("full", PEFT))
    row = Row(name, what, "GFLOP an image", peft, ratio=peft / full, goal=goal, slack=0.005, spread=f"full {full:.1f}")
    if row.ratio < goal * (1 - row.slack):
        row.faults.append("less than there is to compute")
    yield row


def saved(bench, name, what, model, goal):
    """Bytes that the forward pass keeps for the backward pass, PEFT over full; a count, the same everywhere."""
    counted = {}
    for method in ("full", PEFT):
        dit = DiT_models[model](num_classes=4).train()
        select(dit, METHODS[method])
        counted[method], _ = memory.activation_bytes(dit, nullcontext)
    mib = {method: size / 2**20 for method, size in counted.items()}
    ratio = mib[PEFT] / mib["full"]
    yield Row(name, what, "MiB an image", mib[PEFT], ratio=ratio, goal=goal, spread=f"full {mib['full']:.1f}")


def peak(bench, name, what, model, batch, goal, most, size=32):
    """Most GPU memory that a step takes, PEFT over full."""
    gib = {}
    for method in ("full", PEFT):
        step = our_training(bench, random_dit(bench, bench.small(model, "DiT-Ti/2"), bench.small(size, 8)), method)
        moments, _, labels, _ = batch_of(bench, bench.small(batch, 2), bench.small(size, 8))
        step(moments, labels)
        if bench.gpu:
            torch.cuda.reset_peak_memory_stats()
        step(moments, labels)
        gib[method] = torch.cuda.max_memory_allocated() / 2**30 if bench.gpu else None
        del step
        gc.collect()
    if not bench.gpu:
        yield Row(name, what, "GiB", None, faults=[GPU_ALONE])
        return
    ratio = gib[PEFT] / gib["full"]
    yield Row(name, what, "GiB", gib[PEFT], ratio=ratio, goal=goal, spread=f"full {gib['full']:.2f}")
    yield Row(f"{name}-most", what, "GiB", gib[PEFT], goal=most)


def waits(bench, name, what, model, batch, size=32):
    """How often a step waits for the GPU, ours and the official."""
    size, batch, model = bench.small(size, 8), bench.small(batch, 2), bench.small(model, "DiT-Ti/2")
    own = random_dit(bench, model, size)
    twin = bench_official.twin(bench.official, own) if bench.official else None
    moments, latents, labels, _ = batch_of(bench, batch, size)
    sides = [(our_training(bench, own, compiled=False), moments)]
    sides += [(bench_official.training(bench.official, twin), latents)] if twin else []
    counts = []
    for side, x in sides:
        side(x, labels)  # the first puts tables on the GPU
        counts.append(count_waits(lambda: side(x, labels)))  # noqa: B023
    yield Row(name, what, "waits", *counts, goal=0, faults=[] if bench.gpu else [GPU_ALONE])
