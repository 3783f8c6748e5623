"""Load the model and the guidance that the flags of a sampling command name."""

import argparse
from dataclasses import replace

import torch

from autoencoder import Autoencoder, load_autoencoder
from checkpoint.description import ModelDescription
from checkpoint.download import find_weights
from checkpoint.format import is_adapter, read_description, read_weights
from checkpoint.loading import TABLE, build_model, load_adapted, load_full_weights, load_weights
from finetune import kind_of, merge_lora, store_frozen
from guidance import Guidance, check_guidance
from hierarchy import Hierarchy
from hierarchy.checks import numbered_names
from hierarchy.hierarchy import SUPERCLASS, check_counts
from models import DiT
from runtime.device import explain_full_memory

PAPER_DEFAULTS = {"model": "DiT-XL/2", "image_size": 256, "num_classes": 10000, "num_super_classes": 11, "vae": "mse"}
SWAPPING = "autoguidance", "domain"  # guidances that exchange trained parameters for others
DIT_DEFAULTS = {"num_classes": 1000, "num_super_classes": 1}  # of DiT's own checkpoint, if they differ


# ---- model ---------------------------------------------------------------------------------------


def infer_hierarchy(num_classes: int, num_super_classes: int) -> Hierarchy:
    """Infer the hierarchy from class counts: a null class alone for a plain DiT, or iNaturalist's.

    Raises ValueError for other counts.
    """
    if num_super_classes == 1:
        return Hierarchy.plain(numbered_names(num_classes), f"a plain DiT with {num_classes} classes")
    if (num_classes, num_super_classes) == (PAPER_DEFAULTS["num_classes"], PAPER_DEFAULTS["num_super_classes"]):
        return Hierarchy.load("inat2021")
    raise ValueError(
        f"Found no hierarchy for {num_classes} classes and {num_super_classes} superclasses, expected one: pass --hierarchy, a "
        ".json file or an image folder."
    )


def find_hierarchy(args: argparse.Namespace) -> Hierarchy:
    """Return the hierarchy that the flags name, without reading weights; without --ckpt iNaturalist's."""
    if args.hierarchy:
        return Hierarchy.load(args.hierarchy)
    if is_adapter(args.ckpt):
        return read_description(args.ckpt).hierarchy
    flags = {key: getattr(args, key) or PAPER_DEFAULTS[key] for key in ("num_classes", "num_super_classes")}
    return infer_hierarchy(**flags)


def load_checkpoint_model(
    args: argparse.Namespace, device: str | torch.device, decoding: torch.dtype
) -> tuple[DiT, ModelDescription, Autoencoder]:
    """Load a DiT or FineDiffusion checkpoint, which the flags describe; the paper's values are the defaults."""
    defaults = PAPER_DEFAULTS | ({} if args.ckpt else DIT_DEFAULTS)
    flags = {key: value if getattr(args, key) is None else getattr(args, key) for key, value in defaults.items()}
    if args.hierarchy:
        hierarchy = Hierarchy.load(args.hierarchy).keep()
        check_counts(hierarchy, args.num_classes, args.num_super_classes)
    else:
        hierarchy = infer_hierarchy(flags["num_classes"], flags["num_super_classes"])
    path = find_weights(args.ckpt or f"DiT-XL-2-{flags['image_size']}x{flags['image_size']}.pt")
    tensors, _ = load_full_weights(path)
    autoencoder = load_autoencoder(flags["vae"], device, decoding)
    description = ModelDescription(
        model=flags["model"],
        image_size=flags["image_size"],
        latent_size=autoencoder.latent_size(flags["image_size"]),
        channels=autoencoder.channels,
        vae=flags["vae"],
        method="finediffusion",
        embedder="null" if hierarchy.num_super_classes == 1 else "tiered",
        hierarchy=hierarchy,
        file=path,
    )
    model = build_model(description)
    load_weights(model, tensors, path)
    return model.eval(), description, autoencoder


