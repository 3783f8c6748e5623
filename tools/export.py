"""Export an adapter merged onto its base, or a checkpoint, as weights for other tools.

    python -m tools.export --ckpt ADAPTER --format diffusers --out DIR [--push USER/NAME]
    python -m tools.export --ckpt ADAPTER --format dit --superclass Birds --out dit.pt
    python -m tools.export --ckpt ADAPTER --format finediffusion --out finediffusion.pt
    python -m tools.export --ckpt ADAPTER --format peft --out DIR

`diffusers`: a folder for `DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)`. `dit`: a plain DiT without
LayerNorm affine; its null class is a superclass, or the model's own null row. `finediffusion`: a checkpoint of the
official code. `peft`: a folder for `PeftModel.from_pretrained(MODEL, DIR)`, with the low-rank updates alone, and the
weights of MODEL, a `DiT` of models.py, into which all else that was trained is merged.
"""

import argparse
import ast
import json
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from string import Template

import torch
from torch import nn

from autoencoder import Autoencoder
from checkpoint.description import ModelDescription
from checkpoint.download import DIT_FILES
from checkpoint.format import is_adapter, write_tensors
from checkpoint.loading import TABLE, load_adapted
from finetune import LORA_LAYERS, fold_gammas, fold_lora, kind_of
from runtime.cli import Parser, run_command
from runtime.files import UMASK, atomic_write
from runtime.text import one_line
from sampling.load import load_model
from sampling.options import add_model_options
from tiered_embedder import TieredEmbedder

ROOT = Path(__file__).resolve().parents[1]
PIPELINE_FOLDER = ROOT / "tools/diffusers_pipeline"  # code and model card of a diffusers export
# with the suffixes of --out; those without are folders
FORMATS = {"diffusers": (), "dit": (".pt", ".safetensors"), "finediffusion": (".pt",), "peft": ()}
# DiT's diffusion process and its default sampler
SCHEDULER = dict(
    num_train_timesteps=1000,
    beta_start=1e-4,
    beta_end=0.02,
    beta_schedule="linear",
    variance_type="learned_range",
    timestep_spacing="linspace",
    clip_sample=False,
)
EXAMPLES = """
    python -m tools.export --ckpt results/inat/adapters/0200000.safetensors --format diffusers --out birds
    python -m tools.export --ckpt results/inat/adapters/0200000.safetensors --format dit --superclass Birds --out dit.pt
"""


# ---- DiT and FineDiffusion -----------------------------------------------------------------------


