"""What sample.py and sample_ddp.py are both asked for: their flags, the model these name (tools.export too), its guidance."""

import math

import torch

from autoencoder import load_autoencoder
from checkpoint import loading as checkpoint
from dataset.images import check_counts
from finetune import kind_of
from guidance import GUIDANCES, TIMESTEPS, Guidance, check_guidance
from hierarchy import Hierarchy
from models import DiT_models
from runtime.cli import check_range
from sampling.samplers import SAMPLERS

PAPER = {"model": "DiT-XL/2", "image_size": 256, "num_classes": 10000, "num_super_classes": 11, "vae": "mse"}
PLAIN = {"num_classes": 1000, "num_super_classes": 1}  # DiT's own checkpoint


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
        default=list(TIMESTEPS),
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
    if not TIMESTEPS[0] <= low <= high <= TIMESTEPS[1]:
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


def check_images(images, names):
    """ValueError where an image of (n, 3, H, W) is not finite; `names`: what to call each."""
    bad = (~images.isfinite()).flatten(1).any(1).nonzero()
    if len(bad):
        raise ValueError(
            f"{names[bad[0]]} is not finite, expected pixels: check --ckpt and --cfg-scale and, where they are given, "
            "--mixed-precision and --tf32."
        )


# ---- the model ------------------------------------------------------------------------------------------------------


def hierarchy_of_counts(num_classes, num_super_classes):
    """The hierarchy that a checkpoint's counts stand for: none below a null class, or iNaturalist's."""
    if num_super_classes == 1:
        name, parents = f"a plain DiT with {num_classes} classes", [0] * num_classes
        return Hierarchy.from_dict({"name": name, "superclasses": ["null"], "parents": parents})
    if (num_classes, num_super_classes) == (PAPER["num_classes"], PAPER["num_super_classes"]):
        return Hierarchy.load("inat2021")
    raise ValueError(
        f"Nothing says which of {num_super_classes} superclasses the {num_classes} classes have: pass --hierarchy, a .json file "
        "or the image folder."
    )


def load_checkpoint(args, device):
    """(model, description, autoencoder) of a DiT's or FineDiffusion's checkpoint, by the flags and the paper's defaults."""
    defaults = PAPER | ({} if args.ckpt else PLAIN)
    flags = {key: value if getattr(args, key) is None else getattr(args, key) for key, value in defaults.items()}
    if args.hierarchy:
        hierarchy = Hierarchy.load(args.hierarchy)
        check_counts(hierarchy, args.num_classes, args.num_super_classes)
    else:
        hierarchy = hierarchy_of_counts(flags["num_classes"], flags["num_super_classes"])
    path = checkpoint.find(args.ckpt or f"DiT-XL-2-{flags['image_size']}x{flags['image_size']}.pt")
    tensors, _ = checkpoint.whole(path)
    autoencoder = load_autoencoder(flags["vae"], device)
    description = {
        "model": flags["model"],
        "image_size": flags["image_size"],
        "latent_size": autoencoder.latent_size(flags["image_size"]),
        "channels": autoencoder.channels,
        "vae": flags["vae"],
        "method": "finediffusion",
        "embedder": "null" if hierarchy.num_super_classes == 1 else "tiered",
        "null_row": False,
        "hierarchy": hierarchy,
        "base": None,
        "step": 0,
        "file": path,
    }
    model = checkpoint.build(description)
    checkpoint.load(model, tensors, path)
    return model.eval(), description, autoencoder


def load_model(args, device):
    """(model on `device`, description, autoencoder) of --ckpt, an adapter or a checkpoint; "file" is where it was read."""
    if checkpoint.is_adapter(args.ckpt):
        model, description, autoencoder = load_adapter(args, device)
    else:
        model, description, autoencoder = load_checkpoint(args, device)
    return model.to(device).requires_grad_(False), description, autoencoder


