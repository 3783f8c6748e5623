"""What test_standin_gpu.py needs to know, measured on the stand-in GPU and printed as one line of JSON.

One process imports everything. Then it forks for each card, before any CUDA call: a fork chooses its card and its memory
by environment variables.
"""

import gc
import json
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from helpers.commands import call
from helpers.launch import launch, worst
from helpers.tiny_files import write_images
from standin_gpu.standin import CARDS, Counters
from torch._dynamo.utils import counters as dynamo
from torch.nn.attention import SDPBackend

import sample
import sample_ddp
import train
from benchmarks.harness import Bench
from benchmarks.training_cases import make_batch, our_training, random_dit
from finetune import METHODS, select, store_frozen
from guidance import ALL_TIMESTEPS, Guidance
from runtime.device import DTYPES, resolve_precision
from sampling.samplers import SAMPLERS, sample_keyed, sample_latents
from sampling.speed import speed_up
from training import memory

SIZES = {256: (32, 64), 512: (64, 16)}  # pixels: side of the latents, images in a forward pass
GIB = 2**30


# ---- each card -----------------------------------------------------------------------------------


def attention_backends() -> dict[str, str]:
    """Return which kernel computes attention in training, by precision and number of tokens; heads of 72 as in XL."""
    found = {}
    for precision in ("no", "fp16", "bf16"):
        for tokens in (256, 1024):
            q = torch.empty(2, 16, tokens, 72, device="cuda", dtype=DTYPES[precision], requires_grad=True)
            found[f"{precision} {tokens}"] = SDPBackend(torch._fused_sdp_choice(q, q, q)).name
    return found


def strided_streams(model: torch.nn.Module, call) -> int:
    """Return how often a block of the model gets or gives a residual stream that is not contiguous during `call()`."""
    strided = []

    def look(block, arguments, output):
        strided.extend(x for x in (arguments[0], output) if not x.is_contiguous())

    hooks = [block.register_forward_hook(look) for block in model.blocks]
    call()
    for hook in hooks:
        hook.remove()
    return len(strided)


def training_step(half: str, size: int, images: int) -> dict:
    """Return counts and memory of a DiT-XL/2 step on latents of side `size`."""
    bench = Bench("cuda", half=half)
    model = random_dit(bench, "DiT-XL/2", size).train()
    parameters = select(model, METHODS["finediffusion"])
    store_frozen(model, DTYPES[half])
    activations = memory.activation_bytes(model, lambda: torch.autocast("cuda", DTYPES[half]))
    forecast = sum(memory.forecast(model, parameters, activations).need(images).values())
    step = our_training(bench, model)
    moments, _, labels, _ = make_batch(bench, images, size)
    strided = strided_streams(model, lambda: step(moments, labels))
    torch.cuda.reset_peak_memory_stats()
    counts = Counters().count(lambda: step(moments, labels))
    peak = torch.cuda.max_memory_allocated()
    return counts | {"strided": strided, "forecast": forecast / GIB, "peak": peak / GIB}


def training() -> dict:
    """Return the steps by image size, in the card's half precision."""
    half, found = resolve_precision("bf16", "cuda"), {}
    for pixels, sizes in SIZES.items():
        found[pixels] = training_step(half, *sizes)
        gc.collect()
    return found | {"precision": half}


def sampling() -> dict:
    """Return the counts of one guided step of DiT-XL/2 for each sampler, 32 images, and for one image with ddpm."""
    model = random_dit(Bench("cuda"), "DiT-XL/2", 32).requires_grad_(False)
    store_frozen(model, torch.bfloat16)
    speed_up(model, torch.bfloat16, compiled=False, swaps=False)
    runs = {name: (name, 32, ALL_TIMESTEPS) for name in SAMPLERS}
    runs |= {"interval": ("ddpm", 32, (300, 700)), "one image": ("ddpm", 1, ALL_TIMESTEPS)}
    found = {}
    for name, (sampler, images, interval) in runs.items():

        def sample(steps):
            guidance = Guidance("superclass", 4.0, interval=interval)  # noqa: B023
            options = dict(sampler=sampler, steps=steps, autocast=torch.bfloat16)  # noqa: B023
            return sample_keyed(model, [7] * images, [(0, k) for k in range(images)], guidance, **options)  # noqa: B023

        sample(2)
        few, many = (Counters().count(lambda: sample(steps)) for steps in (2, 6))  # noqa: B023
        found[name] = {key: (many[key] - few[key]) / 4 for key in few}
    return found


