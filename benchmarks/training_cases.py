"""Cases of `benchmarks.speed` that train. Each takes the Bench, its name and its settings, and yields Rows."""

import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks import official
from benchmarks.harness import (
    EXACT,
    NEEDS_GPU,
    Bench,
    Row,
    count_flops,
    count_waits,
    make_row,
    relative_difference,
)
from diffusion import create_diffusion
from finetune import EMA, METHODS, adamw, select, store_frozen
from hierarchy import Hierarchy
from models import DiT_models
from runtime.device import DTYPES
from runtime.private import accelerator_state, reset_accelerate, restore_accelerator_state
from training import memory
from training.step import GuardedOptimizer, draw_step_noise, forward_backward, sample_posterior

STD = 0.02  # of the layers that are zero in a new DiT and would hide all others
PEFT = "finediffusion"


# ---- models and steps ----------------------------------------------------------------------------


def random_dit(bench: Bench, name: str, size: int) -> nn.Module:
    """Return a DiT for latents of side `size` and iNaturalist's classes and superclasses, with no layer zero."""
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


def our_training(
    bench: Bench, model: nn.Module, method: str = PEFT, half: str | None = None, compiled: bool | None = None
) -> Callable:
    """Return step(x, y, noise=None) -> (4, n) as `forward_backward`: one step of train.py.

    x: cached moments (n, F, 2C, h, w); y: labels (n,); noise: as `draw_step_noise` returns it
    """
    half = bench.half if half is None else half
    reset_accelerate()  # another precision needs another Accelerator
    accelerator = Accelerator(mixed_precision=half, cpu=not bench.gpu)
    state = accelerator_state()  # another Accelerator replaces it
    device = bench.device
    parameters = select(model, METHODS[method])
    store_frozen(model, DTYPES[half])
    model.train()
    diffusion = create_diffusion("")
    if bench.compiled if compiled is None else compiled:
        model.compile_blocks()
        diffusion.compile_losses()
    ema = EMA(parameters, 0.9999)
    wrapped, optimizer = accelerator.prepare(model, adamw(parameters, 1e-4, 1e-4))
    update = GuardedOptimizer(accelerator, optimizer, parameters.values())
    numbers = itertools.count()

    def step(x, y, noise=None):
        restore_accelerator_state(state)
        number = next(numbers)
        noise = noise or draw_step_noise(0, number, len(y), (4, *x.shape[-2:]), True, 0.1, 0.0, device)
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        latents = sample_posterior(x, noise["flip"], noise["posterior"], None)
        terms = forward_backward(accelerator, wrapped, diffusion, latents.__getitem__, y, noise)
        update.step()
        ema.update(number)
        return terms

    return step


def make_batch(bench: Bench, n: int, size: int, image: int | None = None) -> list[torch.Tensor | None]:
    """Return random moments (n, 2, 8, size, size) as they are cached, latents, labels, and images or None.

    image: pixels per side of the images
    """
    generator = torch.Generator().manual_seed(1)
    moments = torch.randn(n, 2, 8, size, size, generator=generator).half()
    latents = moments[:, 0, :4].float()
    labels = torch.randint(bench.classes, (n,), generator=generator)
    images = torch.randn(n, 3, image, image, generator=generator) if image else None
    tensors = moments, latents, labels, images
    return [t.pin_memory() if bench.gpu and t is not None else t for t in tensors]


def compare_losses(
    bench: Bench, model: nn.Module, batch: list, loss_of: Callable, steps: int = 3
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor], torch.Tensor]:
    """Run the first PEFT steps of both sides in float32; return the gate, and the noise and loss of the first step.

    loss_of(seed, latents, labels, noise) -> loss of the other side
    """
    moments, latents, labels, _ = batch
    draws = [official.draw_step_noise(seed, latents.shape, bench.device) for seed in range(steps)]
    ours = our_training(bench, copy.deepcopy(model), half="no", compiled=False)
    with bench.exact():
        expected = torch.tensor([loss_of(seed, latents, labels, noise) for seed, noise in enumerate(draws)])
        found = torch.stack([ours(moments, labels, noise)[0].mean() for noise in draws]).cpu()
    return [(relative_difference(found, expected), EXACT)], draws[0], expected[0]


def official_losses(bench: Bench, twin: nn.Module) -> Callable:
    """Return the `loss_of` of the official code, for `compare_losses`."""
    step = official.training(bench.official, copy.deepcopy(twin))

    def loss(seed, latents, labels, noise):
        torch.manual_seed(seed)
        return step(latents, labels)

    return loss


def full_losses(bench: Bench, model: nn.Module, moments: torch.Tensor) -> Callable:
    """Return the `loss_of` of our full fine-tuning, for `compare_losses`."""
    step = our_training(bench, copy.deepcopy(model), "full", half="no", compiled=False)
    return lambda seed, latents, labels, noise: step(moments, labels, noise)[0].mean().item()


