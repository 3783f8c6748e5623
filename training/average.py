"""The EMA of a run: whether it warms up, and what the log says about it."""

import argparse

from checkpoint.description import ModelDescription
from finetune import MOST_OF_START, default_warmup
from training.state import saved_warmup


def choose_warmup(args: argparse.Namespace, steps: int, saved: ModelDescription | None) -> int:
    """Return the `warmup` of the EMA: --ema-warmup, or else that of the state `saved`, or of a new run of `steps` steps."""
    if args.ema_warmup is not None:
        return args.ema_warmup
    return saved_warmup(saved) if saved else default_warmup(args.ema_decay, steps)


def describe_average(decay: float, warmup: int, steps: int) -> str:
    """Return a sentence about the EMA of a run of `steps` steps, which is what its adapters hold."""
    share = f"{decay**steps:.0%} of the starting weights after {steps:,} steps"
    if warmup:
        return (
            f"EMA: decay {decay}, at most (1 + k) / ({warmup} + k) at step k; without this limit it would keep {share}"
        )
    advice = ": for better adapters of a short run pass --ema-warmup" if decay**steps > MOST_OF_START else ""
    return f"EMA: decay {decay}, which keeps {share}{advice}"
