"""Files of weights: DiT's and FineDiffusion's checkpoints, our adapters and training states.

An adapter is one safetensors file: the averages (EMA) of the trained parameters and, as JSON in its metadata, a
description: model, image size, method, step, and the SHA-256 of the base file they belong to. The hierarchy with its
class names is a tensor of bytes (packing.py). Without a base it holds the whole model. Training states (runs.py) are
files of the same form. Each has a SHA-256 of its contents, since safetensors has none; nothing here is ever pickled.
"""

import hashlib
import http.client
import json
import urllib.request
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from checkpoint.torch_files import GET, check_file, check_finite, read_tensors
from finetune import METHODS, add_gammas, kind_of
from hierarchy import Hierarchy
from hierarchy import archive as packing
from models import DiT_models
from runtime.cli import few, sha256, write_whole

DIT_URL = "https://dl.fbaipublicfiles.com/DiT/models/"
DIT_FILES = {  # name: SHA-256, None where none is known
    "DiT-XL-2-256x256.pt": "9ec1876e4c03471bca126663a30e2d1b20610b6d2f87850a39a36f25cc685521",
    "DiT-XL-2-512x512.pt": None,
}
DIT_FOLDER = Path("pretrained_models")
ADAPTER, STATE = "finediffusion-adapter-1", "finediffusion-training-state-1"
TABLE = "y_embedder.embedding_table.weight"
PACKED = "hierarchy"  # the tensor of bytes with the hierarchy
LONGEST_TEXT = 1 << 20  # characters of a description
FIELDS = {  # of a description: type, and what it may be
    "model": (str, lambda value: value in DiT_models),
    "method": (str, lambda value: value in METHODS),
    "embedder": (str, lambda value: value in ("tiered", "null")),
    "vae": (str, str.isprintable),
    "image_size": (int, lambda value: 0 < value <= 1 << 14),
    "latent_size": (int, lambda value: 0 < value <= 1 << 14),
    "channels": (int, lambda value: 0 < value <= 1 << 10),
    "step": (int, lambda value: value >= 0),
    "hierarchy": (Hierarchy, lambda value: True),
}
STATE_FIELDS = {"data": (str, lambda value: True), "settings": (dict, bool), "updates": (int, lambda value: value >= 0)}
BESIDE = ("row/", "exp_avg")  # tensors of a training state that are no weights: losses, the optimizer's moments


# ---- reading -------------------------------------------------------------------------------------


def read_safetensors(path, contents=True):
    """({name: tensor}, description) of a safetensors file, or ({}, description) without its `contents`.

    ValueError where it is damaged: a file with a description has a digest too, which is checked with the contents.
    """
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            ours = PACKED in names or "json" in metadata or "sha256" in metadata  # whichever was damaged
            if not ours:
                return {name: file.get_tensor(name) for name in names if contents}, {}
            text = metadata.get("json", "")
            if len(text) > LONGEST_TEXT:
                raise ValueError(f"its description is longer than {LONGEST_TEXT} characters")
            tensors = {name: file.get_tensor(name) for name in names if contents or name == PACKED}
            if contents and metadata != labels(tensors, text):
                raise ValueError("its contents are not those that were written")
            description = json.loads(text)
            if PACKED in tensors and isinstance(description, dict):
                record = packing.unpack(tensors.pop(PACKED).reshape(-1).view(torch.uint8).numpy().tobytes())
                description["hierarchy"] = Hierarchy.from_dict(record)
            check_description(description)
            return tensors, description
    except (SafetensorError, ValueError, RecursionError) as error:  # of JSON and of the packed hierarchy too
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path} is damaged ({reason}), expected a safetensors file: {GET}.") from None