def fold_norms(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merge each LayerNorm affine (weight g, bias b) of a DiT into the modulation that follows it.

    (g n + b) (1 + s) + h = n (1 + s') + h' with s' = g s + g - 1 and h' = h + b s + b, n being the normalised tokens.
    So with s = W_s c + b_s and h = W_h c + b_h: W_s' = diag(g) W_s, b_s' = g b_s + g - 1, W_h' = W_h + diag(b) W_s,
    b_h' = b_h + b b_s + b.
    """
    tensors = dict(tensors)
    # norm -> index of its shift among the chunks of D rows of the modulation; the scale is the next chunk
    places = {"norm1": 0, "norm2": 3, "norm_final": 0}
    for name in [name for name in tensors if kind_of(name) == "norm" and name.endswith(".weight")]:
        part, norm, _ = name.rsplit(".", 2)
        g, b = (tensors.pop(f"{part}.{norm}.{kind}").double() for kind in ("weight", "bias"))
        layer, i = f"{part}.adaLN_modulation.1", places[norm]
        weight, bias = (tensors[f"{layer}.{kind}"].double().split(len(g)) for kind in ("weight", "bias"))
        weight, bias = list(weight), list(bias)
        weight[i : i + 2] = weight[i] + b[:, None] * weight[i + 1], g[:, None] * weight[i + 1]
        bias[i : i + 2] = bias[i] + b * bias[i + 1] + b, g * bias[i + 1] + g - 1
        tensors |= {f"{layer}.weight": torch.cat(weight).float(), f"{layer}.bias": torch.cat(bias).float()}
    return tensors


def superclass_names(description: ModelDescription) -> tuple[str, ...]:
    """Return the names of the table's superclass rows; a plain DiT has one, the null class."""
    return description.hierarchy.superclasses if description.tiered else ("null",)


def null_row(table: TieredEmbedder, names: tuple[str, ...], query: str | None = None) -> int:
    """Return the row of `table` that becomes DiT's null class.

    names: the superclasses, in the order of their rows
    query: name or index of a superclass; None chooses the table's own null row

    Raises ValueError if `query` is not a superclass, or is None and the table has no null row.
    """
    listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
    if query is None and not table.has_null:
        raise ValueError(
            f"A DiT needs a null class, but the model has {len(names)} superclasses instead: choose one of them with "
            f"--superclass ({listed})."
        )
    if query is None:
        return table.null
    if query in names:
        return table.num_classes + names.index(query)
    if query.isdecimal() and int(query) < len(names):
        return table.num_classes + int(query)
    raise ValueError(f"--superclass is {query}, expected a name or an index of {listed}.")


def write_dit(path: Path, tensors: dict[str, torch.Tensor], rows: list[int]):
    """Write a plain DiT: tensors by name, without LayerNorm affine.

    rows: rows of the class table to keep, the null class last
    """
    tensors = fold_norms(tensors)
    tensors[TABLE] = tensors[TABLE][rows]
    if path.suffix == ".safetensors":
        write_tensors(path, tensors, {"format": "pt"})
    else:
        atomic_write(path, lambda part: torch.save(tensors, part))


def write_finediffusion(path: Path, tensors: dict[str, torch.Tensor], description: ModelDescription):
    """Write a checkpoint of the official code, without further ranks and a null row; `torch.load` runs no code of it."""
    classes, superclasses = description.hierarchy.num_classes, len(superclass_names(description))
    tensors = tensors | {TABLE: tensors[TABLE][: classes + superclasses].clone()}
    settings = {"model": description.model, "image_size": description.image_size}
    settings |= {"num_classes": classes, "num_super_classes": superclasses}
    record = {"model": tensors, "ema": tensors, "opt": {}, "args": settings}
    atomic_write(path, lambda part: torch.save(record, part))


# ---- PEFT ----------------------------------------------------------------------------------------


def write_peft(folder: Path, tensors: dict[str, torch.Tensor], description: ModelDescription):
    """Write the low-rank updates in the form of PEFT, and `base_model.safetensors` with all other tensors.

    Raises ValueError if the adapter has no low-rank updates.
    """
    if not description.lora_rank:
        raise ValueError(
            f"The adapter was trained with --method {description.method}, expected lora or one with +lora: choose another "
            "--format."
        )
    layers = {path for target in description.lora_targets.split() for path in LORA_LAYERS[target]}
    config = {
        "peft_type": "LORA",
        "r": description.lora_rank,
        "lora_alpha": description.lora_rank,  # PEFT multiplies by lora_alpha / r
        "target_modules": rf"blocks\.\d+\.({'|'.join(re.escape(path) for path in sorted(layers))})",
        "inference_mode": True,
    }
    updates = {name: t for name, t in tensors.items() if kind_of(name) == "lora"}
    base = {name: t for name, t in tensors.items() if name not in updates}
    updates = {f"base_model.model.{name}.weight": t for name, t in updates.items()}
    write_tensors(folder / "base_model.safetensors", base, {"format": "pt"})
    write_tensors(folder / "adapter_model.safetensors", updates, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


# ---- diffusers -----------------------------------------------------------------------------------


def write_diffusers(
    folder: Path,
    model: nn.Module,
    tensors: dict[str, torch.Tensor],
    description: ModelDescription,
    autoencoder: Autoencoder,
    source: str,
):
    """Write a complete diffusers folder: configs, weights, code, model card and autoencoder.

    source: the name that the model card's example loads
    """
    hierarchy, table = description.hierarchy, model.y_embedder
    config = {
        "input_size": model.input_size,
        "patch_size": model.patch_size,
        "in_channels": model.in_channels,
        "hidden_size": model.pos_embed.shape[-1],
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
        "null_row": table.null_row,
        "id2label": dict(enumerate(hierarchy.classes)),
        "label2superclass": dict(enumerate(table.parents.tolist())),
        "id2superclass": dict(enumerate(superclass_names(description))),
    }
    if description.tiered and hierarchy.ranks:
        config["ranks"] = {rank.name: rank.names() for rank in hierarchy.ranks}
    if table.path:
        config["path"] = True
    parts = {
        "transformer": ["transformer_finediffusion", "FineDiffusionTransformer"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "vae": ["diffusers", "AutoencoderKL"] if autoencoder.vae else [None, None],
    }
    write_config(folder / "model_index.json", ["pipeline_finediffusion", "FineDiffusionPipeline"], parts)
    write_config(folder / "scheduler/scheduler_config.json", "DDPMScheduler", SCHEDULER)
    write_config(folder / "transformer/config.json", "FineDiffusionTransformer", config)
    write_tensors(folder / "transformer/diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
    for name in ("pipeline_finediffusion.py", "transformer/transformer_finediffusion.py"):
        (folder / name).write_text(bundle(PIPELINE_FOLDER / Path(name).name), encoding="utf-8")
    if autoencoder.vae:
        autoencoder.vae.register_to_config(scaling_factor=autoencoder.scale)
        autoencoder.vae.save_pretrained(folder / "vae")
        for file in (folder / "vae").iterdir():
            file.chmod(0o666 & ~UMASK)  # safetensors makes private files
    (folder / "README.md").write_text(model_card(description, source), encoding="utf-8")


def write_config(path: Path, class_name: str | list[str], config: dict):
    """Write a JSON config in the form of diffusers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"_class_name": class_name, "_diffusers_version": version("diffusers"), **config}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(description: ModelDescription, source: str) -> str:
    """Return the text of the model card, README.md; `source` is the name that its example loads."""
    hierarchy, names, base = description.hierarchy, superclass_names(description), description.base
    file = Path(base.path).name if base else "none, trained from random weights"
    of_dit = file in DIT_FILES
    terms = "The base weights are DiT's, under CC BY-NC 4.0: no commercial use."
    return Template((PIPELINE_FOLDER / "card.md").read_text(encoding="utf-8")).substitute(
        title=Path(source).name,
        license="cc-by-nc-4.0" if of_dit else "other",
        terms=terms if of_dit else "The licences of the base weights and of the training images apply.",
        model=description.model,
        size=description.image_size,
        classes=f"{hierarchy.num_classes:,}",
        superclasses=f"{len(names)} superclasses" if description.tiered else "no superclass",
        guide="the superclass of the class" if description.tiered else "the null class",
        method=description.method,
        steps=f"{description.step:,}",
        source=source,
        example=json.dumps(hierarchy.classes[0], ensure_ascii=False),
        base=file,
        sha256=base.sha256 if base else "none",
        hierarchy=hierarchy.name,
        vae="none, the model works on pixels" if description.vae == "none" else "in `vae/`",
    )


def bundle(path: Path) -> str:
    """Return the module at `path` and the project's modules that it imports as one source, without those imports.

    diffusers loads a single file from a folder, not the files which that imports.
    """
    sources = {}

    def add(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.parse("\n".join(lines)).body:
            if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").is_file():
                assert not any(alias.asname for alias in node.names), f"{path} renames an import"
                lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
                if f"{node.module}.py" not in sources:
                    add(ROOT / f"{node.module}.py")
        sources[path.name] = "\n".join(lines).strip()

    add(path)
    head = f"Written by FineDiffusion's tools/export.py from {', '.join(sources)}.\n\n{(ROOT / 'LICENSE').read_text()}"
    head = "\n".join(f"# {line}".strip() for line in head.splitlines())
    return "\n\n\n".join([head, *(f"# ---- {name}\n\n{text}" for name, text in sources.items())]) + "\n"


def push(folder: Path, repo: str, private: bool):
    """Upload a folder to the Hugging Face Hub.

    Raises ValueError if the Hub cannot be reached or refuses the upload, for example without a token.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with tools/export.py")
    except Exception as error:  # also those of the HTTP library, which differ between releases
        raise ValueError(
            f"{folder} is written but could not be pushed to {repo} ({one_line(error)}): log in with `hf auth login` or set "
            f"HF_TOKEN, then run `hf upload {repo} {folder}`."
        ) from None


# ---- the command ---------------------------------------------------------------------------------


def check_settings(args: argparse.Namespace):
    """Raise ValueError if flags contradict each other, or --out exists or has the wrong suffix."""
    out, suffixes = Path(args.out), FORMATS[args.format]
    for flag, form in (("superclass", "dit"), ("push", "diffusers")):
        if getattr(args, flag) is not None and args.format != form:
            raise ValueError(f"--{flag} needs --format {form}, found {args.format}: drop the flag.")
    if args.private and not args.push:
        raise ValueError("--private needs --push, found none: add it or drop the flag.")
    if suffixes and out.suffix not in suffixes:
        raise ValueError(f"--out is {out}, expected a name that ends in {' or '.join(suffixes)}.")
    if out.exists():
        raise ValueError(f"{out} exists and is not overwritten: remove it or choose another --out.")


def export(args: argparse.Namespace):
    """Load the model of the flags, merge its factors, and write it to --out."""
    check_settings(args)
    out = Path(args.out)
    if is_adapter(args.ckpt) and args.format != "diffusers":  # the autoencoder is not needed
        model, description = load_adapted(args.ckpt, args.base)
    else:
        model, description, autoencoder = load_model(args, "cpu")
    tensors = fold_gammas(model.state_dict() if args.format == "peft" else fold_lora(model.state_dict()))
    if model.y_embedder.path and args.format in ("dit", "finediffusion"):  # their embedders look up a row
        tensors[TABLE] = model.y_embedder(torch.arange(len(tensors[TABLE])), train=False)
    if args.format == "dit":
        row = null_row(model.y_embedder, superclass_names(description), args.superclass)
        write_dit(out, tensors, [*range(model.y_embedder.num_classes), row])
    elif args.format == "finediffusion":
        write_finediffusion(out, tensors, description)
    else:
        part = out.with_name(f".{out.name}.{os.getpid()}.part")
        part.mkdir(parents=True)
        try:
            if args.format == "peft":
                write_peft(part, tensors, description)
            else:
                write_diffusers(part, model, tensors, description, autoencoder, args.push or out.name)
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        if args.push:
            push(out, args.push, args.private)
    print(f"{out}: {description.model}, {description.hierarchy!r}, exported as {args.format}")


def main():
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add_model_options(parser)
    add = parser.add_argument_group("export").add_argument
    add("--format", required=True, choices=list(FORMATS), help="form of the exported weights")
    add("--out", required=True, help="folder (diffusers) or file to write; it must not exist")
    add(
        "--superclass",
        help="dit: name or index of the superclass that becomes the null class (default: the model's null row)",
    )
    add("--push", metavar="USER/NAME", help="diffusers: upload the folder to the Hugging Face Hub")
    add("--private", action="store_true", help="diffusers: push to a private repository")
    export(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