# ---- steps against steps -------------------------------------------------------------------------


def step(
    bench: Bench,
    name: str,
    about: str,
    model: str,
    batch: int,
    goal: float,
    rate: float | None = None,
    size: int = 32,
    vae: Callable | None = None,
) -> Iterator[Row]:
    """Time a PEFT step against the official one, both on latents; with `vae(bench)` the official one encodes images.

    rate: smallest images/s
    """
    size, batch, model = bench.small(size, 8), bench.small(batch, 2), bench.small(model, "DiT-Ti/2")
    own = random_dit(bench, model, size)
    twin = official.twin(bench.official, own)
    moments, latents, labels, images = data = make_batch(bench, batch, size, 8 * size if vae else None)
    gate, noise, expected = compare_losses(bench, own, data, official_losses(bench, twin))
    ours = our_training(bench, own)
    theirs = official.training(bench.official, twin, vae and vae(bench))
    found = bench.first_call(name, lambda: ours(moments, labels, noise)[0].mean().cpu())
    times = bench.time(
        lambda: ours(moments, labels),
        lambda: theirs(images if vae else latents, labels),
        work=batch * count_flops(model, size, PEFT),
    )
    gate.append((relative_difference(found, expected), bench.tolerance))
    row = make_row(name, about, times, goal, batch if rate else None, gate)
    yield row
    if rate:
        yield Row(f"{name}-rate", about, row.unit, row.ours, goal=rate, at_least=True, gate=row.gate, faults=row.faults)


def methods(
    bench: Bench, name: str, about: str, model: str, batch: int, goal: float | None, size: int = 32
) -> Iterator[Row]:
    """Time our PEFT step against our step of full fine-tuning."""
    size, batch, model = bench.small(size, 8), bench.small(batch, 2), bench.small(model, "DiT-Ti/2")
    own = random_dit(bench, model, size)
    moments, _, labels, _ = data = make_batch(bench, batch, size)
    gate, noise, expected = compare_losses(bench, own, data, full_losses(bench, own, moments), steps=1)
    other = copy.deepcopy(own)
    ours, theirs = our_training(bench, own), our_training(bench, other, "full")
    sides = bench.first_call(name, lambda: [side(moments, labels, noise)[0].mean().cpu() for side in (ours, theirs)])
    gate += [(relative_difference(found, expected), bench.tolerance) for found in sides]
    work = batch * count_flops(model, size, PEFT)
    times = bench.time(lambda: ours(moments, labels), lambda: theirs(moments, labels), work=work)
    yield make_row(name, about, times, goal, gate=gate, against="full")


def precisions(
    bench: Bench,
    name: str,
    about: str,
    model: str,
    batch: int,
    half: str,
    goal: float | None = None,
    size: int = 32,
) -> Iterator[Row]:
    """Time our PEFT step in half precision against ours in float32."""
    size, batch, model = bench.small(size, 8), bench.small(batch, 2), bench.small(model, "DiT-Ti/2")
    own = random_dit(bench, model, size)
    moments, _, labels, _ = make_batch(bench, batch, size)
    noise = official.draw_step_noise(0, (batch, 4, size, size), bench.device)
    ours, theirs = our_training(bench, copy.deepcopy(own), half=half), our_training(bench, own, half="no")
    losses = bench.first_call(name, lambda: [side(moments, labels, noise)[0].mean() for side in (ours, theirs)])
    times = bench.time(lambda: ours(moments, labels), lambda: theirs(moments, labels))
    yield make_row(
        name, about, times, goal, gate=[(relative_difference(*losses), bench.tolerance_of(half))], against="float32"
    )


def step_rate(bench: Bench, name: str, about: str, model: str, batch: int, rate: float, size: int) -> Iterator[Row]:
    """Measure the images/s of a PEFT step; `rate` is the goal."""
    size, batch, model = bench.small(size, 8), bench.small(batch, 2), bench.small(model, "DiT-Ti/2")
    own = random_dit(bench, model, size)
    moments, _, labels, _ = make_batch(bench, batch, size)
    ours = our_training(bench, own)
    bench.first_call(name, lambda: ours(moments, labels))
    times = bench.time(lambda: ours(moments, labels), work=batch * count_flops(model, size, PEFT))
    row = make_row(name, about, times, images=batch)
    row.goal, row.at_least = rate, True
    yield row


