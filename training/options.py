"""The flags of train.py, their defaults and their checks."""

import argparse
import importlib.util
import math
from collections.abc import Callable, Iterable

from checkpoint.description import EMBEDDERS
from finetune import LORA_LAYERS, METHODS, MOST_OF_START, SHORT_RUN_WARMUP
from models import DiT_models
from runtime.cli import Parser
from runtime.device import COMPILE_HELP, PRECISION_HELP, PRECISIONS
from training.extension import adopt_settings
from training.logger import TRACKERS

EXAMPLES = """
torchrun --nproc_per_node=8 train.py --data-path inat/train_mini --mixed-precision bf16 --experiment inat
python train.py --latents latents256 --method bitfit --micro-batch 32 --max-steps 200000
"""


def parse_args(description: str) -> argparse.Namespace:
    """Parse the command line. Raises ValueError for an unknown or malformed flag."""
    return build_parser(description).parse_args()


def build_parser(description: str = "") -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description=description, examples=EXAMPLES)
    for title, add_flags in (
        ("data", add_data_flags),
        ("model", add_model_flags),
        ("method", add_method_flags),
        ("optimisation", add_optimisation_flags),
        ("precision and memory", add_memory_flags),
        ("output", add_output_flags),
    ):
        add_flags(parser.add_argument_group(title).add_argument)
    return parser