def labels(tensors, text):
    """The metadata of a file with a description, JSON `text`: the SHA-256 is that of the text and of all tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return {"format": "pt", "json": text, "sha256": digest.hexdigest()}


def check_description(description):
    """ValueError where what is to be relied on is not there, or is nothing that train.py writes."""
    if not isinstance(description, dict) or description.get("format") not in (ADAPTER, STATE):
        raise ValueError(f"its description is {description!r:.80}")
    fields = FIELDS | (STATE_FIELDS if description["format"] == STATE else {})
    for name, (kind, fits) in fields.items():
        value = description.get(name)
        if type(value) is not kind or not fits(value):
            raise ValueError(f"its description has {name} {value!r:.80}")
    base = description.get("base")
    if base is not None and not (
        isinstance(base, dict) and [type(base.get(k)) for k in ("path", "sha256")] == [str] * 2
    ):
        raise ValueError(f"its description has base {base!r:.80}")


def description_of(path):
    """The description alone of a safetensors file."""
    return read_safetensors(path, contents=False)[1]


def read(path):
    """({name: tensor}, description) of any file of weights; the description is {} for those of others.

    Of {"model", "ema", "opt", "args"} the EMA is taken. ValueError where the file is absent, damaged or something else, or
    has weights that are not finite.
    """
    path = Path(path)
    ours = path.suffix == ".safetensors"
    tensors, description = read_safetensors(path) if ours else (read_tensors(path, ("ema", "model")), {})
    check_finite({name: t for name, t in tensors.items() if not name.startswith(BESIDE)}, path)
    return tensors, description


def is_adapter(path):
    """True if `path` names a safetensors file whose metadata say so."""
    if not path or not Path(path).is_file() or Path(path).suffix != ".safetensors":
        return False
    return description_of(path).get("format") == ADAPTER


def find(name):
    """Path of the file `name`; DiT's own two are downloaded to `pretrained_models/` when absent."""
    path = Path(name)
    if path.is_file() or path.name not in DIT_FILES:
        return path
    path = DIT_FOLDER / path.name
    if not path.is_file():
        write_whole(path, lambda part: download(DIT_URL + path.name, part, DIT_FILES[path.name]))
    return path


def starting_file(resume, model, image_size):
    """Path of the weights that a new run of `model` starts from: --resume, else DiT's own; None for "none"."""
    if resume == "none":
        return None
    default = f"DiT-XL-2-{image_size}x{image_size}.pt"
    if resume is None and (model != "DiT-XL/2" or default not in DIT_FILES):
        raise ValueError(
            f"There is no published {model} of {image_size} pixels to start from: pass --resume FILE, or "
            "--resume none to start from random weights."
        )
    return find(resume or default)


def download(url, path, known=None):
    """Fetch a file; ValueError where it does not come whole, over https to the end, or with the SHA-256 that is `known`."""
    try:
        with urllib.request.urlopen(url, timeout=60) as reply, open(path, "wb") as file:
            if reply.url.split(":")[0] != url.split(":")[0]:
                raise OSError(f"it was moved to {reply.url}")
            size = int(reply.headers["Content-Length"] or 0)
            with tqdm(total=size, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[1]) as bar:
                while block := reply.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
        if not 0 < size == path.stat().st_size:
            raise OSError(f"it ended after {path.stat().st_size} of {size or 'an unknown number of'} bytes")
        if known and sha256(path) != known:
            raise OSError(f"its SHA-256 is {sha256(path)[:12]}…, expected {known[:12]}…")
    except (OSError, http.client.HTTPException) as error:  # OSError: urllib's errors too
        reason = " ".join(str(error).split())
        raise ValueError(f"{url} could not be downloaded ({reason}): fetch it elsewhere and pass its path.") from None


# ---- building and loading ------------------------------------------------------------------------


def build(description, class_dropout_prob=0.1, counts_only=False):
    """The model of a description: its "model", "latent_size", "channels", "hierarchy", "embedder", "null_row" and "method".

    "hierarchy" is a `Hierarchy`; "null_row" may be absent. ValueError where a tiered one's hierarchy does not know its
    parents, unless `counts_only`: the model cannot train then.
    """
    hierarchy, tiered = description["hierarchy"], description["embedder"] == "tiered"
    mapped = tiered and (hierarchy.has_parents or not counts_only)
    model = DiT_models[description["model"]](
        input_size=description["latent_size"],
        in_channels=description["channels"],
        num_classes=hierarchy.num_classes,
        num_super_classes=hierarchy.num_super_classes if tiered else 1,
        parents=hierarchy.parents if mapped else None,
        class_dropout_prob=class_dropout_prob,
        null_row=description.get("null_row", False),
    )
    add_gammas(model, METHODS[description["method"]].gammas)
    return model


def load(model, tensors, source, new_table=False):
    """Put `tensors` into `model`; norms and gammas may be absent.

    A plain DiT lacks all norms, an adapter of difffit-orig on it the last one. With `new_table` a class table of
    another shape is left out: the model keeps its own. Returns the names left as they were. ValueError where anything
    else is missing, unexpected or of another shape, and `source` is named.
    """
    tensors, absent = fitting(model, tensors, source, new_table)
    model.load_state_dict(tensors, strict=False)
    return absent


