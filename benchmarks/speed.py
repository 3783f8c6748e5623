"""Time this code against the official code, side by side in one process and next to what the hardware can do.

    python -m benchmarks.speed --reference DIR --out benchmarks/speed.md

DIR is a checkout of the official FineDiffusion (github.com/FineDiffusion/FineDiffusion). Without it our code is compared
with itself: PEFT with full fine-tuning, half precision with float32. Weights and data are random; nothing is downloaded.
Before timing, both sides must compute the same loss or sample. Then they take turns; a ratio is the median over
neighbouring turns.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import official, sampling_cases, training_cases
from benchmarks.harness import ROW_TITLES, Bench, Row
from runtime.cli import Parser, run_command
from runtime.device import check_gpu, resolve_precision
from runtime.files import atomic_write
from runtime.text import format_value, markdown_table

XL = "DiT-XL/2"
EXAMPLES = """
    python -m benchmarks.speed --reference ../FineDiffusion --out benchmarks/speed.md
    python -m benchmarks.speed --reference ../FineDiffusion --only step-s4 sampling-s4 --seconds 25
"""

# ---- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A case: `run(bench, name, about, **settings)` yields Rows.

    on: "cpu", "cuda" or "any"; reference: whether the official code is needed
    """

    name: str
    about: str
    run: Callable
    settings: dict = field(default_factory=dict)
    on: str = "cuda"
    reference: bool = False


def case(name: str, about: str, run: Callable, on: str = "cuda", reference: bool = False, **settings) -> Case:
    return Case(name, about, run, settings, on, reference)


T, S = training_cases, sampling_cases  # one line per case

# goals are ratios of times, so 1 / 2.3 is 2.3 times as fast; rates are images/s
CASES = [
    # counts, the same on every machine
    case("flops-256", "FLOP of PEFT over full, XL/2 at 256 pixels", T.flops, "any", model=XL, size=32, goal=0.6785),
    case("flops-512", "FLOP of PEFT over full, XL/2 at 512 pixels", T.flops, "any", model=XL, size=64, goal=0.7097),
    case("saved", "saved activations, PEFT over full, S/4", T.saved_activations, "any", model="DiT-S/4", goal=0.70),
    # two CPU cores, float32
    case("loop", "sampler loop around a null model, a step of one guided image",
         S.loop, "cpu", True, batch=2, steps=250, goal=0.20),
    case("update-xl", "optimizer and average, XL/2", T.update, "cpu", True, model=XL, goal=0.05),
    case("step-s8", "PEFT step, S/8, batch 2", T.step, "cpu", True, model="DiT-S/8", batch=2, goal=0.55),
    case("step-s4", "PEFT step, S/4, batch 4", T.step, "cpu", True, model="DiT-S/4", batch=4, goal=0.65),
    case("methods-s4", "PEFT over full step, S/4, batch 4", T.methods, "cpu", model="DiT-S/4", batch=4, goal=None),
    case("half-s4", "PEFT step, bf16 over float32, S/4, batch 4",
         T.precisions, "cpu", model="DiT-S/4", batch=4, half="bf16"),
    case("interval-s4", "50 steps, S/4, batch 4: half of them guided, over all guided",
         S.interval, "cpu", model="DiT-S/4", batch=4, steps=50, goal=0.77),
    case("sampling-s4", "50 guided steps, S/4, batch 4",
         S.sampling, "cpu", True, model="DiT-S/4", batch=4, steps=50, goal=0.90),
    # one H200, XL/2
    case("train-256", "PEFT step, 256 pixels, batch 64, latents to both",
         T.step, reference=True, model=XL, batch=64, goal=1 / 2.3, rate=750),
    case("sampling-256", "250 guided steps, 256 pixels, batch 32, decoded",
         S.sampling, reference=True, model=XL, batch=32, steps=250, goal=1 / 2.2, decode=True, rate=3.3),
    case("one", "one image, 256 pixels, 250 guided steps",
         S.sampling, reference=True, model=XL, batch=1, steps=250, goal=1 / 2, most=0.5),
    case("waits-training", "waits for the GPU in a training step", T.waits, model=XL, batch=8),
    case("waits-sampling", "waits for the GPU in a step of the sampler", S.waits, model=XL, batch=8),
    case("methods-64", "PEFT over full step, batch 64", T.methods, model=XL, batch=64, goal=0.64),
    case("methods-32", "PEFT over full step, batch 32", T.methods, model=XL, batch=32, goal=0.61),
    case("memory-64", "peak memory, PEFT over full, batch 64", T.peak_memory, model=XL, batch=64, goal=0.47, most=20),
    case("train-images", "PEFT step, batch 64: the official with the VAE, ours on cached latents",
         T.step, reference=True, model=XL, batch=64, goal=1 / 4, vae=S.random_vae),
    case("encode", "VAE encoder, 256 pixels, batch 64", S.encode, batch=64, rate=1000),
    case("train-512", "PEFT step, 512 pixels, batch 16", T.step_rate, model=XL, batch=16, size=64, rate=140),
    case("outside-25", "time outside the networks, 25 steps, two batches of 32",
         S.outside, model=XL, batch=32, batches=2, steps=25, goal=0.10),
    case("sampling-512", "250 guided steps, 512 pixels, batch 4",
         S.sampling_rate, model=XL, batch=4, steps=250, size=64, rate=0.65),
    case("outside-250", "time outside the networks, 250 steps, a batch of 32",
         S.outside, model=XL, batch=32, batches=1, steps=250, goal=0.03),
    case("half-32", "PEFT step, bf16 over float32, batch 32", T.precisions, model=XL, batch=32, half="bf16"),
]  # fmt: skip