def count_or_auto(text: str) -> int | str:
    """Return "auto", or the number."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


# ---- flags; `add` is the `add_argument` of a group -----------------------------------------------


def add_data_flags(add: Callable):
    add("--data-path", help="folder of images: superclass/class/*.jpg or class/*.jpg")
    add("--latents", help="folder of latents from tools.encode_latents, instead of --data-path")
    add(
        "--hierarchy",
        help="inat2021, vegfru, a .json file or a folder of images; if not given, the data's own (--dry-run: inat2021)",
    )
    add("--num-classes", type=int, help="number of classes that the hierarchy must have; if not given, any")
    add("--num-super-classes", type=int, help="number of superclasses that it must have; if not given, any")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror images at random")
    add("--num-workers", type=int, default=4, help="processes that load data, for each training process")
    add(
        "--max-bad-images",
        type=int,
        default=100,
        help="unreadable images that may be replaced by others of their class before the run stops",
    )


def add_model_flags(add: Callable):
    add("--model", choices=list(DiT_models), default="DiT-XL/2", help="size of the DiT and of its patches")
    add("--image-size", type=int, default=256, help="pixels per side")
    add("--vae", default="mse", help="autoencoder: ema or mse (downloaded), a local folder, or none to train on pixels")
    add(
        "--resume",
        help="checkpoint or adapter to start from; training state or run folder to resume, or to branch from with a new "
        "--experiment; none for random weights; if not given, DiT's own weights (downloaded)",
    )


def add_method_flags(add: Callable):
    add(
        "--method",
        choices=list(METHODS),
        default="finediffusion",
        help="which parameters are trained; lora and +lora: low-rank updates of linear layers",
    )
    add("--lora-rank", type=int, default=8, help="rank of the low-rank updates")
    add(
        "--lora-targets",
        nargs="+",
        choices=list(LORA_LAYERS),
        default=["all"],
        help="linear layers of each block with low-rank updates; adaln: its modulation",
    )
    add(
        "--embedder",
        choices=EMBEDDERS,
        help="class table with superclass rows (path: a label is the sum of its row and its ancestors'), or with a null row; "
        "if not given, the method's own",
    )
    add(
        "--tiers",
        nargs="+",
        metavar="RANK",
        help="ranks of the hierarchy that get rows, such as superclass order; if not given, the superclasses",
    )
    add(
        "--class-dropout-prob",
        type=float,
        default=0.1,
        help="probability of replacing a label by its superclass, or by its node in any of --tiers",
    )
    add(
        "--null-prob",
        type=float,
        default=0.0,
        help="probability of replacing a label by a null row, which the table has if this is above 0",
    )
    add(
        "--table-init",
        choices=["normal", "mean", "keep"],
        default="normal",
        help="new rows of the class table: N(0, std^2), or N(mean, std^2) with the mean of the base's rows; keep: take all "
        "rows of a checkpoint that does not say what they mean (an adapter's rows are carried over by class)",
    )
    add("--table-std", type=float, default=0.02, help="std of the new rows")

    add(
        "--extend",
        action="store_true",
        help="add the classes of the data to the adapter of --resume; its own classes keep their rows and labels",
    )
    add(
        "--train",
        choices=["rows", "all"],
        default="rows",
        help="with --extend: train the new rows alone, so that the old classes stay bit for bit, or all that --method trains",
    )


def add_optimisation_flags(add: Callable):
    add("--epochs", type=int, default=100, help="passes over the data")
    add("--max-steps", type=int, help="number of optimizer steps; if not given, --epochs decides")
    add("--global-batch-size", type=int, default=256, help="images per optimizer step, over all processes")
    add("--lr", type=float, help="learning rate of AdamW; if not given, the method's: 1e-4, or 1e-3 for difffit-orig")
    add("--table-lr", type=float, help="learning rate of the class table; if not given, --lr")
    add("--lora-lr", type=float, help="learning rate of the low-rank updates; if not given, --lr")
    add(
        "--lr-schedule",
        choices=["constant", "cosine"],
        default="constant",
        help="constant, or half a cosine from the learning rate to 0 over the run",
    )
    add("--clip-grad", type=float, help="largest gradient norm; if not given, gradients are not clipped")
    add("--ema-decay", type=float, default=0.9999, help="decay of the average of the trained parameters")
    add(
        "--ema-warmup",
        type=int,
        nargs="?",
        const=10,
        metavar="C",
        help="limit the decay of step k to (1 + k) / (C + k), where C is 10 if not given; 0 for no limit; without this flag, "
        f"C is {SHORT_RUN_WARMUP} in runs so short that the average would keep over {MOST_OF_START:.0%}% of the start",
    )
    add("--global-seed", type=int, default=0, help="seed of the data order, the noise and the new rows")
    add(
        "--on-nonfinite",
        choices=["stop", "skip"],
        default="stop",
        help="at a non-finite loss or gradient: stop the run, or skip the step",
    )


def add_memory_flags(add: Callable):
    add(
        "--mixed-precision",
        choices=PRECISIONS,
        default="auto",
        help=f"precision of the computation; trained parameters stay in float32; {PRECISION_HELP}; auto resumes as begun",
    )
    add("--grad-accum", type=int, default=1, help="forward passes per optimizer step, in each process")
    add(
        "--micro-batch",
        type=count_or_auto,
        metavar="N",
        help="images per forward pass, or auto for as many as the GPU's memory holds; the result is the same; if not given, "
        "auto on a GPU and all images on a CPU, unless --grad-accum is given",
    )
    add("--gpu-memory", type=float, metavar="GB", help="memory of the GPU; if not given, that of the GPU found")
    add(
        "--grad-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, half as much computation again",
    )
    add("--compile", action=argparse.BooleanOptionalAction, help=COMPILE_HELP)
    add(
        "--deterministic",
        action="store_true",
        help="the same bits in every run on a GPU too, where attention is otherwise faster (at 512 pixels; 256 has them)",
    )


def add_output_flags(add: Callable):
    add("--results-dir", default="results", help="folder of all runs")
    add(
        "--experiment",
        help="name of the run's folder, and the same command again resumes the run; if not given, a new number",
    )
    add("--log-every", type=int, default=100, help="steps per row of metrics.jsonl")
    add(
        "--report-to",
        choices=[*TRACKERS, "none"],
        default="none",
        help="tracker that gets the same rows and the sample grids",
    )
    add("--ckpt-every", type=int, default=5_000, help="steps between checkpoints: an adapter and a training state")
    add("--keep-states", type=int, default=3, help="number of recent states to keep; adapters are never deleted")
    add("--adapter-dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="number format of adapter files")
    add("--preview-images", type=int, default=16, help="images in the sample grid of each checkpoint; 0 for no grid")
    add("--allow-changes", action="store_true", help="resume although the data or decisive settings have changed")
    add(
        "--dry-run",
        action="store_true",
        help="print settings and parameter counts as JSON, and with data also steps and memory, and exit",
    )


# ---- checks and defaults -------------------------------------------------------------------------

ABOVE_ZERO = (
    "image_size",
    "epochs",
    "max_steps",
    "global_batch_size",
    "grad_accum",
    "gpu_memory",
    "log_every",
    "ckpt_every",
    "keep_states",
    "lr",
    "table_lr",
    "lora_lr",
    "lora_rank",
    "clip_grad",
)
NOT_NEGATIVE = "table_std", "ema_warmup", "num_workers", "preview_images", "max_bad_images"
FINITE = "lr", "table_lr", "lora_lr", "gpu_memory", "table_std", "clip_grad"


def check_values(args: argparse.Namespace, names: Iterable[str], valid: Callable[[float], bool], expected: str):
    """Raise ValueError if the value of a named flag is not valid; None passes. expected: the valid values in words."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not valid(value):
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}.")


