"""Train a timm model: each step is a function of the seed and its number, so that a run resumes exactly."""

import argparse
import json
import math
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from checkpoint.format import write_tensors
from evaluation.named_networks import TimmNetwork, timm_network
from evaluation.weights import load_strictly, read_network_weights
from guidance import hash_integer
from runtime.processes import agree, run_on_main
from runtime.progress import progress_bar
from runtime.text import changed_settings, one_line
from tools.classifier.data import LabelledImages, StepRows, TrainingCrops

FORMAT = "finediffusion-classifier-1"
WARMUP = 0.05  # share of the steps in which the learning rate rises; then it falls as a cosine
KINDS = ("exp_avg", "exp_avg_sq")  # AdamW's moments


# ---- the network ---------------------------------------------------------------------------------


def build_network(model: str, size: int, classes: int, weights: str | None, seed: int) -> TimmNetwork:
    """Build a timm model with `classes` outputs, uint8 images (n, 3, H, W) -> {"logits": (n, classes)}.

    size     pixels per side of its input, 0 for its own
    weights  a file of weights to start from, of any number of classes; None draws them

    Raises ValueError if timm has no such model or the weights do not fit.
    """
    if not timm.is_model(model):
        raise ValueError(
            f"--model is {model}, expected a model of timm {timm.__version__}, such as resnet50: correct it."
        )
    torch.manual_seed(seed)
    if weights:
        net = timm_network(model, size, "logits", read_network_weights(weights), weights)
        net.model.reset_classifier(classes)
        return net
    try:
        net = timm.create_model(model, num_classes=classes, **({"img_size": size} if size else {}))
    except TypeError:  # convolutional networks have no img_size and take any size
        net = timm.create_model(model, num_classes=classes)
    return TimmNetwork(net, size, "logits")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate of a step: a linear warm-up over WARMUP of the steps, then a cosine to 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(net: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW; vectors, such as biases and norms, do not decay."""
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


# ---- files ---------------------------------------------------------------------------------------


def read_record(path: Path) -> dict | None:
    """Return the record in a file of `save`: step and settings; None if there is no file.

    Raises ValueError if the file is damaged or something else.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})["json"])
        if record["format"] != FORMAT:
            raise ValueError("it is not a classifier")
    except (SafetensorError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"{path} is damaged or no classifier ({one_line(error)}), expected one of this tool: remove it or choose another "
            "--out."
        ) from None
    return record


def check_same(record: dict, settings: dict, path: Path):
    """Raise ValueError if a file was made with other settings."""
    differ = changed_settings(record["settings"], settings)
    if differ:
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(differ)}): choose another --out, or train with the settings it "
            "was made with."
        )


def save(path: Path, tensors: dict[str, torch.Tensor], step: int, settings: dict):
    """Write tensors with a record of the step and the settings; the file appears complete or not at all."""
    record = json.dumps({"format": FORMAT, "step": step, "settings": settings})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, tensors, {"format": "pt", "json": record})


def load_classifier(path: Path, net: TimmNetwork):
    """Load the weights of a trained classifier. Raises ValueError if the file is damaged or does not fit."""
    load_strictly(net.model, read_network_weights(path), path, "this model of timm")


def state_tensors(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the tensors of a state: the model's, and the moments of its parameters."""
    tensors = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, p in net.named_parameters():
        tensors |= {f"{kind}.{name}": optimizer.state[p][kind] for kind in KINDS}
    return tensors


def load_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, step: int):
    """Load a state into the model and the optimizer. Raises ValueError if the file is damaged."""
    try:
        tensors = read_network_weights(path)
        net.load_state_dict({name: tensors[f"model.{name}"] for name in net.state_dict()})
        moments = {name: {kind: tensors[f"{kind}.{name}"] for kind in KINDS} for name, _ in net.named_parameters()}
    except (ValueError, LookupError, RuntimeError) as error:
        raise ValueError(
            f"{path} is damaged ({one_line(error)}), expected the state of a training: remove it to train from the start."
        ) from None
    for name, p in net.named_parameters():
        own = {kind: tensor.to(p.device) for kind, tensor in moments[name].items()}
        optimizer.state[p] = {"step": torch.tensor(float(step)), **own}


# ---- training ------------------------------------------------------------------------------------


def check_loss(loss: float, step: int):
    """Raise ValueError if the loss is not finite."""
    if not math.isfinite(loss):
        raise ValueError(f"The loss is {loss} at step {step}, expected a finite one: lower --lr.")


def train(
    accelerator: Accelerator,
    net: TimmNetwork,
    images: LabelledImages,
    args: argparse.Namespace,
    settings: dict,
    state_file: Path,
):
    """Train the network in place, from the step of `state_file` if there is one; called by every process."""
    rank, world = accelerator.process_index, accelerator.num_processes
    optimizer = make_optimizer(net.model, args.lr, args.weight_decay)
    net.to(accelerator.device).train()
    record = agree(accelerator, read_record, state_file)
    start = record["step"] if record else 0
    if record:
        agree(accelerator, check_same, record, settings, state_file)
        agree(accelerator, load_state, state_file, net.model, optimizer, start)
        if accelerator.is_main_process:
            print(f"resuming after step {start} of {args.max_steps}")
    if world > 1 and accelerator.device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    wrapped = accelerator.prepare_model(net)

    size = net.size[0]
    rows = StepRows(images.labels, args.batch_size, args.max_steps, args.seed, args.balance, start, rank, world)
    crops = TrainingCrops(images, args.image_size, size, args.crop, args.flip, args.seed)
    pin = accelerator.device.type == "cuda"
    loader = DataLoader(crops, batch_sampler=rows, num_workers=args.num_workers, pin_memory=pin)
    bar = progress_bar(total=args.max_steps, initial=start, unit="step", desc="training", disable=rank > 0)
    with bar:
        for step, (pixels, labels) in enumerate(loader, start):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.max_steps, args.lr)
            torch.manual_seed(hash_integer(f"dropout {args.seed} {step} {rank}") % 2**63)  # if the model has any
            logits = wrapped(pixels.to(accelerator.device, non_blocking=True))["logits"].float()
            loss = F.cross_entropy(logits, labels.to(accelerator.device), label_smoothing=args.label_smoothing)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            if done % args.save_every == 0 or done == args.max_steps:
                agree(accelerator, check_loss, loss.item(), step)
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                if done < args.max_steps:
                    run_on_main(accelerator, save, state_file, state_tensors(net.model, optimizer), done, settings)
            bar.update()
