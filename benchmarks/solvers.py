"""How far each sampler with few steps is from the solution, on the quick start's base model.

    python -m benchmarks.solvers > benchmarks/solvers.md

Markdown on stdout; 5 minutes on one core.
"""

import diffusers
import numpy as np
import torch
from tqdm import tqdm

from checkpoint.loading import load_adapted
from diffusion import create_diffusion, space_timesteps
from guidance import Guidance, guided
from runtime.cli import Parser, run_command
from sampling.samplers import draw_noise, noise_stream, run_sampler, run_solver, solver_timesteps

SOLVERS = ("ddim", "dpm++", "unipc")
STEPS, SPACED_STEPS = (5, 10, 15, 20, 25, 50, 100, 250), (5, 10, 20, 50)
SCALES, ALL = (1.0, 2.0), 1000
ABOUT = """The error is that of the latents, relative: the mean over images of |x - solution| / |solution|, all from the
same noise. The solution of the probability flow is that of DPM-Solver++ on all 1,000 timesteps; how far UniPC is from
it there says how well it is known. A step is one prediction, and all samplers cost the same. DDPM has no such error:
the noise of its steps makes another picture at each number of them.

`dpm++` and `unipc` are of order 2 and take timesteps that are even in the root of t; the second table is why. Their
last step goes from the last timestep to the x_0 predicted there. All this is measured on a small model of 8 x 8
latents.
"""


def even_in_log_snr(steps):
    """Of the log of the signal-to-noise ratio, rounded, each timestep once."""
    alpha_bar = create_diffusion("").alphas_cumprod
    log_snr = np.log(alpha_bar / (1 - alpha_bar))
    wanted = np.linspace(log_snr[-1], log_snr[0], steps)
    times = np.interp(wanted, log_snr[::-1], np.arange(1000)[::-1]).round().astype(np.int64)
    return np.maximum(times, np.arange(steps)[::-1])


SPACINGS = {  # from 999 down; diffusers' two do not reach 0
    "root of t": solver_timesteps,
    "t, as DDIM's": lambda steps: np.array(sorted(space_timesteps(1000, str(steps)), reverse=True)),
    "log SNR": even_in_log_snr,
    'diffusers "linspace"': lambda steps: np.linspace(999, 0, steps + 1).round()[:-1].astype(np.int64),
    'diffusers "trailing"': lambda steps: np.arange(1000, 0, -1000 / steps).round().astype(np.int64) - 1,
}


def problem(path, images, scale):
    """(predict, start) of `images` classes, evenly spread, at a guidance scale."""
    model, description = load_adapted(path)
    labels = torch.linspace(0, description.hierarchy.num_classes - 1, images).long()
    keys = [(0, k) for k in range(images)]
    shape = model.in_channels, model.input_size, model.input_size
    predict = guided(model, labels, Guidance(scale=scale), keys)
    return torch.no_grad()(predict), draw_noise([noise_stream(*key) for key in keys], shape)


def error(found, solution):
    return ((found - solution).flatten(1).norm(dim=1) / solution.flatten(1).norm(dim=1)).mean().item()


def table(head, rows):
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def measure(path, images, scale, bar):
    """Markdown of one guidance scale."""
    predict, start = problem(path, images, scale)

    def found(sampler, steps):
        bar.update()
        return run_sampler(predict, lambda: start, sampler, steps)

    solution = found("dpm++", ALL)
    apart = {sampler: error(found(sampler, ALL), solution) for sampler in ("ddim", "unipc")}
    rows = [[steps, *(f"{error(found(sampler, steps), solution):.4f}" for sampler in SOLVERS)] for steps in STEPS]
    rows.append([ALL, f"{apart['ddim']:.4f}", "the solution", f"{apart['unipc']:.5f}"])
    spaced = []
    for name, timesteps in SPACINGS.items():
        bar.update()
        pairs = [[run_solver(predict, start, solver, timesteps(n)) for solver in SOLVERS[1:]] for n in SPACED_STEPS]
        spaced.append([name, *(" / ".join(f"{error(x, solution):.4f}" for x in pair) for pair in pairs)])
    heads = ["steps", *SOLVERS], ["timesteps even in", *(f"{n} steps" for n in SPACED_STEPS)]
    return f"## w = {scale:g}\n\n{table(heads[0], rows)}\n\n`dpm++` / `unipc` on other timesteps:\n\n{table(heads[1], spaced)}\n"


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", default="examples/glyphs/base.safetensors")
    parser.add_argument("--images", type=int, default=8)
    args = parser.parse_args()
    if args.images < 1:
        raise ValueError(f"--images is {args.images}, expected 1 or more: change it.")
    torch.set_num_threads(1)
    with tqdm(total=len(SCALES) * (3 + len(STEPS) * len(SOLVERS) + len(SPACINGS)), unit="run") as bar:
        parts = [measure(args.ckpt, args.images, scale, bar) for scale in SCALES]
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, diffusers, np))
    print("# Error of the samplers against steps\n")
    print(f"`python -m benchmarks.solvers --ckpt {args.ckpt} --images {args.images}`, {versions}, one CPU thread.\n")
    print(ABOUT)
    print("\n".join(parts), end="")


if __name__ == "__main__":
    run_command(main)
