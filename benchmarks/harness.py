"""How `benchmarks.speed` measures: two sides in turn, next to what the hardware can do, and whether they compute the same."""

import statistics
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode

from finetune import METHODS, select
from models import DiT_models

WARM_UP = 2  # rounds that are not counted; compilation is timed before them
EXACT = 1e-4  # relative, of losses and samples in float32
GPU_ALONE = "to be had on a GPU alone"
LOOSE = 5e-2  # of a loss or a guided prediction in half precision, or in TF32


@dataclass
class Row:
    """A figure. `ours`, `official` in `unit`; `ratio`: of times, below 1 where ours is faster; `goal`: see `within`."""

    name: str
    what: str
    unit: str
    ours: float | None
    official: float | None = None
    ratio: float | None = None
    goal: float | None = None
    at_least: bool = False  # the goal is a least value of `ours`, not a largest of the ratio
    slack: float = 0.0  # by which it may be missed, relative
    spread: str = ""
    share: str = ""  # of the ceiling: "71% matmul"
    gate: float | None = None  # how far the two sides were apart
    faults: list = field(default_factory=list)  # why the row does not count

    @property
    def within(self):
        """Whether the goal is met; None without one. A row with faults never meets it."""
        if self.faults:
            return False
        value = self.ours if self.at_least or self.ratio is None else self.ratio
        return (
            None
            if self.goal is None
            else value >= self.goal
            if self.at_least
            else value <= self.goal * (1 + self.slack)
        )

    def record(self):
        numbers = {key: getattr(self, key) for key in ("name", "ours", "official", "ratio", "goal", "within")}
        return numbers | ({"ratio": None} if self.faults else {})  # what is not the same has no ratio


@dataclass
class Times:
    """Medians over rounds: seconds of each side, of their ratio with its quartiles, of the share of the ceiling."""

    ours: float
    other: float | None
    ratio: float | None
    spread: str
    share: str


class Bench:
    """What every case is given.

    device    torch.device
    official  what `bench_official.load` gives, or None
    half      what ours computes in: "no" (float32), "bf16" or "fp16"
    compiled  whether ours is compiled, block by block
    tiny      models, batches and numbers of steps are as small as can be: to see that a case runs
    seconds   a case is repeated for so long, but in `least` rounds at least
    """

    def __init__(self, device, official=None, half="no", compiled=False, tiny=False, seconds=10.0, least=5):
        self.device, self.official, self.half, self.compiled = torch.device(device), official, half, compiled
        self.tiny, self.seconds, self.least = tiny, seconds, least
        self.gpu = self.device.type == "cuda"
        self.classes = self.small(10_000, 200)  # the first of iNaturalist's
        self.compile_seconds = {}  # case -> seconds of its first call
        self.ceilings = {"matmul": [], "copy": []}  # what they gave in each round: FLOP/s, bytes/s

    def tolerance_of(self, half):
        return EXACT if half == "no" and not self.gpu else LOOSE

    @property
    def tolerance(self):
        """Of what is computed as it is timed."""
        return self.tolerance_of(self.half)

    @contextmanager
    def exact(self):
        """Float32 products without TF32."""
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
        return tiny if self.tiny else value

    def clock(self):
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def first(self, name, call):
        """`call()` for the first time: where ours is compiled, that is when."""
        begun = self.clock()
        result = call()
        if self.compiled:
            self.compile_seconds[name] = self.clock() - begun
        return result

    def ceiling(self, kind):
        """(call, its work): a product of large matrices in `half`, counted in FLOP, or a copy, in bytes read and written."""
        if kind == "matmul":
            n = self.small(8192 if self.gpu else 2048, 64)
            dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.half]
            a, b = torch.randn(2, n, n, device=self.device).to(dtype)
            out = torch.empty_like(a)
            return lambda: torch.mm(a, b, out=out), 2 * n**3
        source = torch.randn(self.small(2**29 if self.gpu else 2**26, 2**10), device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2 * source.nbytes

    def time(self, ours, other=None, kind="matmul", work=None, warm=None):
        """Ours, the other side and the ceiling in turn. `work`: of one call of ours, in FLOP or bytes; `warm`: a short
        call in place of the first two rounds.
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


def row_of(name, what, times, goal=None, images=None, gate=None, against="official"):
    """The Row of a comparison: images/s where it is known how many a call makes, else milliseconds a call."""
    if images:
        unit, figure = "images/s", lambda seconds: images / seconds
    else:
        unit, figure = "ms", lambda seconds: 1000 * seconds
    theirs = figure(times.other) if times.other and against == "official" else None
    row = Row(name, what, unit, figure(times.ours), theirs, times.ratio, goal, spread=times.spread, share=times.share)
    return judged(row, gate)


def judged(row, gate):
    """The row with its gate: [(how far apart, how far they may be), ...]."""
    for apart, tolerance in gate or []:
        row.gate = max(apart, row.gate or 0.0)
        if not apart <= tolerance:
            row.faults.append(f"not the same: {apart:.1e} apart, expected at most {tolerance:.0e}")
    return row


def apart(a, b):
    """Largest difference of two tensors over the largest number of the second."""
    a, b = a.double(), b.double()
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- what can be counted --------------------------------------------------------------------------------------------


def count_flops(model, size, method=None):
    """FLOP of one image's forward pass, 1 MAC = 2 FLOP; with a `method` of fine-tuning, forward and backward pass.

    `size`: side of the latents. Matrix products and attention alone, on tensors that hold no numbers.
    """
    with torch.device("meta"):
        dit = DiT_models[model](input_size=size).eval()  # whatever the number of classes: a look-up has no FLOP
        x, zero = torch.zeros(1, 4, size, size), torch.zeros(1, dtype=torch.long)
    dit.requires_grad_(False)
    if method:
        select(dit, METHODS[method])
    with FlopCounterMode(display=False) as counter:
        out = dit(x, zero, zero)
        if method:
            out.sum().backward()
    return counter.get_total_flops()


def count_waits(call):
    """How often `call()` makes the CPU wait for the GPU; 0 without one."""
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