def compiled_graphs() -> dict:
    """Return how many graphs are compiled for training, a preview and training again, then for a last smaller part."""
    bench = Bench("cuda", half="bf16")
    model = random_dit(bench, "DiT-Ti/2", 8)
    model.compile_blocks(backend="aot_eager")  # the graphs are Inductor's, without its code
    step = our_training(bench, model)
    batches = {n: make_batch(bench, n, 8) for n in (8, 3)}
    train_on = lambda n: step(batches[n][0], batches[n][2])  # noqa: E731

    def preview():
        model.eval()
        with torch.autocast("cuda", torch.bfloat16):
            sample_latents(model, [0, 1], [0, 1], seed=0, cfg_scale=4.0, steps=2, sampler="ddim")
        model.train()

    found = {}
    for name, calls in (
        ("training", [lambda: train_on(8)]),
        ("with a preview", [preview, lambda: train_on(8), preview]),
        ("with a smaller part", [lambda: train_on(3), lambda: train_on(8)]),
    ):
        for each in calls:
            each()
        found[name] = dynamo["frames"]["ok"]
    return found | {"breaks": sum(dynamo["graph_break"].values())}


# ---- commands ------------------------------------------------------------------------------------

TRAIN = "--model DiT-Ti/2 --vae none --resume none --num-workers 0 --log-every 2 --preview-images 0".split()


def cramped(function: Callable) -> Callable:
    """Return the function on a card without memory."""

    def replacement(*arguments):
        os.environ["STANDIN_GIB"] = "0.45"
        torch.cuda.empty_cache()
        return function(*arguments)

    return replacement


def out_of_memory() -> dict:
    """Return the code and the last line of commands that run out of memory, by the place where they do."""
    found = {}

    def run(name, main, gib, *flags):
        os.environ["STANDIN_GIB"] = str(gib)
        torch.cuda.empty_cache()
        try:
            result = call(main, *flags)
            found[name] = result.code, (result.err or result.out).strip().split("\n")[-1]
        except torch.OutOfMemoryError as error:
            found[name] = 1, f"traceback: {error}"
        gc.collect()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = [
            *TRAIN,
            "--image-size",
            64,
            "--data-path",
            write_images(folder / "images", 64),
            "--results-dir",
            folder,
        ]
        flags += ["--max-steps", 2, "--global-batch-size"]
        run("backward pass", train.main, 0.8, *flags, 16, "--micro-batch", 16)
        with patch.object(train, "save_preview", cramped(train.save_preview)):
            run("preview", train.main, 0.8, *flags, 2, "--experiment", "run", "--preview-images", 16)
        found["preview"] += ((folder / "run/log.txt").read_text(), len(list(folder.glob("run/states/*"))))
        adapter = folder / "run/adapters/0000002.safetensors"
        flags = ["--ckpt", adapter, "--num-sampling-steps", 2, "--sample-dir", folder]
        run("sample_ddp", sample_ddp.main, 0.6, *flags, "--num-fid-samples", 64, "--per-proc-batch-size", 64)
        run("sample", sample.main, 0.6, *flags, "--per-class", 13, "--batch-size", 64)
    return found


def two_ranks() -> dict:
    """Return the exit code of a training run on two cards, the gradients it exchanges, and the adapters that it writes."""
    os.environ["STANDIN_COUNT"] = "2"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = write_images(folder / "images", 8)
        flags = [*TRAIN, "--image-size", 8, "--global-batch-size", 8, "--data-path", images, "--results-dir", folder]
        codes = launch(train.main, [*flags, "--max-steps", 4, "--experiment", "run"], folder, world=2)
        log = (folder / "run/log.txt").read_text() if worst(codes) == 0 else (folder / "err0").read_text()
        adapters = sorted(path.name for path in folder.glob("run/adapters/*"))
        return {"code": worst(codes), "log": log, "adapters": adapters}


# ---- the forks -----------------------------------------------------------------------------------


def on_card(card: str) -> dict:
    found = {"name": torch.cuda.get_device_name(), "attention": attention_backends(), "training": training()}
    return found | ({"sampling": sampling(), "graphs": compiled_graphs()} if card == "h200" else {})


def fork(card: str, measure: Callable[[], dict], path: Path) -> int:
    """Write the result of `measure()` on a card to `path` in a forked process; return its id."""
    child = os.fork()
    if child:
        return child
    os.environ["STANDIN_GPU"] = card
    try:
        path.write_text(json.dumps(measure()))
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def main():
    checks = {card: (card, lambda card=card: on_card(card)) for card in CARDS}
    checks |= {"out of memory": ("h200", out_of_memory), "two ranks": ("h200", two_ranks)}
    with tempfile.TemporaryDirectory() as folder:
        for name, (card, measure) in checks.items():
            os.waitpid(fork(card, measure, Path(folder, name)), 0)
        paths = [path for name in checks if (path := Path(folder, name)).exists()]
        print(json.dumps({path.name: json.loads(path.read_text()) for path in paths}))


if __name__ == "__main__":
    main()