def check_settings(args: argparse.Namespace):
    """Raise ValueError if a flag is out of range, or if two of them contradict each other."""
    check_values(args, ABOVE_ZERO, lambda value: value > 0, "a number above 0")
    check_values(args, ["micro_batch"], lambda value: value == "auto" or value > 0, "a number above 0, or auto")
    check_values(args, NOT_NEGATIVE, lambda value: value >= 0, "0 or more")
    check_values(args, FINITE, math.isfinite, "a finite number")
    check_values(args, ["ema_decay"], lambda value: 0 <= value < 1, "0 or more and below 1")
    if not 0 <= args.null_prob <= 1 or args.null_prob and args.null_prob + args.class_dropout_prob > 1:
        raise ValueError(
            f"--null-prob is {args.null_prob} and --class-dropout-prob {args.class_dropout_prob}, expected probabilities "
            "that add up to at most 1."
        )
    embedder = args.embedder or METHODS[args.method].embedder
    if args.tiers and embedder == "null":
        raise ValueError(
            f"--tiers is {' '.join(args.tiers)}, but the table of --method {args.method} has a null row instead: pass --embedder "
            "tiered or path, or drop the flag."
        )
    if args.null_prob and embedder == "null":
        raise ValueError(
            f"--null-prob is {args.null_prob}, but the table of --method {args.method} has a null row already: pass "
            "--embedder tiered, or --class-dropout-prob alone."
        )
    if args.extend and not (args.resume and args.experiment):
        raise ValueError("--extend needs --resume ADAPTER and --experiment NAME, found one or neither: add both.")
    if args.train != "rows" and not args.extend:
        raise ValueError("--train needs --extend, found none: add it or drop the flag.")
    if args.micro_batch and args.grad_accum > 1:
        raise ValueError("Found both --micro-batch and --grad-accum, expected one of the two: drop one.")
    if args.report_to != "none" and not importlib.util.find_spec(TRACKERS[args.report_to]):
        package = TRACKERS[args.report_to]
        raise ValueError(f"--report-to is {args.report_to}, expected its package: pip install {package}.")
    given = (args.data_path is not None) + (args.latents is not None)
    if given > 1 or not given and not args.dry_run:
        raise ValueError("Expected one of --data-path and --latents, found both or neither: pass one.")


def resolve_defaults(args: argparse.Namespace):
    """Fill in place what follows from other flags and was not given; afterwards `args` is only read."""
    if args.extend:
        adopt_settings(args, build_parser().parse_args([]))
    if args.lr is None:
        args.lr = METHODS[args.method].lr
    args.table_lr = args.lr if args.table_lr is None else args.table_lr
    args.lora_lr = args.lr if args.lora_lr is None else args.lora_lr
