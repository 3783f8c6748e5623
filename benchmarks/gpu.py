"""Measure this code on a GPU in a few minutes: against the official code, and against what the hardware can do.

    python -m benchmarks.gpu --reference ../FineDiffusion

`make gpu` runs the tests of the GPU before it, see docs/gpu.md. Each case states its seconds; a case that would not end in
time is not begun, one that does not fit in memory is a row. The results are written after each case.
"""

import argparse
import gc
import importlib.util
import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch.nn.attention import SDPBackend

from benchmarks import gpu_cases, official, sampling_cases, training_cases
from benchmarks.gpu_page import make_page
from benchmarks.harness import Bench, Row, count_flops
from runtime.cli import Parser, run_command
from runtime.device import DTYPES, check_gpu, resolve_precision, set_tf32
from runtime.files import atomic_write
from runtime.text import one_line

EXAMPLES = """
    python -m benchmarks.gpu --reference ../FineDiffusion
    python -m benchmarks.gpu --quick --minutes 2
"""
XL = "DiT-XL/2"
PEFT = "finediffusion"
QUICK = 0.7  # seconds of a case with --quick, over those without

# ---- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A case of the benchmark.

    seconds   how long it takes on an H200
    run       called with (bench, name, about, **settings), yields Rows; or with the bench alone, returns a dict
    settings  of `run`; None for a case that takes the bench alone
    reference whether `run` needs the official code; without it, or if that does not fit, `alone` runs with `alone_settings`
    flop      (model, side of the latents, method or None, passes): FLOP per image, for the share of the peak
    compiled  whether our blocks are compiled
    quick     whether --quick has the case
    needs     packages
    """

    name: str
    about: str
    seconds: float
    run: Callable
    settings: dict | None = None
    reference: bool = False
    alone: Callable | None = None
    alone_settings: dict = field(default_factory=dict)
    flop: tuple | None = None
    compiled: bool = True
    quick: bool = False
    needs: tuple[str, ...] = ()


T, S, G = training_cases, sampling_cases, gpu_cases
TRAIN_256 = dict(model=XL, batch=64, goal=1 / 2.9, rate=800)
SAMPLE_256 = dict(model=XL, batch=32, steps=50, goal=1 / 2.2, rate=19.5)
CASES = [
    Case("ceilings", "what the hardware can do", 15, G.ceilings, quick=True),
    Case("train-256", "PEFT step, 256 pixels, batch 64", 65, T.step, TRAIN_256, True, T.step_rate,
         dict(model=XL, batch=64, size=32, rate=800), (XL, 32, PEFT, 1), quick=True),
    Case("sampling-256", "50 guided steps, 256 pixels, batch 32", 45, S.sampling, SAMPLE_256, True, S.sampling_rate,
         dict(model=XL, batch=32, steps=50, size=32, rate=19.5), (XL, 32, None, 100), quick=True),
    Case("steps", "a training step and a guided prediction in detail", 40, G.step_details),
    Case("one", "one image, 256 pixels, 20 guided steps", 20, S.sampling,
         dict(model=XL, batch=1, steps=20, goal=1 / 2, most=0.1), True, S.sampling_rate,
         dict(model=XL, batch=1, steps=20, size=32, rate=10), (XL, 32, None, 40)),
    Case("waits", "waits for the GPU in a step of each sampler", 10, G.sampler_waits, compiled=False, quick=True),
    Case("layout", "residual stream contiguous or transposed, eager prediction of 32", 6, G.layout, compiled=False),
    Case("memory", "memory of a step against its forecast", 15, G.peak_memory, compiled=False, quick=True),
    Case("train-512", "PEFT step, 512 pixels, batch 16", 45, T.step_rate,
         dict(model=XL, batch=16, size=64, rate=140), flop=(XL, 64, PEFT, 1)),
    Case("train-256-eager", "PEFT step, 256 pixels, batch 64, eager", 12, T.step_rate,
         dict(model=XL, batch=64, size=32, rate=450), flop=(XL, 32, PEFT, 1), compiled=False),
    Case("methods-64", "PEFT over full step, 256 pixels, batch 64, eager", 15, T.methods,
         dict(model=XL, batch=64, goal=0.64), compiled=False),
    Case("autoencoder", "encoding and decoding, 256 pixels, batch 64", 20, G.coding, needs=("diffusers",)),
    Case("outside-25", "time outside the networks, 25 steps, a batch of 32, eager", 25, S.outside,
         dict(model=XL, batch=32, batches=1, steps=25, goal=0.10), compiled=False, needs=("diffusers",)),
]  # fmt: skip


def obstacle(case: Case, left: float) -> str | None:
    """Return why a case is not begun with `left` seconds to go, or None."""
    lacking = [package for package in case.needs if not importlib.util.find_spec(package)]
    if lacking:
        return f"needs {', '.join(lacking)}"
    return f"{max(0, left):.0f} s left, expected {case.seconds:.0f} s" if case.seconds > left else None


def rows_of(case: Case, bench: Bench) -> list[Row]:
    """Return the rows of a case, ours alone without the official code or if that does not fit."""
    if bench.official or not case.reference:
        try:
            return list(case.run(bench, case.name, case.about, **case.settings))
        except torch.OutOfMemoryError:
            if not case.alone:
                raise
            gc.collect()
    return list(case.alone(bench, case.name, f"{case.about}, ours alone", **case.alone_settings))


def run_case(case: Case, bench: Bench, peak: float | None) -> dict:
    """Run a case; return its record: name, about, expected seconds and seconds, then rows or details, or its fault.

    peak: of the datasheet, in FLOP/s
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()
    bench.compiled = case.compiled and not bench.tiny
    begun = time.perf_counter()
    record = {"name": case.name, "about": case.about, "expected_seconds": case.seconds}
    try:
        if case.settings is None:
            record["details"] = case.run(bench)
        else:
            record["rows"] = [describe(row, case, bench, peak) for row in rows_of(case, bench)]
    except torch.OutOfMemoryError:
        record["fault"] = "does not fit in memory"
    except Exception as error:  # the other cases still count
        traceback.print_exc()
        record["fault"] = f"{type(error).__name__}: {one_line(error)}"
    return record | {"seconds": time.perf_counter() - begun}


