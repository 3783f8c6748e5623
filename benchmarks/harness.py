"""Timing for `benchmarks.speed`: both sides take turns next to what the hardware can do, and must compute the same."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from finetune import METHODS, select
from models import DiT_models

WARM_UP = 2  # rounds that are not counted; compilation is timed before them
EXACT = 1e-4  # tolerance, relative, of losses and samples in float32
LOOSE = 5e-2  # tolerance of a loss or a guided prediction in half precision, or in TF32
NEEDS_GPU = "needs a GPU"
ROW_TITLES = "case", "what", "ours", "official", "unit", "ratio, quartiles", "goal", "met"  # of the columns of a page


@dataclass
class Row:
    """A row of the table.

    name      of the case
    about     description of the case
    unit      of `ours` and `official`
    ours, official   measured values
    ratio     of times, ours over the other side; below 1 if ours is faster
    goal      largest ratio (or value of `ours`, if there is no ratio); with `at_least` the smallest value of `ours`
    slack     relative margin of the goal
    spread    quartiles of the ratio and the number of rounds
    share     share of the ceiling: "71% matmul"
    gate      relative difference between the two sides
    faults    reasons why the row does not count
    """

    name: str
    about: str
    unit: str
    ours: float | None
    official: float | None = None
    ratio: float | None = None
    goal: float | None = None
    at_least: bool = False
    slack: float = 0.0
    spread: str = ""
    share: str = ""
    gate: float | None = None
    faults: list[str] = field(default_factory=list)

    @property
    def within(self) -> bool | None:
        """Whether the goal is met; None without a goal. A row with faults never meets it."""
        if self.faults:
            return False
        if self.goal is None:
            return None
        if self.at_least:
            return self.ours >= self.goal
        return (self.ours if self.ratio is None else self.ratio) <= self.goal * (1 + self.slack)

    def record(self) -> dict:
        """Return the JSON form; a row with faults has no ratio."""
        values = {key: getattr(self, key) for key in ("name", "ours", "official", "ratio", "goal", "within")}
        return values | ({"ratio": None} if self.faults else {})


@dataclass
class Times:
    """Medians over rounds: seconds of each side, their ratio with its quartiles, the share of the ceiling."""

    ours: float
    other: float | None
    ratio: float | None
    spread: str
    share: str


class Bench:
    """Settings and tools of every case.

    device    torch.device
    official  the official code from `benchmarks.official.load`, or None
    half      precision of our side: "no" (float32), "bf16" or "fp16"
    compiled  whether our blocks are compiled
    tiny      use the smallest models, batches and step counts, to check that a case runs
    seconds   time to repeat a case for, but at least `least` rounds
    """

    def __init__(
        self,
        device: str | torch.device,
        official: SimpleNamespace | None = None,
        half: str = "no",
        compiled: bool = False,
        tiny: bool = False,
        seconds: float = 10.0,
        least: int = 5,
    ):
        self.device, self.official, self.half, self.compiled = torch.device(device), official, half, compiled
        self.tiny, self.seconds, self.least = tiny, seconds, least
        self.gpu = self.device.type == "cuda"
        self.classes = self.small(10_000, 200)  # the first classes of iNaturalist
        self.compile_seconds = {}  # case -> seconds of its first call
        self.ceilings = {"matmul": [], "copy": []}  # rate in each round: FLOP/s, bytes/s

    def tolerance_of(self, half: str) -> float:
        """Return the allowed relative difference to float32 in a precision."""
        return EXACT if half == "no" and not self.gpu else LOOSE

    @property
    def tolerance(self) -> float:
        """Allowed relative difference in the precision that is timed."""
        return self.tolerance_of(self.half)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Compute float32 products without TF32."""
        flags = torch.backends.cuda.matmul, torch.backends.cudnn
        before = [flag.allow_tf32 for flag in flags]
        for flag in flags:
            flag.allow_tf32 = False
        try:
            yield
        finally:
            for flag, value in zip(flags, before):
                flag.allow_tf32 = value

    def small(self, value, tiny):
        """Return `tiny` with --tiny, or else `value`."""
        return tiny if self.tiny else value

    def clock(self) -> float:
        """Return the time in seconds, after the GPU has finished."""
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def first_call(self, name: str, call: Callable):
        """Return `call()`, timed as the first call of a case, which compiles."""
        begun = self.clock()
        result = call()
        if self.compiled:
            self.compile_seconds[name] = self.clock() - begun
        return result

    def ceiling(self, kind: str) -> tuple[Callable, int]:
        """Return a call that the hardware runs at full rate, and its work.

        "matmul": a product of large matrices in `half`, in FLOP; "copy": a copy, in bytes read and written
        """
        if kind == "matmul":
            n = self.small(8192 if self.gpu else 2048, 64)
            dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.half]
            a, b = torch.randn(2, n, n, device=self.device).to(dtype)
            out = torch.empty_like(a)
            return lambda: torch.mm(a, b, out=out), 2 * n**3
        source = torch.randn(self.small(2**29 if self.gpu else 2**26, 2**10), device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2 * source.nbytes

    def time(
        self,
        ours: Callable,
        other: Callable | None = None,
        kind: str = "matmul",
        work: float | None = None,
        warm: Callable | None = None,
    ) -> Times:
        """Time our side, the other side and the ceiling in turn.

        kind, work: of the ceiling, and the work of one call of ours, in FLOP or bytes
        warm: a short call that replaces the first rounds
        """
        sides = [ours] + ([other] if other else [])
        if work:
            bound, bound_work = self.ceiling(kind)
            sides.append(bound)
        for _ in range(WARM_UP):
            for side in [warm] if warm else sides:
                side()
        rounds, begun = [], self.clock()
        while len(rounds) < self.least or self.clock() - begun < self.seconds:
            times = []
            for side in sides:
                start = self.clock()
                side()
                times.append(self.clock() - start)
            rounds.append(times)
        columns = list(zip(*rounds))
        spread, share, ratio = f"{len(rounds)} rounds", "", None
        if other:
            ratios = [mine / theirs for mine, theirs, *_ in rounds]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            spread = f"{low:.3f} to {high:.3f}, {spread}"
        if work:
            self.ceilings[kind] += [bound_work / times[-1] for times in rounds]
            share = f"{statistics.median(work / t[0] / (bound_work / t[-1]) for t in rounds):.0%} {kind}"
        medians = [statistics.median(column) for column in columns]
        return Times(medians[0], medians[1] if other else None, ratio, spread, share)


# ---- rows ----------------------------------------------------------------------------------------


def make_row(
    name: str,
    about: str,
    times: Times,
    goal: float | None = None,
    images: int | None = None,
    gate: Sequence[tuple[float, float]] = (),
    against: str = "official",
) -> Row:
    """Return the row of a comparison, in milliseconds per call, or in images/s if a call makes `images`.

    gate: see `check_gate`; against: the other side
    """
    if images:
        unit, convert = "images/s", lambda seconds: images / seconds
    else:
        unit, convert = "ms", lambda seconds: 1000 * seconds
    theirs = convert(times.other) if times.other and against == "official" else None
    row = Row(name, about, unit, convert(times.ours), theirs, times.ratio, goal, spread=times.spread, share=times.share)
    return check_gate(row, gate)


def check_gate(row: Row, gate: Sequence[tuple[float, float]]) -> Row:
    """Record in a row how far its sides differ: [(difference, tolerance), ...]; a larger difference is a fault."""
    for difference, tolerance in gate:
        row.gate = max(difference, row.gate or 0.0)
        if not difference <= tolerance:
            row.faults.append(f"the sides differ by {difference:.1e}, expected at most {tolerance:.0e}")
    return row


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference of two tensors over the largest magnitude of the second."""
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- counts --------------------------------------------------------------------------------------


def count_flops(model: str, size: int, method: str | None = None) -> int:
    """Count the FLOP of a forward pass per image, 1 MAC = 2 FLOP; with a `method`, of forward and backward pass.

    model: a preset of models.DiT_models; size: side of the latents

    Only matrix products and attention count. The tensors are on the meta device.
    """
    with torch.device("meta"):
        dit = DiT_models[model](input_size=size).eval()  # any number of classes: a look-up takes no FLOP
        x, zero = torch.zeros(1, 4, size, size), torch.zeros(1, dtype=torch.long)
    dit.requires_grad_(False)
    if method:
        select(dit, METHODS[method])
    with FlopCounterMode(display=False) as counter:
        out = dit(x, zero, zero)
        if method:
            out.sum().backward()
    return counter.get_total_flops()


def count_waits(call: Callable) -> int:
    """Count how often `call()` makes the CPU wait for the GPU; 0 without a GPU."""
    if not torch.cuda.is_available():
        call()
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
