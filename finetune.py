"""Fine-tuning methods: which parameters of a DiT each one trains, and the moving average (EMA) of those parameters.

A method is an entry of METHODS: the kinds of parameters it trains, the form of the class table, DiffFit's factors and a
learning rate. A method that trains "lora" adds low-rank updates to linear layers (LoRA).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
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
    "lora": Method(frozenset({"table", "lora"}), source="LoRA, arXiv 2106.09685"),
}
METHODS |= {
    f"{name}+lora": replace(METHODS[name], trains=METHODS[name].trains | {"lora"})
    for name in ("finediffusion", "bitfit", "difffit", "difffit-orig")
}
ROWS = Method(frozenset({"table"}))  # the class table alone
VECTOR_GAMMA_BLOCKS = 14  # DiffFit as published scales the first half of DiT-XL's 28 blocks
# DiffFit's factors in a block, and the layer whose output each one scales
GAMMAS = {"gamma_qkv": "attn.qkv", "gamma_proj": "attn.proj", "gamma_attn": "attn.proj", "gamma_mlp": "mlp.fc2"}

# ---- adapted layers, DiffFit's factors -----------------------------------------------------------


class AdaptedLinear(nn.Linear):
    """A linear layer with a low-rank update, a learned factor, or both: factor * (W x + b + B A x).

    layer   the layer whose parameters it takes over
    lora_A  (rank, in_features), or None
    lora_B  (out_features, rank), or None

    torch.compile sees the layer's class and compiles again for it. It would not notice a hook.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.scale_by(None, "")

    def scale_by(self, block: nn.Module | None, name: str) -> None:
        """Multiply the output by the parameter `name` (out_features,) of `block`, which has this layer as a part."""
        self.__dict__["block"] = block  # not registered as a submodule
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        out = super().forward(x)
        if self.lora_A is not None:
            out = out + F.linear(F.linear(x, self.lora_A), self.lora_B)
        return out if self.block is None else out * getattr(self.block, self.name)


def adapt(model: nn.Module, path: str) -> AdaptedLinear:
    """Replace the linear layer at `path` of the model by an `AdaptedLinear`, unless it is one; return it."""
    parent, _, name = path.rpartition(".")
    layer = model.get_submodule(path)
    if not isinstance(layer, AdaptedLinear):
        layer = AdaptedLinear(layer)
        setattr(model.get_submodule(parent), name, layer)
    return layer


def add_gammas(model: nn.Module, form: str) -> None:
    """Add DiffFit's factors to the blocks of a DiT: parameters `gamma_*`, initially 1, that scale the output of a layer.

    form  "scalar": one factor () on each residual branch of every block. "vector": factors on qkv (3D,), on proj (D,) and
          on each residual branch (D,), in the first VECTOR_GAMMA_BLOCKS blocks. "none": no factors
    """
    if form == "none":
        return
    blocks = model.blocks if form == "scalar" else model.blocks[:VECTOR_GAMMA_BLOCKS]
    for block in blocks:
        proj = block.attn.proj
        width, device = proj.out_features, proj.weight.device
        # the block's forward pass multiplies its two branches by these, unless they are None
        block.gamma_attn, block.gamma_mlp = (
            nn.Parameter(torch.ones(() if form == "scalar" else width, device=device)) for _ in range(2)
        )
        if form == "vector":
            block.gamma_qkv = nn.Parameter(torch.ones(3 * width, device=device))
            block.gamma_proj = nn.Parameter(torch.ones(width, device=device))
            for name in ("qkv", "proj"):
                adapt(block, f"attn.{name}").scale_by(block, f"gamma_{name}")