def describe(row: Row, case: Case, bench: Bench, peak: float | None) -> dict:
    """Return the JSON form of a row, with our share of the datasheet's peak if its unit is images/s."""
    record = row.record() | {key: getattr(row, key) for key in ("about", "unit", "spread", "share", "gate", "faults")}
    record["at_least"] = row.at_least
    if case.flop and row.unit == "images/s" and peak and not bench.tiny:
        model, size, method, passes = case.flop
        record["nominal"] = row.ours * passes * count_flops(model, size, method) / peak
    return record


# ---- the machine ---------------------------------------------------------------------------------

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "V100": 125e12}  # dense FLOP/s in half precision, datasheets
QUERY = "driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit"


def machine() -> dict:
    """Return what the numbers depend on: the GPU, its state and the versions."""
    try:
        words = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "-i", "0"],
            capture_output=True,
            text=True,
            timeout=20,
        )
        state = words.stdout.strip().split(", ")
    except (OSError, subprocess.TimeoutExpired):
        state = []
    half, found = DTYPES[resolve_precision("auto", "cuda")], {}
    for tokens in (256, 1024):
        q = torch.empty(1, 16, tokens, 72, device="cuda", dtype=half, requires_grad=True)
        found[f"{tokens} tokens"] = SDPBackend(torch._fused_sdp_choice(q, q, q)).name
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "processors": properties.multi_processor_count,
        "state": dict(zip(QUERY.split(","), state)),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.enabled else None,
        "attention": found,
    }


def short_name(gpu: str) -> str:
    """Return the name of a GPU for a file: "NVIDIA H200" -> "h200"."""
    words = gpu.replace("(", "").replace(")", "").lower().split()
    return "-".join(word for word in words if word not in ("nvidia", "tesla"))


