"""A recipe has all settings of a picture: it is the query of a link, and the flags of a sample.py command."""

import argparse
import contextlib
import shlex
from collections.abc import Mapping

from guidance import ALL_TIMESTEPS
from runtime.text import shorten

NUMBERS = {  # setting: type, lowest and highest value
    "position": (int, 0, 999),
    "seed": (int, 0, 2**53 - 1),  # a browser knows larger integers only roughly
    "scale": (float, 0, 100),
    "parent_scale": (float, 0, 100),
    "steps": (int, 1, 250),
    "low": (int, *ALL_TIMESTEPS),  # first and last guided timestep
    "high": (int, *ALL_TIMESTEPS),
}
MODEL_FLAGS = "base model image_size num_classes num_super_classes hierarchy vae cfg_channels mixed_precision".split()
USUAL = None, "3", "auto"  # flags with these values need not be written

# the numbers above; class and noise (labels), sampler, guidance, guide (a rank for superclass guidance), adapter (0 or 1)
Recipe = dict[str, int | float | str]


def default_settings(args: argparse.Namespace) -> dict[str, str]:
    """Return the settings that a link may leave out, as the flags give them; `noise` is the class unless a link has it."""
    found = dict(position=0, seed=0, scale=args.cfg_scale, sampler=args.sampler, steps=args.num_sampling_steps)
    found |= dict(guidance=args.guidance, guide="superclass", adapter=0)
    found["low"], found["high"] = args.guidance_interval
    found["parent_scale"] = 1.0 if args.cfg_scale_parent is None else args.cfg_scale_parent
    return {name: str(value) for name, value in found.items()}


def read_recipe(query: Mapping[str, str], defaults: Mapping[str, str], choices: Mapping[str, Mapping]) -> Recipe:
    """Return the recipe of a link. Raises ValueError for an unknown setting and a value out of range.

    choices: {text: value} of each setting that is not a number
    """
    recipe = {}
    for name, text in {"class": "", "noise": query.get("class", ""), **defaults, **query}.items():
        if name in choices:
            value, expected = choices[name].get(text), f"one of {shorten(choices[name], most=9)}"
        elif name in NUMBERS:
            (kind, low, high), value = NUMBERS[name], None
            expected = f"{'an integer' if kind is int else 'a number'} from {low} to {high}"
            with contextlib.suppress(ValueError):
                value = number if low <= (number := kind(text)) <= high else None
        else:
            raise ValueError(f"The link has {name[:40]!r}, expected {', '.join([*choices, *NUMBERS])}.")
        if value is None:
            raise ValueError(f"{name} is {text[:40]!r}, expected {expected}.")
        recipe[name] = value
    if recipe["low"] > recipe["high"]:
        raise ValueError(f"low is {recipe['low']} and high {recipe['high']}, expected the lower timestep first.")
    return recipe


def sample_command(recipe: Recipe, args: argparse.Namespace, ckpt: str | None) -> str:
    """Return the sample.py command that draws the same pixels on a CPU, "" if there is none: it has no `noise`.

    It draws the positions before as well, one image at a time: others in the batch change an image by rounding.
    """
    if recipe["noise"] != recipe["class"]:
        return ""
    guidance = recipe["guidance"]
    flags = {"ckpt": ckpt} | {name: getattr(args, name) for name in MODEL_FLAGS}
    flags |= dict(classes=f"{recipe['class']:05d}", seed=recipe["seed"], guidance=guidance, cfg_scale=recipe["scale"])
    flags["cfg_scale_parent"] = recipe["parent_scale"] if guidance == "chain" else None
    flags["guide"] = recipe["guide"] if guidance == "superclass" != recipe["guide"] else None
    flags["weak"] = args.weak if guidance == "autoguidance" else None
    flags |= dict(sampler=recipe["sampler"], num_sampling_steps=recipe["steps"])
    words = [(f"--{name.replace('_', '-')}", value) for name, value in flags.items() if value not in USUAL]
    if recipe["position"]:
        words.append(("--per-class", recipe["position"] + 1, "--batch-size", 1))
    if (recipe["low"], recipe["high"]) != ALL_TIMESTEPS:
        words.append(("--guidance-interval", recipe["low"], recipe["high"]))
    return shlex.join(["python", "sample.py", *(str(word) for group in words for word in group)])