def fitting(model, tensors, source, new_table=False):
    """(those of `tensors` that are to be loaded, names left as they are), see `load`; the model is only looked at."""
    own = model.state_dict()
    tensors = dict(tensors)
    if new_table and TABLE in tensors and tensors[TABLE].shape != own[TABLE].shape:
        del tensors[TABLE]
    absent = [name for name in own if name not in tensors]
    free = {name for name in own if kind_of(name) == "gamma"} | ({TABLE} if new_table else set())
    for part in ("blocks.", "final_layer."):
        norms = {name for name in own if kind_of(name) == "norm" and name.startswith(part)}
        free |= norms if norms.isdisjoint(tensors) else set()
    missing = [name for name in absent if name not in free]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, here {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    kinds = [
        f"{name} {tensors[name].dtype}" for name in own if name in tensors and not tensors[name].is_floating_point()
    ]
    problems = [
        f"{label} {few(names, str)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("no floats", kinds),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit this model ({'; '.join(problems)}): choose its --model, --image-size, --num-classes and "
            "--num-super-classes, or another file."
        )
    return tensors, absent


def base_weights(base, needed_by, path=None):
    """Tensors of the base {"path", "sha256"} that `needed_by` names, found at `path` or where it was; SHA-256 checked."""
    path = find(path or base["path"])
    if not path.is_file():
        raise ValueError(
            f"{needed_by} needs its base {Path(base['path']).name}, but there is no {path}: put it there, or pass it "
            "as --base (train.py: --resume)."
        )
    found = sha256(path)
    if found != base["sha256"]:
        raise ValueError(
            f"{path} is not the base of {needed_by} (SHA-256 {found[:12]}…, expected {base['sha256'][:12]}…): pass the "
            "file it was trained from as --base (train.py: --resume)."
        )
    return whole(path)[0]


def whole(path, base=None):
    """({name: tensor}, description) of all weights that the file stands for: an adapter's are put on its base's.

    `base`: where the base is, if not where it was. ValueError where the file is a training state or no whole adapter.
    """
    tensors, description = read(path)
    if description.get("format") == STATE:
        raise ValueError(f"{path} is a training state, expected weights or an adapter: name the adapter of that step.")
    if description.get("base"):
        description["trained"] = set(tensors)
        tensors = base_weights(description["base"], path, base) | tensors
    elif base:
        raise ValueError(f"{path} holds a whole model, expected no --base: leave it out.")
    return tensors, description


def load_adapted(path, base=None):
    """(model, description) of an adapter and its base: the EMA model of the run, bit for bit."""
    if not is_adapter(path):
        raise ValueError(f"{path} is no adapter, expected one that train.py wrote: name another file.")
    tensors, description = whole(path, base)
    with torch.device("meta"):  # no memory is taken on the word of the description
        fitting(build(description), tensors, path)
    model = build(description)
    load(model, tensors, path)
    return model.eval(), description


@torch.no_grad()
def start(model, trained, path, hierarchy=None, table_init="normal", table_std=0.02, seed=0):
    """Fill the model of a new fine-tune from the weights or the adapter at `path`, or from nothing (None).

    A class table of another shape, or of an adapter of another `hierarchy`, is drawn anew, normal with `table_std`,
    around 0 or ("mean") around the mean of the file's rows. `trained`: names of the parameters that will be trained.
    Returns the model's base: {"path", "sha256"}, or None.
    """
    table = model.y_embedder.embedding_table.weight
    fresh = torch.randn(table.shape, generator=torch.Generator().manual_seed(seed)) * table_std
    if path is None:
        table.copy_(fresh)
        return None
    tensors, description = whole(path)
    rows = tensors.get(TABLE)
    if hierarchy and description.get("hierarchy", hierarchy) != hierarchy:
        tensors.pop(TABLE)
    if TABLE in load(model, tensors, path, new_table=True):
        table.copy_(fresh + (rows.float().mean(0) if table_init == "mean" and rows is not None else 0))
    if description.get("base") and description["trained"] <= set(trained):
        return description["base"]  # what the adapter changed is written again: its own base does
    return {"path": str(path), "sha256": sha256(path)}


# ---- writing -------------------------------------------------------------------------------------


def save_safetensors(path, tensors, description):
    """Write tensors and a description, whose "hierarchy" is a `Hierarchy`; the file appears whole or not at all."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    packed = packing.pack(description["hierarchy"].to_dict())
    tensors[PACKED] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    metadata = labels(tensors, json.dumps({key: value for key, value in description.items() if key != "hierarchy"}))

    write_tensors(path, tensors, metadata)


def write_tensors(path, tensors, metadata):
    """A safetensors file, whole or not at all; ValueError where the disk is full."""

    def write(part):
        try:
            save_file(tensors, part, metadata=metadata)
        except SafetensorError as error:  # "I/O error: No space left on device (os error 28)"
            raise ValueError(f"{path} could not be written ({error}): make room or choose another folder.") from None

    write_whole(path, write)


def save_adapter(path, averages, model, description, dtype=torch.float32):
    """`averages`: {name: EMA of a trained parameter}. Without a base the model's other tensors are written too."""
    tensors = dict(averages) if description["base"] else model.state_dict() | averages
    save_safetensors(path, {name: t.to(dtype) for name, t in tensors.items()}, description | {"format": ADAPTER})
