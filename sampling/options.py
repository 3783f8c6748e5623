"""What sample.py and sample_ddp.py are both asked for: their flags, the model these name (tools.export too), its guidance."""

import math

from guidance import ALL_TIMESTEPS, GUIDANCES
from models import DiT_models
from runtime.cli import check_range
from sampling.samplers import SAMPLERS


def add_model_options(add):
    """The flags that name a model; `add`: a parser's `add_argument`."""
    add(
        "--ckpt",
        help="adapter, FineDiffusion's or DiT's checkpoint (default: DiT's own, downloaded, with 1000 classes)",
    )
    add("--base", help="the adapter's base, where it is not where the adapter was trained")
    add("--model", choices=list(DiT_models), help="for checkpoints (default DiT-XL/2); an adapter knows its own")
    add("--image-size", type=int, help="for checkpoints (default 256)")
    add("--num-classes", type=int, help="for checkpoints (default 10000; 1000 for DiT's own)")
    add("--num-super-classes", type=int, help="for checkpoints (default 11; 1 is a plain DiT's null class)")
    add("--hierarchy", help="inat2021, a .json file or an image folder (default: the adapter's, else by the counts)")
    add("--vae", help="ema, mse, a local folder, or none (default mse; an adapter knows its own)")


def add_options(add):
    """All shared flags; `add`: a parser's `add_argument`."""
    add_model_options(add)
    add("--guidance", choices=GUIDANCES, default="superclass", help="what a class is pushed away from, see guidance.py")
    add("--cfg-scale", type=float, default=4.0)
    add("--cfg-scale-parent", type=float, help="chain: the scale between null class and superclass (default 1)")
    add("--cfg-channels", choices=["3", "all"], default="3", help="guide so many channels (3 as the official code)")
    add(
        "--guidance-interval",
        type=int,
        nargs=2,
        metavar=("LO", "HI"),
        default=list(ALL_TIMESTEPS),
        help="first and last timestep that are guided, of 0..999; the others take one forward pass instead of two",
    )
    add("--weak", help="autoguidance: an earlier adapter of the same run")
    add("--sampler", choices=SAMPLERS, default="ddpm")
    add("--num-sampling-steps", type=int, default=250)
    add(
        "--compile",
        action="store_true",
        help="torch.compile every block: for many steps, pictures alike but for float sums",
    )


def check_options(args):
    """ValueError where a shared flag, or two of them together, make no sense."""
    check_range(args, num_sampling_steps=(1, 1000))
    for name in ("cfg_scale", "cfg_scale_parent"):
        scale = getattr(args, name)
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"--{name.replace('_', '-')} is {scale}, expected a finite number, 0 or more: change it.")
    low, high = args.guidance_interval
    if not ALL_TIMESTEPS[0] <= low <= high <= ALL_TIMESTEPS[1]:
        raise ValueError(
            f"--guidance-interval is {low} {high}, expected two timesteps of 0..999, the lower one first: change it."
        )
    for flag, value, kind in (
        ("weak", args.weak, "autoguidance"),
        ("cfg-scale-parent", args.cfg_scale_parent, "chain"),
    ):
        if value is not None and args.guidance != kind:
            raise ValueError(f"--{flag} belongs to --guidance {kind}, found {args.guidance}: drop one of the two.")
    if args.guidance == "autoguidance" and args.weak is None:
        raise ValueError("--guidance is autoguidance, expected its weak model: pass an earlier adapter as --weak.")