def update(bench: Bench, name: str, about: str, model: str, goal: float) -> Iterator[Row]:
    """Time the optimizer step and the EMA update on the parameters of a model, without forward and backward pass."""
    model = bench.small(model, "DiT-Ti/2")
    with torch.device("meta"):
        ours = DiT_models[model](num_classes=bench.classes, num_super_classes=11)
    torch.manual_seed(0)
    theirs = official.same_size(bench.official, ours).to_empty(device=bench.device)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=STD)
    average = copy.deepcopy(theirs).requires_grad_(False)
    chosen = select(theirs, METHODS[PEFT])
    assert chosen.keys() == select(ours, METHODS[PEFT]).keys()
    own = {key: torch.nn.Parameter(p.detach().clone()) for key, p in chosen.items()}
    grads = {key: torch.randn_like(p) for key, p in chosen.items()}
    accelerator = Accelerator(cpu=not bench.gpu)
    ema = EMA(own, 0.9)
    guarded = GuardedOptimizer(accelerator, accelerator.prepare(adamw(own, 1e-4, 1e-4)), own.values())
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0)

    def our_update():
        for key, p in own.items():
            p.grad = grads[key]
        guarded.step()
        ema.update(0)

    def their_update():
        for key, p in chosen.items():
            p.grad = grads[key]
        optimizer.step()
        bench.official.update_ema(average, theirs, decay=0.9)

    for _ in range(2):
        our_update(), their_update()
    averages = dict(average.named_parameters())
    moved = 1e-4  # size of an AdamW step
    gate = [
        (max((p - chosen[key]).abs().max().item() for key, p in own.items()) / moved, 1e-3),
        (max((a - averages[key]).abs().max().item() for key, a in ema.average.items()) / moved, 1e-3),
    ]
    # in float32: AdamW reads p, gradient and two moments and writes p and the moments; the norm reads the gradient; the
    # average reads two tensors and writes one
    work = 11 * 4 * sum(p.numel() for p in own.values())
    yield make_row(name, about, bench.time(our_update, their_update, "copy", work), goal, gate=gate)


# ---- counts --------------------------------------------------------------------------------------


def flops(bench: Bench, name: str, about: str, model: str, size: int, goal: float) -> Iterator[Row]:
    """Count the FLOP of a PEFT step over a full step; the same on every machine."""
    full, peft = (count_flops(model, size, method) / 1e9 for method in ("full", PEFT))
    row = Row(name, about, "GFLOP an image", peft, ratio=peft / full, goal=goal, slack=0.005, spread=f"full {full:.1f}")
    if row.ratio < goal * (1 - row.slack):
        row.faults.append("fewer FLOP than the step needs")
    yield row


def saved_activations(bench: Bench, name: str, about: str, model: str, goal: float) -> Iterator[Row]:
    """Count the bytes that the forward pass keeps for the backward pass, PEFT over full; the same on every machine."""
    counted = {}
    for method in ("full", PEFT):
        dit = DiT_models[model](num_classes=4).train()
        select(dit, METHODS[method])
        counted[method], _ = memory.activation_bytes(dit, nullcontext)
    mib = {method: size / 2**20 for method, size in counted.items()}
    ratio = mib[PEFT] / mib["full"]
    yield Row(name, about, "MiB an image", mib[PEFT], ratio=ratio, goal=goal, spread=f"full {mib['full']:.1f}")


def peak_memory(
    bench: Bench, name: str, about: str, model: str, batch: int, goal: float, most: float, size: int = 32
) -> Iterator[Row]:
    """Measure the peak GPU memory of a step, PEFT over full; `most`: the largest GiB for PEFT."""
    gib = {}
    for method in ("full", PEFT):
        step = our_training(bench, random_dit(bench, bench.small(model, "DiT-Ti/2"), bench.small(size, 8)), method)
        moments, _, labels, _ = make_batch(bench, bench.small(batch, 2), bench.small(size, 8))
        step(moments, labels)
        if bench.gpu:
            torch.cuda.reset_peak_memory_stats()
        step(moments, labels)
        gib[method] = torch.cuda.max_memory_allocated() / 2**30 if bench.gpu else None
        del step
        gc.collect()
    if not bench.gpu:
        yield Row(name, about, "GiB", None, faults=[NEEDS_GPU])
        return
    ratio = gib[PEFT] / gib["full"]
    yield Row(name, about, "GiB", gib[PEFT], ratio=ratio, goal=goal, spread=f"full {gib['full']:.2f}")
    yield Row(f"{name}-most", about, "GiB", gib[PEFT], goal=most)


def waits(bench: Bench, name: str, about: str, model: str, batch: int, size: int = 32) -> Iterator[Row]:
    """Count how often a training step waits for the GPU, ours and the official one."""
    size, batch, model = bench.small(size, 8), bench.small(batch, 2), bench.small(model, "DiT-Ti/2")
    own = random_dit(bench, model, size)
    twin = official.twin(bench.official, own) if bench.official else None
    moments, latents, labels, _ = make_batch(bench, batch, size)
    sides = [(our_training(bench, own, compiled=False), moments)]
    sides += [(official.training(bench.official, twin), latents)] if twin else []
    counts = []
    for side, x in sides:
        side(x, labels)  # the first call copies tables to the GPU
        counts.append(count_waits(lambda: side(x, labels)))  # noqa: B023
    yield Row(name, about, "waits", *counts, goal=0, faults=[] if bench.gpu else [NEEDS_GPU])
