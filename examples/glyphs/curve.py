"""Draw the quality of the study's methods against their trained parameters.

    python -m examples.glyphs.curve --study study --out curve.png

Full fine-tuning is a band: mean and standard deviation over the seeds. The others are points, with the same as error bars.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

from checkpoint.format import read_weights
from examples.glyphs import study
from runtime.cli import Parser, run_command

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of the backend

PANELS = (("class", "right class, %", 100), ("distance", "Frechet distance", 1))
TICKS = (1, 2, 3, 5, 10)  # %
EXAMPLES = """
    python -m examples.glyphs.curve --study study --out curve.png
"""


def count_parameters(out: Path, method: str, seed: int) -> int:
    """Return the number of parameters in a run's adapter."""
    tensors, _ = read_weights(study.newest_adapter(study.run_folder(out, method, seed)))
    return sum(tensor.numel() for tensor in tensors.values())


def draw(args: argparse.Namespace):
    """Draw a panel for each metric, with a color for each guidance scale."""
    file = args.study / "study.json"
    if not file.is_file():
        raise ValueError(
            f"There is no {file}, expected the results of a study: run python -m examples.glyphs.study first."
        )
    rows = json.loads(file.read_text())
    counts = {method: count_parameters(args.study, method, args.seed) for method in rows if method != study.REAL}
    full = counts["full"]
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 3.4), layout="constrained")
    for ax, (metric, title, factor) in zip(axes, PANELS):
        for color, scale in zip(("tab:blue", "tab:orange"), args.scales):
            found = {method: [factor * v for v in rows[method][str(scale)][metric]] for method in counts}
            mean = {method: statistics.mean(values) for method, values in found.items()}
            spread = {method: statistics.stdev(values) if len(values) > 1 else 0 for method, values in found.items()}
            ax.axhspan(mean["full"] - spread["full"], mean["full"] + spread["full"], color=color, alpha=0.2, lw=0)
            ax.axhline(mean["full"], color=color, lw=1, ls="--")
            others = sorted(counts.keys() - {"full"}, key=counts.get)
            share = [100 * counts[method] / full for method in others]
            errors = [spread[method] for method in others]
            ax.errorbar(
                share, [mean[m] for m in others], errors, color=color, marker="o", ms=4, lw=1, label=f"w = {scale:g}"
            )
        for i, method in enumerate(others):
            name = method.replace("finediffusion+lora, ", "LoRA ").replace("finediffusion", "the paper's")
            place = 100 * counts[method] / full, mean[method]  # at the last scale
            side = (
                dict(xytext=(-2, -5), ha="right", va="top") if i % 2 else dict(xytext=(2, 5))
            )  # below and above in turn
            ax.annotate(name, place, textcoords="offset points", fontsize=6, rotation=40, **side)
        ax.set(xscale="log", xlabel="trained parameters, % of full fine-tuning (dashed)", ylabel=title)
        ax.set_xticks(TICKS, TICKS)
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(args.out, dpi=150)


def main():
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument
    add("--study", type=Path, required=True, help="folder of the study")
    add("--out", type=Path, required=True, help="figure to write")
    add("--seed", type=int, default=0, help="seed of the runs whose parameters are counted")
    add("--scales", type=float, nargs=2, default=[2.0, 4.0], help="guidance scales to show")
    draw(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
