"""The flags of train.py, and what they must satisfy."""

import argparse
import importlib.util
import math

from finetune import METHODS
from models import DiT_models
from runtime.cli import Parser
from runtime.device import PRECISIONS
from training.logger import TRACKERS


def parse_args(description):
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data-path", help="folder of images, see data.py")
    add("--latents", help="folder that tools.encode_latents wrote, instead of --data-path")
    add("--hierarchy", help="inat2021, vegfru, a .json file or a folder; default: the data's own")
    add("--results-dir", default="results")
    add("--experiment", help="name of the run's folder; the same command again continues the run")
    add(
        "--resume",
        help="weights or adapter to start from, state or run folder to continue, or none; default: DiT's own",
    )
    add("--model", choices=list(DiT_models), default="DiT-XL/2")
    add("--image-size", type=int, default=256)
    add("--num-classes", type=int, help="checked against the hierarchy")
    add("--num-super-classes", type=int, help="checked against the hierarchy")
    add("--vae", default="mse", help="ema, mse, a local folder, or none (pixels)")
    add("--method", choices=list(METHODS), default="finediffusion")
    add("--embedder", choices=["tiered", "null"], help="default: the method's")
    add("--class-dropout-prob", type=float, default=0.1, help="at which a label becomes its superclass's")
    add("--null-prob", type=float, default=0.0, help="at which it becomes that of a null row, which the table then has")
    add(
        "--table-init",
        choices=["normal", "mean"],
        default="normal",
        help="new class rows: N(0, std^2), or that around the mean of the base's rows",
    )
    add("--table-std", type=float, default=0.02)
    add("--lr", type=float, help="default: the method's")
    add("--table-lr", type=float, help="learning rate of the class table; default: --lr")
    add("--lr-schedule", choices=["constant", "cosine"], default="constant")
    add("--clip-grad", type=float, help="largest gradient norm; default: not clipped")
    add("--ema-decay", type=float, default=0.9999)
    add("--ema-warmup", action="store_true", help="a decay of at most (1 + k) / (10 + k) at step k, for short runs")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror images at random")
    add("--epochs", type=int, default=100)
    add("--max-steps", type=int, help="instead of --epochs")
    add("--global-batch-size", type=int, default=256)
    add("--grad-accum", type=int, default=1, help="passes in which a process works through its part of the batch")
    add("--micro-batch", type=int, help="the same said otherwise: images in a pass")
    add("--grad-checkpointing", action="store_true", help="keep less for the backward pass, compute half as much again")
    add("--global-seed", type=int, default=0)
    add("--num-workers", type=int, default=4)
    add("--mixed-precision", choices=PRECISIONS, default="no")
    add("--adapter-dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="how adapters are stored")
    add("--compile", action="store_true", help="torch.compile every block")
    add("--log-every", type=int, default=100)
    add("--report-to", choices=[*TRACKERS, "none"], default="none", help="beside metrics.jsonl")
    add("--ckpt-every", type=int, default=50_000)
    add("--keep-states", type=int, default=3, help="so many of the newest training states; adapters all stay")
    add("--allow-changes", action="store_true", help="continue a run although its data or settings have changed")
    add("--on-nonfinite", choices=["stop", "skip"], default="stop", help="where a loss or gradient is not finite")
    add("--max-bad-images", type=int, default=100, help="unreadable ones that are passed over before the run stops")
    add("--preview-images", type=int, default=16, help="in the grid of samples at each checkpoint; 0 for none")
    add("--dry-run", action="store_true", help="print the settings and parameter counts as JSON, and stop")
    return parser.parse_args()


def check_settings(args):
    positive = (
        "image_size epochs max_steps global_batch_size grad_accum micro_batch log_every ckpt_every keep_states lr table_lr "
        "clip_grad"
    )
    for name in positive.split():
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected a number above 0: change it.")
    for name in ("table_std", "num_workers", "preview_images", "max_bad_images"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected 0 or more: change it.")
    for name in ("lr", "table_lr", "table_std", "clip_grad"):
        if getattr(args, name) is not None and math.isinf(getattr(args, name)):
            raise ValueError(f"--{name.replace('_', '-')} is inf, expected a finite number: change it.")
    if not 0 <= args.null_prob <= 1 or args.null_prob and args.null_prob + args.class_dropout_prob > 1:
        raise ValueError(
            f"--null-prob is {args.null_prob} and --class-dropout-prob {args.class_dropout_prob}, expected probabilities that "
            "add up to at most 1: change them."
        )
    if args.null_prob and (args.embedder or METHODS[args.method].embedder) == "null":
        raise ValueError(
            f"--null-prob is {args.null_prob}, but the table of --method {args.method} has a null row already: pass "
            "--embedder tiered, or --class-dropout-prob alone."
        )
    if args.micro_batch and args.grad_accum > 1:
        raise ValueError("Found both --micro-batch and --grad-accum, expected one of the two: drop one.")
    if args.report_to != "none" and not importlib.util.find_spec(TRACKERS[args.report_to]):
        raise ValueError(
            f"--report-to is {args.report_to}, expected that package: pip install {TRACKERS[args.report_to]}."
        )
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"--ema-decay is {args.ema_decay}, expected 0 or more and below 1: change it.")
    if not args.dry_run and (args.data_path is None) == (args.latents is None):
        raise ValueError("Expected one of --data-path and --latents, found both or neither: pass one.")
