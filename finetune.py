"""Fine-tuning methods: which parameters of a DiT each one trains, and the moving average (EMA) of those parameters.

A method is an entry of METHODS: the kinds of parameters it trains, the form of the class table, DiffFit's factors and a
learning rate.
"""

from dataclasses import dataclass

import torch
from torch import nn

from runtime.private import lerp_all


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    trains    kinds of parameters, as `kind_of` names them; "block norm" is the norms of the blocks without the last norm
    embedder  the class table: "tiered", a row per class and superclass, or "null", a row per class and one null row
    gammas    DiffFit's learned factors: "none", "scalar" or "vector", see `add_gammas`
    lr        default learning rate of all parameters but the class table
    source    the paper that describes it
    """

    trains: frozenset[str]
    embedder: str = "null"
    gammas: str = "none"
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
        source="DiffFit as arXiv 2402.18331 counts it: two scalars per block",
    ),
    "difffit-orig": Method(
        frozenset({"table", "bias", "block norm", "gamma"}),
        gammas="vector",
        lr=1e-3,
        source="DiffFit, arXiv 2304.06648, section 3.2",
    ),
}
VECTOR_GAMMA_BLOCKS = 14  # DiffFit as published scales the first half of DiT-XL's 28 blocks

# ---- selecting parameters ------------------------------------------------------------------------


def kind_of(name: str) -> str:
    """Return the kind of the DiT parameter `name`: "fixed", "table", "gamma", "norm", "bias" or "matrix"."""
    if name == "pos_embed":
        return "fixed"
    if name.startswith("y_embedder."):
        return "table"
    if "gamma_" in name:
        return "gamma"
    if ".norm" in name:
        return "norm"
    return "bias" if name.endswith(".bias") else "matrix"


class ScaledLinear(nn.Linear):
    """A linear layer of a block whose output is multiplied by a parameter of the block.

    layer  the layer whose parameters it takes over
    block  owns the factor; not registered as a submodule, since the layer is a part of it
    name   of the factor (out_features,) in the block

    torch.compile sees the layer's class and compiles again for it. It would not notice a hook.
    """

    def __init__(self, layer: nn.Linear, block: nn.Module, name: str):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.__dict__["block"] = block
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        return super().forward(x) * getattr(self.block, self.name)


def add_gammas(model: nn.Module, form: str) -> None:
    """Add DiffFit's factors to the blocks of a DiT: parameters `gamma_*`, initially 1, that scale the output of a layer.

    form  "scalar": one factor () on each residual branch of every block. "vector": factors on qkv (3D,), on proj (D,) and
          on each residual branch (D,), in the first VECTOR_GAMMA_BLOCKS blocks. "none": no factors
    """
    if form == "none":
        return
    blocks = model.blocks if form == "scalar" else model.blocks[:VECTOR_GAMMA_BLOCKS]
    for block in blocks:
        attn = block.attn
        width, device = attn.proj.out_features, attn.proj.weight.device
        # the block's forward pass multiplies its two branches by these, unless they are None
        block.gamma_attn, block.gamma_mlp = (
            nn.Parameter(torch.ones(() if form == "scalar" else width, device=device)) for _ in range(2)
        )
        if form == "vector":
            block.gamma_qkv = nn.Parameter(torch.ones(3 * width, device=device))
            block.gamma_proj = nn.Parameter(torch.ones(width, device=device))
            attn.qkv = ScaledLinear(attn.qkv, block, "gamma_qkv")
            attn.proj = ScaledLinear(attn.proj, block, "gamma_proj")


def select(model: nn.Module, method: Method) -> dict[str, nn.Parameter]:
    """Set `requires_grad` to True on exactly the parameters that the method trains; return these by name."""
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


# ---- training them -------------------------------------------------------------------------------


def store_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the frozen weight matrices to `dtype`, the one of the computation, in place.

    Autocast would convert float32 matrices in every forward pass. Trained parameters, norms and the position embedding
    stay float32.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and kind_of(name) == "matrix":
            parameter.data = parameter.data.to(dtype)


def adamw(parameters: dict[str, nn.Parameter], lr: float, table_lr: float) -> torch.optim.AdamW:
    """Return AdamW without weight decay over parameters by name: a group for the class table, after one for the others.

    lr        learning rate of all parameters but the table
    table_lr  learning rate of the table

    Each group keeps its learning rate before any schedule as "base_lr".
    """
    table = [p for name, p in parameters.items() if kind_of(name) == "table"]
    others = [p for name, p in parameters.items() if kind_of(name) != "table"]
    groups = [{"params": others, "base_lr": lr}, {"params": table, "base_lr": table_lr}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0, fused=True)


class EMA:
    """Exponential moving average of parameters, in float32: average <- decay * average + (1 - decay) * parameter.

    parameters  {name: parameter} to average
    decay       in 0..1
    warmup      limit the decay of step k, from 0, to (1 + k) / (10 + k), so that the average of a short run forgets the
                initial parameters

    `average` is {name: float32 tensor}.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float, warmup: bool = False):
        self.decay = decay
        self.warmup = warmup
        self.parameters = parameters
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    def decay_at(self, step: int) -> float:
        """Return the decay of a step, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the present parameters, after step `step`, counted from 0."""
        now = [p.float() for p in self.parameters.values()]
        lerp_all(list(self.average.values()), now, 1 - self.decay_at(step))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's parameters and the average: once to sample from the average, again to resume training."""
        for name, p in self.parameters.items():
            now = p.detach().clone()
            p.copy_(self.average[name])
            self.average[name].copy_(now)