def load_model(
    args: argparse.Namespace, device: str | torch.device, half: torch.dtype | None = None
) -> tuple[DiT, ModelDescription, Autoencoder]:
    """Load --ckpt, an adapter or a checkpoint, onto the device, in evaluation mode and without gradients.

    half: half-precision type of the network's computation, or None. With one, a GPU decodes in float16 if the autoencoder
    allows it: it is closer to float32 than bfloat16.

    Raises ValueError if it cannot be read or contradicts a flag.
    """
    decoding = torch.float16 if half and torch.device(device).type == "cuda" else torch.float32
    load = load_adapter_model if is_adapter(args.ckpt) else load_checkpoint_model
    with explain_full_memory(None, "stop other programs that use it, or choose another GPU"):
        model, description, autoencoder = load(args, device, decoding)
        if getattr(args, "guidance", None) not in SWAPPING:
            merge_lora(model)
        model.to(device).requires_grad_(False)
    if half:
        store_frozen(model, half)
    return model, description, autoencoder


def load_adapter_model(
    args: argparse.Namespace, device: str | torch.device, decoding: torch.dtype
) -> tuple[DiT, ModelDescription, Autoencoder]:
    """Load an adapter with its base. Raises ValueError if a flag contradicts the adapter."""
    model, description = load_adapted(args.ckpt, args.base)
    for key in ("model", "image_size"):
        given, own = getattr(args, key), getattr(description, key)
        if given not in (None, own):
            raise ValueError(
                f"--{key.replace('_', '-')} is {given}, expected {own}, with which {args.ckpt} was trained: drop the flag."
            )
    check_counts(description.hierarchy, args.num_classes, args.num_super_classes)
    if args.hierarchy:
        hierarchy = match_hierarchy(Hierarchy.load(args.hierarchy), description.hierarchy)
        description = replace(description, hierarchy=hierarchy)
    description = replace(description, vae=args.vae or description.vae, file=args.ckpt)
    autoencoder = load_autoencoder(description.vae, device, decoding)
    found = autoencoder.latent_size(description.image_size), autoencoder.channels
    if found != (description.latent_size, description.channels):
        raise ValueError(
            f"The latents of the autoencoder are {found[1]} x {found[0]}^2, expected {description.channels} x "
            f"{description.latent_size}^2 for this model: pass the --vae it was trained with."
        )
    return model, description, autoencoder


def match_hierarchy(given: Hierarchy, own: Hierarchy) -> Hierarchy:
    """Return `given`, the one of --hierarchy, if its classes are the adapter's `own`; it may add names to numbers.

    It keeps the ranks that `own` has. Raises ValueError if the nodes of the classes differ in a rank, or the names of the
    classes unless `own` has only numbers.
    """
    given = given.keep(*(tier.name for tier in own.tiers) if own.ranks else ())
    if not given.ancestors.equal(own.ancestors):
        raise ValueError(
            f"--hierarchy is {given!r}, expected {own!r}, on which the adapter was trained: drop the flag."
        )
    differ = (label for label, name in enumerate(own.classes) if name != given.classes[label])
    label = None if own.numbered else next(differ, None)
    if label is not None:
        raise ValueError(
            f"--hierarchy has {given.classes[label]!r} as class {label}, expected {own.classes[label]!r}, with which the "
            "adapter was trained: drop the flag."
        )
    return given


# ---- guidance ------------------------------------------------------------------------------------


def build_guidance(args: argparse.Namespace, model: DiT, description: ModelDescription) -> Guidance:
    """Return the guidance that the flags name, with the other weights it needs on the model's device.

    Raises ValueError if the model cannot be guided so.
    """
    others = {"autoguidance": read_weak_weights, "domain": read_base_weights}
    other = others[args.guidance](args) if args.guidance in others else {}
    parameters = {name: model.get_parameter(name) for name in other}
    guidance = Guidance(
        args.guidance,
        args.cfg_scale,
        1.0 if args.cfg_scale_parent is None else args.cfg_scale_parent,
        tuple(args.guidance_interval),
        "all" if args.cfg_channels == "all" else 3,
        {name: other[name].to(parameter.device, parameter.dtype) for name, parameter in parameters.items()},
        **tree_settings(args, description),
    )
    check_guidance(guidance, model.y_embedder)
    return guidance


