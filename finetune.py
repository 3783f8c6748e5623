"""Which parameters a fine-tuning method trains, and the moving average of exactly those.

A method is a row of METHODS: kinds of parameters, the embedder's form, DiffFit's gammas, a learning rate.
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Method:
    """`trains`: kinds of parameters, see `kind_of`; `embedder`: "tiered", or "null", one null row for the superclasses'."""

    trains: frozenset
    embedder: str = "null"
    gammas: str = "none"  # DiffFit's learned factors: "scalar" or "vector"
    lr: float = 1e-4
    source: str = ""


METHODS = {
    "finediffusion": Method(
        frozenset({"table", "bias", "norm"}), embedder="tiered", source="arXiv 2402.18331, section 3.2"
    ),
    "full": Method(frozenset({"table", "bias", "matrix"}), source="a plain DiT, arXiv 2212.09748"),
    "bitfit": Method(frozenset({"table", "bias"}), source="BitFit, arXiv 2106.10199"),
    "difffit": Method(
        frozenset({"table", "bias", "norm", "gamma"}),
        gammas="scalar",
        source="DiffFit as arXiv 2402.18331 counts it: two scalars a block",
    ),
    "difffit-orig": Method(
        frozenset({"table", "bias", "block norm", "gamma"}),
        gammas="vector",
        lr=1e-3,
        source="DiffFit, arXiv 2304.06648, section 3.2",
    ),
}
VECTOR_GAMMA_BLOCKS = 14  # DiffFit as published scales the first half of DiT-XL's 28 blocks


def kind_of(name):
    """The kind of the parameter `name` of a DiT: fixed, table, gamma, norm, bias or matrix."""
    if name == "pos_embed":
        return "fixed"
    if name.startswith("y_embedder."):
        return "table"
    if "gamma_" in name:
        return "gamma"
    if ".norm" in name:
        return "norm"
    return "bias" if name.endswith(".bias") else "matrix"


def add_gammas(model, form):
    """Give blocks DiffFit's factors, 1 at the start: parameters `gamma_*` that scale a part's output.

    "scalar": one on each residual branch of every block. "vector": on qkv (3D,), proj (D,) and each branch (D,), in
    the first VECTOR_GAMMA_BLOCKS blocks.
    """
    if form == "none":
        return
    blocks = model.blocks if form == "scalar" else model.blocks[:VECTOR_GAMMA_BLOCKS]
    for block in blocks:
        parts = {"attn": block.attn, "mlp": block.mlp}
        if form == "vector":
            parts |= {"qkv": block.attn.qkv, "proj": block.attn.proj}
        width = block.attn.proj.out_features
        for name, part in parts.items():
            shape = () if form == "scalar" else (3 * width,) if name == "qkv" else (width,)
            device = block.attn.proj.weight.device
            gamma = nn.Parameter(torch.ones(shape, device=device))
            block.register_parameter(f"gamma_{name}", gamma)
            part.register_forward_hook(lambda _, __, out, gamma=gamma: out * gamma)


def select(model, method):
    """Leave `requires_grad` on exactly the parameters that `method` (a `Method`) trains; {name: parameter} of them."""
    chosen = {}
    for name, parameter in model.named_parameters():
        kind = kind_of(name)
        trains = kind in method.trains
        if kind == "norm" and "block norm" in method.trains:
            trains = name.startswith("blocks.")
        parameter.requires_grad_(trains)
        if trains:
            chosen[name] = parameter
    missing = method.trains - {"block norm"} - {kind_of(name) for name in chosen}
    assert not missing, f"the method trains {missing}, but the model has no such parameter"
    return chosen


def store_frozen(model, dtype):
    """Keep the frozen weight matrices in `dtype`, the compute type: autocast would cast float32 ones in every forward.

    Everything that is trained stays float32, and so do norms and the position embedding.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and kind_of(name) == "matrix":
            parameter.data = parameter.data.to(dtype)


def adamw(parameters, lr, table_lr):
    """AdamW over {name: parameter} with weight decay 0, the class table in a group of its own. "base_lr": before a schedule."""
    table = [p for name, p in parameters.items() if kind_of(name) == "table"]
    others = [p for name, p in parameters.items() if kind_of(name) != "table"]
    groups = [{"params": others, "base_lr": lr}, {"params": table, "base_lr": table_lr}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0, fused=True)


class EMA:
    """Moving average of `parameters` ({name: tensor}), float32: average <- decay * average + (1 - decay) * now.

    `warmup`: the decay of step k (from 0) is at most (1 + k) / (10 + k), so that a short run is not averaged with its start.
    """

    def __init__(self, parameters, decay, warmup=False):
        self.decay = decay
        self.warmup = warmup
        self.parameters = parameters
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    def decay_at(self, step):
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step):
        now = [p.float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), now, 1 - self.decay_at(step))

    @torch.no_grad()
    def swap(self):
        """Exchange the model's values and the averages: once to sample from the average, again to go on training."""
        for name, p in self.parameters.items():
            now = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name].copy_(now)
