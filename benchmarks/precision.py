"""Train on the same batches in float32, bfloat16 and float16, and compare the losses.

    python -m benchmarks.precision --out benchmarks/precision_GPU_DATE.md

Weights, latents and labels are random; nothing is downloaded. Every precision starts from the same weights and gets the
same batches, timesteps and noise. The table shows whether the losses stay finite, how far they differ, images/s and peak
memory. On a GPU, 200 steps of DiT-XL/2 take minutes.
"""

import argparse
import gc
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from diffusion import create_diffusion
from finetune import EMA, METHODS, adamw, select, store_frozen
from models import DiT_models
from runtime.cli import Parser, run_command
from runtime.device import DTYPES, check_gpu
from runtime.files import atomic_write
from runtime.private import reset_accelerate
from runtime.text import markdown_table
from training.logger import peak_memory_gb
from training.step import GuardedOptimizer, draw_step_noise, forward_backward

WEIGHT_STD = 0.02  # of the layers that are zero in a new DiT, so that every part matters
EXAMPLES = """
    python -m benchmarks.precision --out benchmarks/precision.md
    python -m benchmarks.precision --model DiT-S/4 --precisions no bf16 --steps 50 --batch-size 8
"""


def random_dit(name: str, classes: int, seed: int) -> nn.Module:
    """Return a DiT with `classes` classes under 11 superclasses and no layer zero."""
    torch.manual_seed(seed)
    model = DiT_models[name](num_classes=classes, num_super_classes=11, parents=torch.arange(classes) % 11)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=WEIGHT_STD)
    return model


def train(precision: str, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Train in `precision`; return the losses and gradient norms (steps,), images/s and peak memory in GB."""
    reset_accelerate()  # another precision needs another Accelerator
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())
    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = random_dit(args.model, args.classes, args.seed)
    parameters = select(model, METHODS[args.method])
    store_frozen(model, DTYPES[precision])
    model.to(device).train()
    ema = EMA(parameters, 0.9999)
    wrapped, optimizer = accelerator.prepare(model, adamw(parameters, args.lr, args.lr))
    update = GuardedOptimizer(accelerator, optimizer, parameters.values(), sticky=False)
    diffusion, shape = create_diffusion(""), (4, model.input_size, model.input_size)
    losses, norms = [], []
    for step in range(args.steps):
        if step == args.warmup:
            begun = synchronised_time(device)
        noise = draw_step_noise(args.seed, step, args.batch_size, shape, False, 0.1, 0.0, device)
        labels = torch.randint(0, args.classes, (args.batch_size,), device=device)
        terms = forward_backward(
            accelerator, wrapped, diffusion, noise["posterior"].__getitem__, labels, noise, args.grad_accum
        )
        norms.append(update.step())
        ema.update(step)
        losses.append(terms[0].mean())
    rate = (args.steps - args.warmup) * args.batch_size / (synchronised_time(device) - begun)
    return torch.stack(losses).cpu(), torch.stack(norms).cpu(), rate, peak_memory_gb(device)


def synchronised_time(device: torch.device) -> float:
    """Return the time in seconds, after the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def report(args: argparse.Namespace, results: dict[str, tuple]) -> str:
    """Return the page in Markdown; results: {precision: the result of `train`}"""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if name != "out")
    flags = flags.replace(str(args.precisions), " ".join(args.precisions))
    rows, expected = [], next(iter(results.values()))[0]
    for precision, (losses, norms, rate, peak) in results.items():
        finite = losses.isfinite()
        apart = ((losses - expected).abs() / expected)[finite].max() if finite.any() else float("nan")
        counts = f"{int(finite.sum())} of {len(losses)}", int((~norms.isfinite()).sum())
        rows.append(
            [
                precision,
                *counts,
                f"{losses[0]:.4f}",
                f"{losses[-1]:.4f}",
                f"{100 * apart:.2f}%",
                f"{rate:.1f}",
                f"{peak:.2f}",
            ]
        )
    titles = (
        "precision",
        "steps with finite loss",
        "updates skipped",
        "first loss",
        "last loss",
        "largest difference",
        "images/s",
        "peak GB",
    )
    lines = [
        f"# Precision: {args.model}, {args.method}, {args.steps} steps on {device}",
        "",
        f"`python -m benchmarks.precision {flags}`, torch {torch.__version__}.",
        "Random weights and latents, the same in every row; differences are relative to the losses of the first row.",
        "",
        *markdown_table(titles, rows, align="lrrrrrrr"),
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=list(DiT_models), default="DiT-XL/2", help="preset of models.py")
    add("--method", choices=list(METHODS), default="finediffusion", help="parameters to train, see finetune.py")
    add("--classes", type=int, default=10_000, help="classes of the model")
    add = parser.add_argument_group("training").add_argument
    add(
        "--precisions",
        nargs="+",
        choices=["no", "bf16", "fp16"],
        default=["no", "bf16", "fp16"],
        help="precisions to compare, the first is the reference",
    )
    add("--steps", type=int, default=200, help="training steps")
    add("--warmup", type=int, default=10, help="steps before the timing starts")
    add("--batch-size", type=int, default=32, help="images per step")
    add("--grad-accum", type=int, default=1, help="forward passes per step")
    add("--lr", type=float, default=1e-4, help="learning rate")
    add("--seed", type=int, default=0, help="seed of weights, batches and noise")
    add = parser.add_argument_group("output").add_argument
    add("--out", help="file for the table, in Markdown")
    args = parser.parse_args()
    if not 0 <= args.warmup < args.steps:
        raise ValueError(f"--warmup is {args.warmup}, expected 0 to {args.steps - 1}: choose fewer, or more --steps.")
    check_gpu("cuda" if torch.cuda.is_available() else "cpu")
    results = {}
    for precision in args.precisions:
        results[precision] = train(precision, args)
        gc.collect()
        print(f"{precision}: done", flush=True)
    text = report(args, results)
    print(text)
    if args.out:
        atomic_write(args.out, lambda part: Path(part).write_text(text))


if __name__ == "__main__":
    run_command(main)
