"""The page of `benchmarks.gpu`: its record as Markdown, with the times that were predicted before any was measured."""

from collections.abc import Iterator

from benchmarks.harness import ROW_TITLES
from runtime.text import format_value, markdown_table

# Estimates from counted FLOP, bytes and launches, and from rates assumed for each GPU: images/s, and the share of the
# datasheet's peak, by case.
PREDICTIONS = {
    "H200": {
        "train-256": (760, 0.47),
        "train-256-eager": (516, 0.32),
        "train-512": (150, 0.44),
        "sampling-256": (19.5, 0.59),
    },
    "A100": {
        "train-256": (325, 0.51),
        "train-256-eager": (226, 0.35),
        "train-512": (68, 0.51),
        "sampling-256": (7.9, 0.60),
    },
    "V100": {
        "train-256": (116, 0.45),
        "train-256-eager": (84, 0.33),
        "train-512": (21, 0.38),
        "sampling-256": (2.8, 0.54),
    },
}
STAND_IN = "**Measured on a stand-in GPU, whose kernels compute nothing: the numbers mean nothing.**"
TITLES = *ROW_TITLES, "of measured", "of peak", "sides apart"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def heading(record: dict) -> Iterator[str]:
    gpu = record["gpu"]
    yield f"# {gpu['name']}, {record['date']}"
    if "stand-in" in gpu["name"]:
        yield STAND_IN
    if record["tiny"]:
        yield "**With --tiny the numbers mean nothing.**"
    yield f"    {record['command']}"
    state = ", ".join(f"{key} {value}" for key, value in gpu["state"].items())
    attention = ", ".join(f"{name} {tokens}" for tokens, name in gpu["attention"].items())
    yield (
        f"{gpu['memory_gib']:.1f} GiB, {gpu['processors']} multiprocessors; {state or 'no nvidia-smi'}. torch {gpu['torch']}, "
        f"CUDA {gpu['cuda']}, cuDNN {gpu['cudnn']}; attention {attention}. Ours in {record['precision']}, compiled unless a "
        f"case says eager; the official code {'in float32 with TF32' if record['official'] else 'was not given'}."
    )
    yield (
        "All weights are random and no layer is zero. A ratio divides our time by the other side's in neighbouring turns, so "
        'it is below 1 if ours is faster. "Of measured" is the share of a product measured in the same turn, "of peak" that '
        "of the datasheet; recomputed FLOP do not count."
    )


def cells(row: dict) -> list[str]:
    """Return the cells of a row, under TITLES."""
    spread = f"({row['spread']})" if row["spread"] else ""
    goal = "" if row["goal"] is None else f"{'>=' if row['at_least'] else '<='} {format_value(row['goal'])}"
    met = "; ".join(row["faults"]) or {None: "", True: "yes", False: "no"}[row["within"]]
    ratio = f"{format_value(row['ratio'])} {spread}".strip()
    values = (
        row["name"],
        row["about"],
        format_value(row["ours"]),
        format_value(row["official"]),
        row["unit"],
        ratio,
        goal,
        met,
    )
    return [*values, row["share"], percent(row.get("nominal")), "" if row["gate"] is None else f"{row['gate']:.0e}"]


def results(record: dict) -> Iterator[str]:
    """Yield the table of the cases against the official code; a case that failed is a row too."""
    rows = []
    for case in record["cases"]:
        rows += [cells(row) for row in case.get("rows", ())]
        if "fault" in case:
            rows.append([case["name"], case["about"], *[""] * 5, case["fault"], "", "", ""])
    if rows:
        yield "## Speed"
        yield table(TITLES, rows, "llrrlllllrr")


def table(titles: tuple, rows: list, align: str) -> str:
    return "\n".join(markdown_table(titles, rows, align=align))


