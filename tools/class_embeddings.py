"""Compute the embeddings of class names by a vision-language model of open_clip, for evaluate.py --class-embeddings.

    python -m tools.class_embeddings --hierarchy inat/val --model hf-hub:imageomics/bioclip-2 --out bioclip2.safetensors

A class is embedded as its name in each --template; the embeddings of its texts are averaged. For iNaturalist's classes
the name is the path from the kingdom to the species, on which BioCLIP was trained. --model is hf-hub:NAME (downloaded),
local-dir:FOLDER, or the name of an architecture. The script needs open_clip (pip
install open_clip_torch); evaluate.py does not. For the file see evaluation/class_embeddings.py.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from torch.nn import functional as F

from evaluation.class_embeddings import save_class_embeddings
from evaluation.weights import load_strictly, read_network_weights
from hierarchy import Hierarchy
from hierarchy.layouts import is_inat
from runtime.cli import Parser, check_range, run_command
from runtime.files import nearest_existing
from runtime.progress import progress_bar
from runtime.text import one_line

BIOCLIP = "hf-hub:imageomics/bioclip-2"
TEMPLATES = ("a photo of {}.",)
EXAMPLES = """
python -m tools.class_embeddings --hierarchy inat/val --out bioclip2.safetensors
python -m tools.class_embeddings --hierarchy pets --model ViT-B-32 --weights open_clip_model.safetensors --out pets.safetensors
"""


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0], examples=EXAMPLES)
    add = parser.add_argument
    add("--hierarchy", required=True, help="classes with their names: vegfru, a .json file or an image folder")
    add("--model", help="model of open_clip; if not given, BioCLIP 2, which is downloaded")
    add("--weights", help="file of weights for an architecture; if not given, random")
    add("--template", nargs="+", default=list(TEMPLATES), help="texts with {} in place of the name")
    add("--batch-size", type=int, default=256, help="texts per forward pass")
    add("--out", required=True, help="the file to write, .safetensors")
    return parser.parse_args()


def check_settings(args: argparse.Namespace):
    """Raise ValueError if a flag is invalid or the output cannot be written."""
    check_range(args, batch_size=(1, 10**6))
    for template in args.template:
        if template.count("{}") != 1:
            raise ValueError(f"--template has {template!r}, expected one {{}} in it, where the name goes: add it.")
    folder = nearest_existing(Path(args.out).parent)
    if Path(args.out).suffix != ".safetensors" or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(
            f"--out is {args.out}, expected a .safetensors file in a folder that can be written: choose one."
        )


def texts(hierarchy: Hierarchy, templates: list[str]) -> list[list[str]]:
    """Return the texts of each class: its name in each template.

    Raises ValueError if the hierarchy has numbers for classes.
    """
    if hierarchy.numbered:
        raise ValueError(
            f"{hierarchy.name} has only numbers for classes, expected names: pass the image folder as --hierarchy."
        )
    names = [name.split("_") for name in hierarchy.classes]
    if is_inat(hierarchy.classes):
        names = [parts[1:] for parts in names]  # without the number
    return [[template.replace("{}", " ".join(parts)) for template in templates] for parts in names]


def load_model(name: str, weights: str | None) -> tuple[torch.nn.Module, object, dict]:
    """Return a model of open_clip, its tokenizer and the preprocessing of its images.

    weights: a file for an architecture, which is read without trusting it; None for random weights, or those of the Hub

    Raises ValueError if open_clip is not installed, or the model or its weights cannot be loaded.
    """
    try:
        import open_clip
    except ImportError:
        raise ValueError(
            "open_clip is not installed, expected it for this script alone: pip install open_clip_torch."
        ) from None
    try:
        model = open_clip.create_model(name).eval()
        parts = model, open_clip.get_tokenizer(name), open_clip.get_model_preprocess_cfg(model)
    except Exception as error:  # also those of the HTTP library
        raise ValueError(
            f"open_clip cannot load {name} ({one_line(error)}), expected one of its models: check --model."
        ) from None
    if weights:
        load_strictly(model, read_network_weights(weights), weights, f"open_clip's {name}")
    return parts


@torch.inference_mode()
def embed(model: torch.nn.Module, tokenizer: object, of_class: list[list[str]], batch_size: int) -> torch.Tensor:
    """Return the normalised mean of the normalised embeddings of each class's texts, float32 (classes, d)."""
    every = [text for of_one in of_class for text in of_one]
    parts = []
    for start in progress_bar(range(0, len(every), batch_size), unit="batch", desc="texts"):
        parts.append(model.encode_text(tokenizer(every[start : start + batch_size]), normalize=True).float())
    embeddings = torch.cat(parts).reshape(len(of_class), len(of_class[0]), -1)
    return F.normalize(embeddings.mean(1), dim=1)


def has_quick_gelu(model: torch.nn.Module) -> bool:
    """Return whether the towers have OpenAI's approximation of GELU."""
    return any(type(module).__name__ == "QuickGELU" for module in model.modules())


def main():
    args = parse_args()
    check_settings(args)
    hierarchy = Hierarchy.load(args.hierarchy)
    of_class = texts(hierarchy, args.template)
    model, tokenizer, preprocessing = load_model(args.model or BIOCLIP, args.weights)
    embeddings = embed(model, tokenizer, of_class, args.batch_size)
    size = preprocessing["size"]
    height, width = (size, size) if isinstance(size, int) else size
    record = {
        "names": list(hierarchy.classes),
        "logit_scale": model.logit_scale.exp().item(),
        "quick_gelu": has_quick_gelu(model),
        "input": {
            "mean": list(preprocessing["mean"]),
            "std": list(preprocessing["std"]),
            "input_size": [3, height, width],
            "interpolation": preprocessing["interpolation"],
        },
        "model": args.model or BIOCLIP,
        "templates": args.template,
    }
    save_class_embeddings(args.out, embeddings, json.loads(json.dumps(record)))
    print(
        f"{args.out}: {len(embeddings):,} classes, {embeddings.shape[1]} values each, scale {record['logit_scale']:.2f}"
    )
    if record["quick_gelu"]:
        print("The model has QuickGELU: name timm's model with clip_quickgelu as --classifier of evaluate.py.")


if __name__ == "__main__":
    run_command(main)