def choose_cases(names: Sequence[str] | None, device: str, reference: bool, tiny: bool) -> tuple[list[Case], list[str]]:
    """Return the cases to run, and the names of those skipped for want of the official code.

    names: of --only; tiny: run cases of a GPU on a CPU too

    Raises ValueError if a name is unknown, or its case cannot run here.
    """
    known = [case.name for case in CASES]
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"--only has {', '.join(unknown)}, expected names of {', '.join(known)}.")
    cases = [c for c in CASES if (c.name in names if names else c.on in (device, "any"))]
    wrong = [c.name for c in cases if c.on not in (device, "any")]
    if wrong and not tiny:
        raise ValueError(f"--only has {', '.join(wrong)}, expected cases for --device {device}: pass the other device.")
    lacking = [c.name for c in cases if c.reference and not reference]
    if lacking and names:
        raise ValueError(f"--only has {', '.join(lacking)}, which needs the official code: pass --reference.")
    return [c for c in cases if c.name not in lacking], [f"{name} (needs --reference)" for name in lacking]


# ---- the page ------------------------------------------------------------------------------------

ABOUT = """All weights are random and no layer is zero; 10,000 classes and 11 superclasses. A ratio divides our time by the other
side's in neighbouring turns, so it is below 1 if ours is faster. It is the median, with the quartiles and the number of
turns in brackets. "Sides apart" is the largest relative difference between the losses or samples of both sides, computed
beforehand. The shares of the ceilings are also taken from neighbouring turns."""
TITLES = *ROW_TITLES, "share of the ceiling", "sides apart"


def cells(row: Row) -> list[str]:
    """Return the cells of a row, under TITLES."""
    ratio = f"{row.ratio:.3f}" if row.ratio is not None and not row.faults else ""
    spread = f"({row.spread})" if row.spread else ""
    goal = "" if row.goal is None else f"{'>=' if row.at_least else '<='} {format_value(row.goal)}"
    met = "; ".join(row.faults) or {None: "", True: "yes", False: "no"}[row.within]
    gate = "" if row.gate is None else f"{row.gate:.0e}"
    values = format_value(row.ours), format_value(row.official)
    return [row.name, row.about, *values, row.unit, f"{ratio} {spread}".strip(), goal, met, row.share, gate]


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    return "\n".join(markdown_table(TITLES, map(cells, rows), align="llrrlllllr"))


def report(
    bench: Bench, argv: Sequence[str], rows: Sequence[Row], skipped: Sequence[str], loads: Sequence[float]
) -> str:
    """Return the complete page in Markdown.

    argv: the flags; skipped: cases that were not run; loads: of the machine, before each case
    """
    gpu = torch.cuda.get_device_name() if bench.gpu else None
    hardware = gpu or f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads"
    half = "float32" if bench.half == "no" else bench.half
    theirs = "float32 with TF32" if bench.gpu else "float32"
    ceilings = []
    for kind, name, unit, scale in (("matmul", f"matmul {half}", "TFLOP/s", 1e12), ("copy", "copy", "GB/s", 1e9)):
        if len(bench.ceilings[kind]) > 1:
            low, middle, high = (value / scale for value in statistics.quantiles(bench.ceilings[kind], n=4))
            ceilings.append(f"{name} {middle:.3g} {unit} ({low:.3g} to {high:.3g})")
    first = [f"{name} {seconds:.0f} s" for name, seconds in bench.compile_seconds.items()]
    load = not bench.gpu and f"{min(loads):.1f} to {max(loads):.1f}"
    notes = {
        "Ceilings in the same run, median and quartiles; a copy counts bytes read and written": "; ".join(ceilings),
        "First calls with compilation, which no other value includes": ", ".join(first),
        "Not run": ", ".join(skipped),
        "Load of the machine before each case (1 is one busy core)": load,
        "With --tiny": bench.tiny and "the values mean nothing",
    }
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    compiled = "compiled" if bench.compiled else "not compiled"
    return "\n\n".join(
        [
            f"# Speed: {hardware}",
            f"    python -m benchmarks.speed {' '.join(argv)}",
            f"{versions}. Ours in {half}, {compiled}; the official code in {theirs}.",
            ABOUT,
            table(rows),
            *(f"{title}: {text}." for title, text in notes.items() if text),
        ]
    )


