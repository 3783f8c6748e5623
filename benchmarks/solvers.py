"""Measure the error of each sampler with few steps, on the quick start's base model.

    python -m benchmarks.solvers > benchmarks/solvers.md

Writes Markdown to stdout; takes 5 minutes on one core.
"""

import os
from collections.abc import Callable

import diffusers
import numpy as np
import torch
from tqdm import tqdm

from checkpoint.loading import load_adapted
from diffusion import create_diffusion, space_timesteps
from guidance import Guidance, guided
from runtime.cli import Parser, run_command
from runtime.text import markdown_table
from sampling.samplers import draw_noise, noise_stream, run_sampler, run_solver, solver_timesteps

SOLVERS = ("ddim", "dpm++", "unipc")
STEPS, SPACED_STEPS = (5, 10, 15, 20, 25, 50, 100, 250), (5, 10, 20, 50)
SCALES, ALL = (1.0, 2.0), 1000
ABOUT = """The error is the relative error of the latents: the mean over images of |x - solution| / |solution|, all from the
same noise. The solution of the probability flow is taken from DPM-Solver++ on all 1,000 timesteps; UniPC's distance
from it there shows how accurate it is. A step is one prediction, so all samplers cost the same. DDPM has no such error:
it draws noise at every step, so each number of steps gives another image.

`dpm++` and `unipc` are of order 2 and use timesteps that are evenly spaced in the square root of t; the second table
shows why. Their last step goes from the last timestep to the x_0 predicted there. All this was measured on a small
model with 8 x 8 latents.
"""
EXAMPLES = """
    python -m benchmarks.solvers > benchmarks/solvers.md
    python -m benchmarks.solvers --images 2
"""


def even_in_log_snr(steps: int) -> np.ndarray:
    """Return timesteps int64 (steps,) evenly spaced in the log of the signal-to-noise ratio, rounded, without repeats."""
    alpha_bar = create_diffusion("").alphas_cumprod
    log_snr = np.log(alpha_bar / (1 - alpha_bar))
    wanted = np.linspace(log_snr[-1], log_snr[0], steps)
    times = np.interp(wanted, log_snr[::-1], np.arange(1000)[::-1]).round().astype(np.int64)
    return np.maximum(times, np.arange(steps)[::-1])


SPACINGS = {  # name: steps -> timesteps from 999 down; the two of diffusers do not reach 0
    "root of t": solver_timesteps,
    "t, as DDIM's": lambda steps: np.array(sorted(space_timesteps(1000, str(steps)), reverse=True)),
    "log SNR": even_in_log_snr,
    'diffusers "linspace"': lambda steps: np.linspace(999, 0, steps + 1).round()[:-1].astype(np.int64),
    'diffusers "trailing"': lambda steps: np.arange(1000, 0, -1000 / steps).round().astype(np.int64) - 1,
}


def make_problem(path: str | os.PathLike, images: int, scale: float) -> tuple[Callable, torch.Tensor]:
    """Return the guided prediction and the initial noise of `images` evenly spaced classes at a guidance scale."""
    model, description = load_adapted(path)
    labels = torch.linspace(0, description.hierarchy.num_classes - 1, images).long()
    keys = [(0, k) for k in range(images)]
    shape = model.in_channels, model.input_size, model.input_size
    predict = guided(model, labels, Guidance(scale=scale), keys)
    return torch.no_grad()(predict), draw_noise([noise_stream(*key) for key in keys], shape)


def error(found: torch.Tensor, solution: torch.Tensor) -> float:
    """Return the mean over images of the relative error of latents (N, C, h, w)."""
    return ((found - solution).flatten(1).norm(dim=1) / solution.flatten(1).norm(dim=1)).mean().item()


def table(head: list[str], rows: list[list]) -> str:
    """Return a Markdown table with all columns right-aligned."""
    return "\n".join(markdown_table(head, rows, align="r" * len(head)))


def measure(path: str | os.PathLike, images: int, scale: float, bar: tqdm) -> str:
    """Return the section of a guidance scale in Markdown."""
    predict, start = make_problem(path, images, scale)

    def sample(sampler, steps):
        bar.update()
        return run_sampler(predict, lambda: start, sampler, steps)

    solution = sample("dpm++", ALL)
    apart = {sampler: error(sample(sampler, ALL), solution) for sampler in ("ddim", "unipc")}
    rows = [[steps, *(f"{error(sample(sampler, steps), solution):.4f}" for sampler in SOLVERS)] for steps in STEPS]
    rows.append([ALL, f"{apart['ddim']:.4f}", "the solution", f"{apart['unipc']:.5f}"])
    spaced = []
    for name, timesteps in SPACINGS.items():
        bar.update()
        pairs = [[run_solver(predict, start, solver, timesteps(n)) for solver in SOLVERS[1:]] for n in SPACED_STEPS]
        spaced.append([name, *(" / ".join(f"{error(x, solution):.4f}" for x in pair) for pair in pairs)])
    heads = ["steps", *SOLVERS], ["timesteps even in", *(f"{n} steps" for n in SPACED_STEPS)]
    return f"## w = {scale:g}\n\n{table(heads[0], rows)}\n\n`dpm++` / `unipc` on other timesteps:\n\n{table(heads[1], spaced)}\n"


def main():
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    parser.add_argument("--ckpt", default="examples/glyphs/base.safetensors", help="adapter to sample from")
    parser.add_argument("--images", type=int, default=8, help="images to average over")
    args = parser.parse_args()
    if args.images < 1:
        raise ValueError(f"--images is {args.images}, expected 1 or more.")
    torch.set_num_threads(1)
    with tqdm(total=len(SCALES) * (3 + len(STEPS) * len(SOLVERS) + len(SPACINGS)), unit="run") as bar:
        parts = [measure(args.ckpt, args.images, scale, bar) for scale in SCALES]
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, diffusers, np))
    print("# Sampler error against number of steps\n")
    print(f"`python -m benchmarks.solvers --ckpt {args.ckpt} --images {args.images}`, {versions}, one CPU thread.\n")
    print(ABOUT)
    print("\n".join(parts), end="")


if __name__ == "__main__":
    run_command(main)