def load_adapter(args, device):
    model, description = checkpoint.load_adapted(args.ckpt, args.base)
    for key in ("model", "image_size"):
        given = getattr(args, key)
        if given not in (None, description[key]):
            raise ValueError(
                f"--{key.replace('_', '-')} is {given}, but {args.ckpt} was trained with {description[key]}: drop the flag."
            )
    check_counts(description["hierarchy"], args.num_classes, args.num_super_classes)
    if args.hierarchy:
        description["hierarchy"] = same_hierarchy(Hierarchy.load(args.hierarchy), description["hierarchy"])
    description["vae"] = args.vae or description["vae"]
    autoencoder = load_autoencoder(description["vae"], device)
    found = autoencoder.latent_size(description["image_size"]), autoencoder.channels
    if found != (description["latent_size"], description["channels"]):
        raise ValueError(
            f"The model works on {description['channels']} x {description['latent_size']}^2 latents, but the autoencoder makes "
            f"{found[1]} x {found[0]}^2: pass the --vae it was trained with."
        )
    return model, description | {"file": args.ckpt}, autoencoder


def same_hierarchy(given, own):
    """`given`, which may bring names, if its map of superclasses is the adapter's `own`."""
    if not given.parents.equal(own.parents):
        raise ValueError(f"--hierarchy is {given!r}, but the adapter was trained on {own!r}: drop the flag.")
    return given


# ---- its guidance ---------------------------------------------------------------------------------------------------


def guidance_of(args, model, description):
    """The `Guidance` that the flags ask for, with the other weights it needs beside the model's."""
    others = {"autoguidance": weak_weights, "domain": base_weights}
    other = others[args.guidance](args, description) if args.guidance in others else {}
    parameters = {name: model.get_parameter(name) for name in other}
    guidance = Guidance(
        args.guidance,
        args.cfg_scale,
        1.0 if args.cfg_scale_parent is None else args.cfg_scale_parent,
        tuple(args.guidance_interval),
        "all" if args.cfg_channels == "all" else 3,
        {name: other[name].to(parameter.device, parameter.dtype) for name, parameter in parameters.items()},
    )
    check_guidance(guidance, model.y_embedder)
    return guidance


def own_adapter(args):
    """({name: tensor}, description) of --ckpt, the trained parameters alone."""
    if not checkpoint.is_adapter(args.ckpt):
        raise ValueError(
            f"--guidance {args.guidance} swaps what a fine-tune has trained, but --ckpt is {args.ckpt}: expected an adapter."
        )
    return checkpoint.read(args.ckpt)


def weak_weights(args, description):
    """What --weak has in place of the adapter's tensors: {name: tensor}."""
    tensors, own = own_adapter(args)
    if not checkpoint.is_adapter(args.weak):
        raise ValueError(f"--weak is {args.weak}, expected an earlier adapter of the same run: name that.")
    others, weak = checkpoint.read(args.weak)
    bases = [(about["base"] or {}).get("sha256") for about in (own, weak)]
    same = bases[0] == bases[1] and all(own[key] == weak[key] for key in ("model", "image_size", "method", "hierarchy"))
    if not same or {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in others.items()}:
        raise ValueError(
            f"--weak {args.weak} is of another base, model or method than {args.ckpt}: expected an earlier adapter of the "
            "same run."
        )
    return others


def base_weights(args, description):
    """What the adapter's base has in place of the adapter's tensors, and of its table the null row alone.

    Norms and DiffFit's factors that the base lacks are what they are before a fine-tune: 1, and 0 for a norm's bias.
    """
    tensors, own = own_adapter(args)
    path = own["base"] and checkpoint.find(args.base or own["base"]["path"])
    base, about = checkpoint.whole(path) if path else ({}, {})
    plain = about.get("embedder") == "null" or about.get("null_row")
    if not about:
        plain = base and not any(kind_of(name) == "norm" for name in base)
    if not plain:
        raise ValueError(
            f"--guidance domain needs the null row of a plain DiT, but {args.ckpt} was not fine-tuned from one: choose another "
            "guidance."
        )
    start = {
        name: torch.zeros_like(t) if name.endswith(".bias") else torch.ones_like(t)
        for name, t in tensors.items()
        if kind_of(name) in ("norm", "gamma")
    }
    other = start | {name: base[name] for name in tensors if name in base}
    return other | {checkpoint.TABLE: base[checkpoint.TABLE][-1:]}