def fold_gammas(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Merge DiffFit's factors into the linear layers whose output they scale: W' = diag(g) W, b' = g b, and B' = diag(g) B.

    Computed in float64. See DiffFit, arXiv 2304.06648, section 3.2.
    """
    tensors = dict(tensors)
    for name in [name for name in tensors if kind_of(name) == "gamma"]:
        block, _, gamma = name.rpartition(".")
        factor, layer = tensors.pop(name).double(), f"{block}.{GAMMAS[gamma]}"
        for part, shape in (("weight", (-1, 1)), ("bias", (-1,)), ("lora_B", (-1, 1))):
            if f"{layer}.{part}" in tensors:
                tensors[f"{layer}.{part}"] = (factor.view(shape) * tensors[f"{layer}.{part}"].double()).float()
    return tensors


# ---- low-rank updates (LoRA) ---------------------------------------------------------------------

LORA_LAYERS = {  # --lora-targets: linear layers of a block
    "qkv": ("attn.qkv",),
    "attn": ("attn.qkv", "attn.proj"),
    "mlp": ("mlp.fc1", "mlp.fc2"),
    "adaln": ("adaLN_modulation.1",),
}
LORA_LAYERS["all"] = LORA_LAYERS["attn"] + LORA_LAYERS["mlp"] + LORA_LAYERS["adaln"]


def add_lora(model: nn.Module, rank: int, targets: Iterable[str]) -> None:
    """Add a low-rank update B A to linear layers of every block of a DiT (LoRA, arXiv 2106.09685, section 4.1).

    rank     number of rows of `lora_A` (rank, in) and of columns of `lora_B` (out, rank)
    targets  keys of LORA_LAYERS

    A has the default initial values of a linear layer's weight, and B is 0, so that the model computes what it did. This
    also holds for the modulations of a DiT from random weights, which are 0: there A first moves in the second step.
    """
    for block in model.blocks:
        for path in dict.fromkeys(path for target in targets for path in LORA_LAYERS[target]):
            layer = adapt(block, path)
            device = layer.weight.device
            layer.lora_A = nn.Parameter(torch.empty(rank, layer.in_features, device=device))
            layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
            nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))


def fold_lora(tensors: dict[str, torch.Tensor], keep: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Merge low-rank updates into the weights by name, W' = W + B A, computed in float64.

    keep: updates that it has in the same shape are left as they are
    """
    tensors, keep = dict(tensors), keep or {}
    for name in [name for name in tensors if name.endswith(".lora_A")]:
        layer = name.removesuffix(".lora_A")
        if name in keep and keep[name].shape == tensors[name].shape:
            continue
        a, b = (tensors.pop(f"{layer}.lora_{part}").double() for part in "AB")
        tensors[f"{layer}.weight"] = (tensors[f"{layer}.weight"].double() + b @ a).float()
    return tensors


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Merge the low-rank updates of a model into its weights, in place; its output changes by rounding only."""
    for layer in [layer for layer in model.modules() if isinstance(layer, AdaptedLinear) and layer.lora_A is not None]:
        layer.weight.copy_(layer.weight.double() + layer.lora_B.double() @ layer.lora_A.double())
        layer.lora_A = layer.lora_B = None


# ---- selecting parameters ------------------------------------------------------------------------


def kind_of(name: str) -> str:
    """Return the kind of the DiT parameter `name`: "fixed", "table", "lora", "gamma", "norm", "bias" or "matrix"."""
    if name == "pos_embed":
        return "fixed"
    if name.endswith((".lora_A", ".lora_B")):
        return "lora"
    if name.startswith("y_embedder."):
        return "table"
    if "gamma_" in name:
        return "gamma"
    if ".norm" in name:
        return "norm"
    return "bias" if name.endswith(".bias") else "matrix"


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


def count_parameters(parameters: dict[str, nn.Parameter], rows: list[int] | None = None) -> int:
    """Return the number of trained parameters; `rows`: the rows of the class table if no others are trained."""
    return sum(p.numel() if rows is None else len(rows) * p.shape[1] for p in parameters.values())


def freeze_other_rows(table: nn.Parameter, rows: list[int]) -> None:
    """Let only `rows` of the class table move: the gradients of all others become 0.

    AdamW without weight decay and the EMA then leave the others bit for bit.
    """
    moves = torch.zeros(len(table), 1, device=table.device)
    moves[rows] = 1
    table.register_hook(lambda grad: grad * moves)


# ---- training them -------------------------------------------------------------------------------


def store_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the frozen weight matrices and biases to `dtype`, the one of the computation, in place.

    Autocast would convert them in every forward pass. Trained parameters, norms and the position embedding stay float32.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and kind_of(name) in ("matrix", "bias"):
            parameter.data = parameter.data.to(dtype)


def adamw(
    parameters: dict[str, nn.Parameter], lr: float, table_lr: float, lora_lr: float | None = None
) -> torch.optim.AdamW:
    """Return AdamW without weight decay over parameters by name, in groups: the others, the class table, LoRA.

    lr        learning rate of all other parameters
    table_lr  learning rate of the class table
    lora_lr   learning rate of the low-rank updates; None if there are none

    Each group keeps its learning rate before any schedule as "base_lr".
    """
    rates = {"other": lr, "table": table_lr, "lora": lora_lr}
    groups = {kind: {"params": [], "base_lr": rate} for kind, rate in rates.items()}
    for name, parameter in parameters.items():
        kind = kind_of(name)
        groups[kind if kind in groups else "other"]["params"].append(parameter)
    return torch.optim.AdamW([g for g in groups.values() if g["params"]], lr=lr, weight_decay=0, fused=True)


SHORT_RUN_WARMUP = 25  # of EMA, in runs so short that the average would otherwise keep ...
MOST_OF_START = 0.05  # ... more than this share of the initial parameters


def default_warmup(decay: float, steps: int) -> int:
    """Return the `warmup` of `EMA` for a run of `steps` steps: 0 if the average forgets the initial parameters anyway."""
    return SHORT_RUN_WARMUP if decay**steps > MOST_OF_START else 0


class EMA:
    """Exponential moving average of parameters, in float32: average <- decay * average + (1 - decay) * parameter.

    parameters  {name: parameter} to average
    decay       in 0..1
    warmup      c > 0 limits the decay of step k, from 0, to (1 + k) / (c + k), so that the average of a short run forgets
                the initial parameters: it then lags behind the parameters by 1 / c of the run. 0: no limit

    `average` is {name: float32 tensor}.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float, warmup: int = 0):
        self.decay = decay
        self.warmup = warmup
        self.parameters = parameters
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    def decay_at(self, step: int) -> float:
        """Return the decay of a step, counted from 0."""
        return min(self.decay, (1 + step) / (self.warmup + step)) if self.warmup else self.decay

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