# ---- the command ---------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument_group("cases").add_argument
    add("--reference", metavar="DIR", help="checkout of the official FineDiffusion")
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        help=f"cases to run, of {', '.join(case.name for case in CASES)}; if not given, all of the device",
    )
    add("--seconds", type=float, default=10.0, help="time to repeat a case for, at least 5 rounds")
    add(
        "--minutes",
        type=float,
        default=8.0,
        help="start no case after this time; the most important cases come first",
    )
    add(
        "--tiny",
        action="store_true",
        help="smallest models and few steps, cases of a GPU on a CPU too: only to check that they run",
    )
    add = parser.add_argument_group("device").add_argument
    add("--device", choices=["cpu", "cuda"], help="device of both sides; if not given, a GPU if there is one")
    add("--threads", type=int, default=2, help="CPU threads of both sides")
    add(
        "--half",
        choices=["no", "bf16", "fp16"],
        help="precision of our side; if not given, bf16 on a GPU and no on a CPU",
    )
    add("--compile", action=argparse.BooleanOptionalAction, help="compile our blocks; if not given, on a GPU only")
    add = parser.add_argument_group("output").add_argument
    add("--out", help="file for the page, in Markdown")
    add("--json", help="file for a list of {name, ours, official, ratio, goal, within}")
    return parser.parse_args(argv)


def run_case(case: Case, bench: Bench) -> list[Row]:
    """Run a case and print its rows to stderr."""
    gc.collect()
    if bench.compiled:
        torch.compiler.reset()  # torch keeps only a few graphs, of other shapes and types
    try:
        rows = list(case.run(bench, case.name, case.about, **case.settings))
    except torch.OutOfMemoryError:  # of either side
        rows = [Row(case.name, case.about, "", None, faults=["does not fit in memory"])]
    print(table(rows).split("\n", 2)[2], file=sys.stderr, flush=True)
    return rows


def write_results(args: argparse.Namespace, page: str, rows: Sequence[Row]):
    """Write the page to --out and the rows to --json."""
    if args.out:
        atomic_write(args.out, lambda part: Path(part).write_text(page))
    if args.json:
        records = json.dumps([row.record() for row in rows], indent=1, allow_nan=False) + "\n"
        atomic_write(args.json, lambda part: Path(part).write_text(records))


def main(argv: Sequence[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    if args.threads < 1 or args.seconds < 0:
        raise ValueError(
            f"Found --threads {args.threads} and --seconds {args.seconds}, expected at least 1 and at least 0."
        )
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_gpu(device)
    gpu = device == "cuda"
    if not gpu:
        torch.set_num_threads(args.threads)
    half = resolve_precision(args.half or ("bf16" if gpu else "no"), device)
    compiled = gpu if args.compile is None else args.compile
    reference = official.load(args.reference) if args.reference else None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as both train.py do
    bench = Bench(device, reference, half, compiled, args.tiny, 0 if args.tiny else args.seconds)
    cases, skipped = choose_cases(args.only, device, reference is not None, args.tiny)

    rows, loads, begun = [], [], time.monotonic()
    page = report(bench, argv, rows, skipped, [0.0]) + "\n"
    write_results(args, page, rows)
    for case in cases:
        if time.monotonic() - begun > 60 * args.minutes:
            skipped.append(f"{case.name} (no time left)")
        else:
            loads.append(os.getloadavg()[0])
            rows += run_case(case, bench)
        # after every case: an interrupted run leaves its results so far
        page = report(bench, argv, rows, skipped, loads or [0.0]) + "\n"
        write_results(args, page, rows)
    print(page)


if __name__ == "__main__":
    run_command(main)