def details(record: dict) -> Iterator[str]:
    """Yield the tables of the cases that have their own."""
    found = {key: value for case in record["cases"] for key, value in case.get("details", {}).items()}
    if "rates" in found:
        yield "## What the hardware can do"
        yield table(
            ("what", "TFLOP/s, of the copy TB/s"),
            [[name, format_value(rate)] for name, rate in found["rates"].items()],
            "lr",
        )
    if "steps" in found:
        columns = list(dict.fromkeys(key for step in found["steps"].values() for key in step))
        rows = [[name, *(format_value(step.get(key)) for key in columns)] for name, step in found["steps"].items()]
        yield "## Steps in detail\n\nGPU milliseconds by kind of kernel, of one profiled step; host ms: to queue the step."
        yield table(("step", *columns), rows, "l" + "r" * len(columns))
    if "waits" in found:
        waits = ", ".join(f"{name} {format_value(count)}" for name, count in found["waits"].items())
        yield f"Waits for the GPU in a step of the sampler (goal: 0): {waits}."
    if "ratio" in found:
        times = ", ".join(f"{name} {format_value(value)} ms" for name, value in found["ms"].items())
        yield f"Residual stream, eager forward pass: {times}, ratio {format_value(found['ratio'])}."
    if "memory" in found:
        rows = [
            [name, *map(format_value, sizes), f"{sizes[1] / sizes[0] - 1:+.1%}", f"{sizes[2] / sizes[0] - 1:+.1%}"]
            for name, sizes in found["memory"].items()
        ]
        yield "## Memory, GiB"
        titles = ("step", "forecast", "allocated", "reserved", "allocated over forecast", "reserved over forecast")
        yield table(titles, rows, "lrrrrr")
    if "images/s" in found:
        yield "## Autoencoder, 256 pixels"
        yield table(
            ("what", "images/s"), [[name, format_value(rate)] for name, rate in found["images/s"].items()], "lr"
        )


def predictions(record: dict) -> Iterator[str]:
    """Yield what was predicted for this GPU beside what was measured."""
    known = next((cases for gpu, cases in PREDICTIONS.items() if gpu in record["gpu"]["name"]), {})
    measured = {}
    for case in record["cases"]:
        for row in case.get("rows", ()):
            if row["unit"] == "images/s":
                measured.setdefault(row["name"], row)
    rows = []
    for name, (rate, share) in known.items():
        row = measured.get(name, {})
        over = format_value(row["ours"] / rate) if row else ""
        rows.append(
            [name, format_value(rate), format_value(row.get("ours")), over, percent(share), percent(row.get("nominal"))]
        )
    if rows:
        yield "## Predicted and measured\n\nThe predictions were made before anything was measured on a GPU."
        titles = (
            "case",
            "predicted images/s",
            "measured",
            "measured over predicted",
            "predicted of peak",
            "measured of peak",
        )
        yield table(titles, rows, "lrrrrr")


def notes(record: dict) -> Iterator[str]:
    """Yield the tests, the times of the cases, and what was not run."""
    tests = record["tests"]
    if tests:
        skipped = [f"- {name}: {reason}" for name, reason in tests["skipped"]]
        failed = [f"- **{name}**: {reason}" for name, reason in tests["failed"]]
        counts = f"{tests['passed']} passed, {len(failed)} failed, {len(skipped)} skipped, {tests['seconds']:.0f} s."
        yield "\n".join(["## Tests", "", counts, *([""] if failed or skipped else []), *failed, *skipped])
        recorded = [f"- {name}: {value}" for name, value in tests["recorded"].items()]
        yield from (["\n".join(["Recorded by tests:", "", *recorded])] if recorded else [])
    times = [
        f"{case['name']} {case['seconds']:.0f} s (expected {case['expected_seconds']:.0f})" for case in record["cases"]
    ]
    yield f"Times of the cases: {', '.join(times)}; {record['seconds']:.0f} s in all."
    if record["not_run"]:
        yield f"Not run: {', '.join(f'{name} ({reason})' for name, reason in record['not_run'])}."


def make_page(record: dict) -> str:
    """Return the page of a record of `benchmarks.gpu`."""
    parts = (heading, results, details, predictions, notes)
    return "\n\n".join(text for part in parts for text in part(record)) + "\n"
