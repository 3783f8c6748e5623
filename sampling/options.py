"""Flags of sample.py and sample_ddp.py, which tools/export.py and tools/figures share, and their checks."""

import argparse
import math
import re
from collections.abc import Callable, Sequence

from guidance import ALL_TIMESTEPS, GUIDANCES
from models import DiT_models
from runtime.cli import check_range
from runtime.device import COMPILE_HELP, PRECISION_HELP, PRECISIONS
from sampling.samplers import SAMPLERS

PRESETS = {  # --preset: defaults of other flags
    "paper": dict(sampler="ddpm", num_sampling_steps=250, cfg_scale=4.0),
    "fast": dict(sampler="unipc", num_sampling_steps=20),
}


def add_model_options(parser: argparse.ArgumentParser, without: Sequence[str] = ()):
    """Add a group with the flags that name a model.

    without: flags to leave out; their values are None.
    """
    add = add_group(parser, "model", without)
    add("--ckpt", help="adapter, FineDiffusion checkpoint or DiT checkpoint; if not given, DiT's own is downloaded")
    add("--base", help="base of the adapter, if it is no longer where the adapter was trained")
    add("--model", choices=list(DiT_models), help="model of a checkpoint; if not given, DiT-XL/2 or the adapter's")
    add("--image-size", type=int, help="pixels per side; if not given, 256 or the adapter's")
    add("--num-classes", type=int, help="classes of a checkpoint; if not given, 10000 (1000 for DiT's own)")
    add(
        "--num-super-classes",
        type=int,
        help="superclasses of a checkpoint; if not given, 11 (1, the null class of a plain DiT, for DiT's own)",
    )
    add(
        "--hierarchy",
        help="inat2021, a .json file or an image folder; if not given, the adapter's or the one with these numbers of classes",
    )
    add("--vae", help="autoencoder: ema, mse, a local folder, or none for pixels; if not given, mse or the adapter's")


def add_options(parser: argparse.ArgumentParser, without: Sequence[str] = ()):
    """Add the groups of flags for model, guidance, sampler and precision; `without` as in `add_model_options`."""
    add_model_options(parser, without)

    add = add_group(parser, "guidance", without)
    add(
        "--guidance",
        choices=GUIDANCES,
        default="superclass",
        help="what a class's prediction is pushed away from; guidance.py has the formulas",
    )
    add("--cfg-scale", type=float, default=4.0, help="guidance scale, 0 or more; 1 is no guidance")
    add(
        "--cfg-scale-parent",
        type=float,
        help="with --guidance chain: scale between null class and superclass; if not given, 1",
    )
    add(
        "--guide",
        metavar="RANK",
        help="with --guidance superclass: a finer rank of the model in place of the superclass",
    )
    add(
        "--cfg-scales",
        nargs="+",
        type=rank_scale,
        metavar="RANK=W",
        help="with --guidance chain: scale of the step down to each rank, such as superclass=1.5 order=2 species=4, in place of "
        "the two above; a rank that is not named has 1",
    )
    add(
        "--cfg-intervals",
        nargs="+",
        type=rank_interval,
        metavar="RANK=LO:HI",
        help="with --guidance chain: first and last guided timestep of each step; others have --guidance-interval",
    )
    add(
        "--cfg-channels",
        choices=["3", "all"],
        default="3",
        help="channels of the latents to guide: the first 3, as the official code does, or all",
    )
    add(
        "--guidance-interval",
        type=int,
        nargs=2,
        metavar=("LO", "HI"),
        default=list(ALL_TIMESTEPS),
        help="first and last guided timestep, of 0..999; each of the others takes one forward pass instead of two",
    )
    add("--weak", help="with --guidance autoguidance: an earlier adapter of the same run")

    add = add_group(parser, "sampler", without)
    add(
        "--preset",
        choices=list(PRESETS),
        help="paper: 250 steps of ddpm and guidance scale 4, as without a preset; fast: 20 steps of unipc, a twelfth of the "
        "time; flags that are given override it",
    )
    add("--sampler", choices=SAMPLERS, default="ddpm", help="sampling algorithm")
    add("--num-sampling-steps", type=int, default=250, help="steps of the sampler, 1 to 1000")

    add = add_group(parser, "precision and speed", without)
    add("--mixed-precision", choices=PRECISIONS, default="auto", help=f"precision of the network; {PRECISION_HELP}")
    add(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use TF32 in float32 matrix products, on GPUs from Ampere on",
    )
    add("--compile", action=argparse.BooleanOptionalAction, help=COMPILE_HELP)


def rank_scale(text: str) -> tuple[str, float]:
    """Read RANK=W, a finite scale of 0 or more."""
    rank, _, value = text.partition("=")
    try:
        if rank and 0 <= float(value) < math.inf:
            return rank, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no RANK=W with a finite scale W, 0 or more")


def rank_interval(text: str) -> tuple[str, tuple[int, int]]:
    """Read RANK=LO:HI, two timesteps."""
    match = re.fullmatch(r"([^=]+)=(\d{1,3}):(\d{1,3})", text)
    if match and int(match[2]) <= int(match[3]):
        return match[1], (int(match[2]), int(match[3]))
    raise argparse.ArgumentTypeError(f"{text!r} is no RANK=LO:HI with two timesteps of 0..999, the lower one first")


def parse_with_preset(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, with the defaults of its --preset. Raises ValueError for an unknown or malformed flag."""
    args = parser.parse_args()
    if args.preset:
        parser.set_defaults(**PRESETS[args.preset])
        args = parser.parse_args()
    return args


def add_group(parser: argparse.ArgumentParser, title: str, without: Sequence[str]) -> Callable:
    """Return the `add_argument` of a new group; it skips the flags in `without` and makes their values None."""
    group = parser.add_argument_group(title)

    def add(flag, **options):
        if flag in without:
            parser.set_defaults(**{flag.strip("-").replace("-", "_"): None})
        else:
            group.add_argument(flag, **options)

    return add


def advise_smaller(flag: str, images: int) -> str:
    """Return advice for a GPU whose memory is full with `images` in a forward pass. flag: the one that chooses that number."""
    return f"pass {flag} {images // 2}" if images > 1 else "pass --mixed-precision bf16 or fp16"


def check_options(args: argparse.Namespace):
    """Raise ValueError if a shared flag is invalid or contradicts another."""
    check_range(args, num_sampling_steps=(1, 1000))
    for name in ("cfg_scale", "cfg_scale_parent"):
        scale = getattr(args, name)
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"--{name.replace('_', '-')} is {scale}, expected a finite number, 0 or more.")
    low, high = args.guidance_interval
    if not ALL_TIMESTEPS[0] <= low <= high <= ALL_TIMESTEPS[1]:
        raise ValueError(f"--guidance-interval is {low} {high}, expected two timesteps of 0..999, the lower one first.")
    for flag, value, kind in (
        ("weak", args.weak, "autoguidance"),
        ("cfg-scale-parent", args.cfg_scale_parent, "chain"),
        ("cfg-scales", args.cfg_scales, "chain"),
        ("cfg-intervals", args.cfg_intervals, "chain"),
        ("guide", args.guide, "superclass"),
    ):
        if value is not None and args.guidance != kind:
            raise ValueError(f"--{flag} belongs to --guidance {kind}, found {args.guidance}: drop one of the two.")
    if args.guidance == "autoguidance" and args.weak is None:
        raise ValueError("--guidance is autoguidance, expected its weak model: pass an earlier adapter as --weak.")
