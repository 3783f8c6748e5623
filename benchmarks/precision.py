"""Train the same batches in float32, bfloat16 and float16 side by side: do the losses stay finite, and how far apart?

    python -m benchmarks.precision --out benchmarks/precision_GPU_DATE.md

Weights, latents and labels are random, so nothing is downloaded; every precision begins with the same weights and sees the
same batches, timesteps and noise. Also images/s and peak memory of each. A GPU takes minutes for DiT-XL/2 and 200 steps.
"""

import gc
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from diffusion import create_diffusion
from finetune import EMA, METHODS, adamw, select, store_frozen
from models import DiT_models
from runtime.cli import Parser, run_command
from runtime.device import DTYPES, check_gpu
from runtime.files import atomic_write
from runtime.private import reset_accelerate
from training.logger import peak_memory_gb
from training.step import GuardedOptimizer, draw_step_noise, forward_backward

WEIGHT_STD = 0.02  # of the layers that a new DiT has at zero, so that every part of it matters


def random_dit(name, classes, seed):
    torch.manual_seed(seed)
    model = DiT_models[name](num_classes=classes, num_super_classes=11, parents=torch.arange(classes) % 11)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=WEIGHT_STD)
    return model


def train(precision, args):
    """(losses of the steps, gradient norms, images/s, peak GB) of a training in `precision`."""
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
        r = draw_step_noise(args.seed, step, args.batch_size, shape, False, 0.1, 0.0, device)
        labels = torch.randint(0, args.classes, (args.batch_size,), device=device)
        terms = forward_backward(accelerator, wrapped, diffusion, r["posterior"], labels, r, args.grad_accum)
        norms.append(update.step())
        ema.update(step)
        losses.append(terms[0].mean())
    rate = (args.steps - args.warmup) * args.batch_size / (synchronised_time(device) - begun)
    return torch.stack(losses).cpu(), torch.stack(norms).cpu(), rate, peak_memory_gb(device)


def synchronised_time(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def report(args, results):
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if name != "out")
    flags = flags.replace(str(args.precisions), " ".join(args.precisions))
    lines = [
        f"# Precision: {args.model}, {args.method}, {args.steps} steps on {device}",
        "",
        f"`python -m benchmarks.precision {flags}`, torch {torch.__version__}.",
        "Random weights and latents, the same in every row; differences are those of the losses to the first row's.",
        "",
        "| precision | steps with finite loss | updates passed over | first loss | last loss | largest difference | images/s "
        "| peak GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    expected = next(iter(results.values()))[0]
    for precision, (losses, norms, rate, peak) in results.items():
        finite = losses.isfinite()
        apart = ((losses - expected).abs() / expected)[finite].max() if finite.any() else float("nan")
        lines.append(
            f"| {precision} | {int(finite.sum())} of {len(losses)} | {int((~norms.isfinite()).sum())} | {losses[0]:.4f} "
            f"| {losses[-1]:.4f} | {100 * apart:.2f}% | {rate:.1f} | {peak:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=list(DiT_models), default="DiT-XL/2")
    add("--method", choices=list(METHODS), default="finediffusion")
    add("--precisions", nargs="+", choices=["no", "bf16", "fp16"], default=["no", "bf16", "fp16"])
    add("--steps", type=int, default=200)
    add("--warmup", type=int, default=10, help="steps that are not timed")
    add("--batch-size", type=int, default=32)
    add("--grad-accum", type=int, default=1)
    add("--classes", type=int, default=10_000)
    add("--lr", type=float, default=1e-4)
    add("--seed", type=int, default=0)
    add("--out", help="file for the table, in Markdown")
    args = parser.parse_args()
    if not 0 <= args.warmup < args.steps:
        raise ValueError(f"--warmup is {args.warmup}, expected 0 to {args.steps - 1}: change it or --steps.")
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