def tree_settings(args: argparse.Namespace, description: ModelDescription) -> dict:
    """Return the settings of a `Guidance` that name tiers. Raises ValueError if the model has no rows for one."""
    tiers = description.tiers or [SUPERCLASS]
    steps = [*tiers, description.hierarchy.leaf]  # of a chain, named by their lower ends

    def place(flag: str, rank: str, names: list[str]) -> int:
        name = names[0] if rank == SUPERCLASS else rank
        if name not in names:
            raise ValueError(
                f"--{flag} names rank {rank!r}, expected one that the model has rows for: {', '.join(names)}."
            )
        return names.index(name)

    found = {"tier": place("guide", args.guide, tiers)} if args.guide else {}
    for flag, key, other in (
        ("cfg-scales", "scales", 1.0),
        ("cfg-intervals", "intervals", tuple(args.guidance_interval)),
    ):
        given = getattr(args, flag.replace("-", "_"))
        if given:
            values = {place(flag, rank, steps): value for rank, value in given}
            found[key] = tuple(values.get(step, other) for step in range(len(steps)))
    return found


def read_own_adapter(args: argparse.Namespace) -> tuple[dict[str, torch.Tensor], ModelDescription]:
    """Read the trained parameters in --ckpt. Raises ValueError if it is not an adapter, or a patch."""
    if not is_adapter(args.ckpt):
        raise ValueError(
            f"--ckpt is {args.ckpt}, expected an adapter, whose trained parameters --guidance {args.guidance} swaps: pass one, "
            "or choose another guidance."
        )
    tensors, description = read_weights(args.ckpt)
    if description.patch_rows:
        raise ValueError(
            f"--ckpt is {args.ckpt}, which holds new rows of the class table alone, expected an adapter whose parameters "
            f"--guidance {args.guidance} can swap: merge it with tools.merge, or choose another guidance."
        )
    return tensors, description


def read_weak_weights(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Read the tensors of --weak that replace the adapter's. Raises ValueError if it is not of the same run."""
    tensors, own = read_own_adapter(args)
    if not is_adapter(args.weak):
        raise ValueError(f"--weak is {args.weak}, expected an earlier adapter of the same run: name that.")
    others, weak = read_weights(args.weak)
    bases = [about.base and about.base.sha256 for about in (own, weak)]
    fields = ("model", "image_size", "method", "hierarchy")
    same = bases[0] == bases[1] and all(getattr(own, name) == getattr(weak, name) for name in fields)
    if not same or {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in others.items()}:
        raise ValueError(
            f"--weak {args.weak} is of another base, model or method than {args.ckpt}, expected an earlier adapter of the same "
            "run: name that."
        )
    return others


def read_base_weights(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Read the tensors of the adapter's base that replace the adapter's; its table is reduced to the null row.

    Norms, DiffFit's factors and low-rank updates that the base lacks have their initial values: 1, and 0 for the bias of a
    norm and for an update. Raises ValueError if the base is not a plain DiT with a null row.
    """
    tensors, own = read_own_adapter(args)
    path = own.base and find_weights(args.base or own.base.path)
    base, about = load_full_weights(path) if path else ({}, None)
    plain = about and (about.embedder == "null" or about.null_row)
    if not about:
        plain = base and not any(kind_of(name) == "norm" for name in base)
    if not plain:
        raise ValueError(
            f"--guidance domain needs the null row of a plain DiT, and {args.ckpt} was not fine-tuned from one: choose another "
            "guidance."
        )
    start = {
        name: torch.zeros_like(t) if name.endswith((".bias", ".lora_B")) else torch.ones_like(t)
        for name, t in tensors.items()
        if kind_of(name) in ("norm", "gamma") or name.endswith(".lora_B")
    }
    other = start | {name: base[name] for name in tensors if name in base}
    return other | {TABLE: base[TABLE][-1:]}