def read_tests(path: str) -> dict:
    """Return counts, failed and skipped tests, and what tests recorded, from pytest's JUnit XML; {} without the file."""
    if not Path(path).is_file():
        return {}
    suite = ElementTree.parse(path).getroot().find("testsuite")
    found = {"seconds": float(suite.get("time")), "passed": 0, "failed": [], "skipped": [], "recorded": {}}
    for test in suite.iter("testcase"):
        skipped, broken = test.find("skipped"), [*test.iter("failure"), *test.iter("error")]
        if skipped is not None:
            found["skipped"].append([test.get("name"), skipped.get("message")])
        elif broken:
            found["failed"].append([test.get("name"), one_line(broken[0].get("message"))])
        else:
            found["passed"] += 1
        for each in test.iter("property"):
            found["recorded"][f"{test.get('name')}: {each.get('name')}"] = each.get("value")
    return found


# ---- the command ---------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument
    add("--reference", metavar="DIR", help="checkout of the official FineDiffusion; if not given, ours is timed alone")
    add("--minutes", type=float, default=5.0, help="begin no case that would end after this time")
    add("--quick", action="store_true", help="only the most important cases, with fewer rounds")
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        help=f"cases to run, of {', '.join(case.name for case in CASES)}; default: all",
    )
    add("--tiny", action="store_true", help="smallest models, not compiled: only to check that the cases run")
    add("--tests", metavar="FILE", help="JUnit XML of the tests, to be summarized on the page")
    add("--name", help="name of the results, gpu_NAME.md and gpu_NAME.json; if not given, the GPU's")
    add("--out", default="benchmarks/results", help="folder for the results")
    return parser.parse_args(argv)


def choose_cases(args: argparse.Namespace) -> list[Case]:
    """Return the cases of --only or --quick. Raises ValueError for an unknown name."""
    known = [case.name for case in CASES]
    unknown = [name for name in args.only or () if name not in known]
    if unknown:
        raise ValueError(f"--only has {', '.join(unknown)}, expected names of {', '.join(known)}.")
    chosen = [case for case in CASES if (case.name in args.only if args.only else case.quick or not args.quick)]
    return [replace(case, seconds=case.seconds * QUICK) for case in chosen] if args.quick else chosen


def finite(value: object) -> object:
    """Return a JSON value with None in place of non-finite numbers."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(folder: Path, name: str, record: dict):
    """Write the record and its page."""
    record = finite(record)
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    atomic_write(folder / f"gpu_{name}.json", lambda part: Path(part).write_text(text))
    atomic_write(folder / f"gpu_{name}.md", lambda part: Path(part).write_text(make_page(record)))


def main(argv: Sequence[str] | None = None):
    begun, argv = time.monotonic(), sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    cases = choose_cases(args)
    if not torch.cuda.is_available():
        raise ValueError("Found no GPU, expected one: run benchmarks.speed on a CPU.")
    check_gpu("cuda")
    reference = official.load(args.reference) if args.reference else None
    set_tf32(True)
    half = resolve_precision("auto", "cuda")
    seconds = 0 if args.tiny else 2 if args.quick else 6
    bench = Bench("cuda", reference, half, tiny=args.tiny, seconds=seconds, least=3 if args.quick else 5)
    gpu = machine()
    peak = next((peak for name, peak in PEAKS.items() if name in gpu["name"]), None)
    record = {"date": str(date.today()), "command": f"python -m benchmarks.gpu {' '.join(argv)}".strip(), "gpu": gpu}
    record |= {"precision": half, "official": reference is not None, "tiny": args.tiny, "peak": peak}
    record |= {"tests": read_tests(args.tests) if args.tests else {}, "cases": [], "not_run": []}
    folder, name = Path(args.out), args.name or short_name(gpu["name"])
    for case in cases:
        reason = obstacle(case, 60 * args.minutes - (time.monotonic() - begun))
        if reason:
            record["not_run"].append([case.name, reason])
        else:
            print(f"{case.name}: {case.about}, about {case.seconds:.0f} s", file=sys.stderr, flush=True)
            record["cases"].append(run_case(case, bench, peak))
        record["seconds"] = time.monotonic() - begun
        write_results(folder, name, record)  # after each case: an interrupted run leaves its results
    print(folder / f"gpu_{name}.md")


if __name__ == "__main__":
    run_command(main)
