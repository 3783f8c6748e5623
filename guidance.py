"""Guidance: push a class's prediction away from a more general or a worse one.

Equation 1 of FineDiffusion (arXiv 2402.18331) is the function `superclass` below.

Shapes: N images x (N, C, h, w); predictions (N, 2C, h, w), the noise and then the variance. e_c is the prediction for the
class c, e_p for its superclass p and e_0 for the null class; w is the guidance scale. At w = 1 every guided prediction is
e_c.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

ALL_TIMESTEPS = (0, 999)


@dataclass(frozen=True)
class Guidance:
    """The guidance of a sampling run.

    kind           a name in FORMULAS, or "none"
    scale          w, 0 or more; for "chain" it is w_c
    parent_scale   w_p of "chain", 0 or more; other kinds ignore it
    interval       first and last guided timestep, both in 0..999; at all others the prediction is e_c
                   (arXiv 2404.07724, which gives the interval in noise levels)
    channels       how many of the first channels are guided: 3 as in the official code, or "all" C; the others are e_c's
    other_weights  {parameter name: tensor} that autoguidance and domain guidance swap in for a second model
    """

    kind: str = "superclass"
    scale: float = 4.0
    parent_scale: float = 1.0
    interval: tuple[int, int] = ALL_TIMESTEPS
    channels: int | str = 3
    other_weights: dict[str, torch.Tensor] | None = None

    @property
    def idle(self) -> bool:
        """Whether the guided prediction is e_c at every timestep."""
        return self.kind == "none" or (self.scale == 1 and (self.kind != "chain" or self.parent_scale == 1))


# ---- formulas ------------------------------------------------------------------------------------
#
# Each takes eps, the scale w and the parent scale, and returns (e_c, the guided prediction), all (N, 2C, h, w).
# eps("class", "null") returns the predictions for these rows of the class table, named as in ROWS, in one forward pass;
# eps(..., other=True) returns those of the model with the other weights.


def superclass(eps: Callable, w: float, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    """FineDiffusion, arXiv 2402.18331, equation 1: e_p + w (e_c - e_p). For a plain DiT, p is the null class."""
    e_c, e_p = eps("class", "superclass")
    return e_c, e_p + w * (e_c - e_p)


def null(eps: Callable, w: float, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Classifier-free guidance, arXiv 2207.12598, equation 6: e_0 + w (e_c - e_0). That paper's w is this w minus 1."""
    e_c, e_0 = eps("class", "null")
    return e_c, e_0 + w * (e_c - e_0)


def chain(eps: Callable, w_c: float, w_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both steps down the hierarchy, each with its own scale: e_0 + w_p (e_p - e_0) + w_c (e_c - e_p).

    w_p = 1 is FineDiffusion's guidance and w_p = w_c is classifier-free guidance: terms that cancel are not computed.
    arXiv 2211.09800, section 3.2, does the same for an image and a text as conditions.
    """
    if w_p == 1:
        return superclass(eps, w_c, w_p)
    if w_p == w_c:
        return null(eps, w_c, w_p)
    e_c, e_p, e_0 = eps("class", "superclass", "null")
    return e_c, e_0 + w_p * (e_p - e_0) + w_c * (e_c - e_p)


def autoguidance(eps: Callable, w: float, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Autoguidance, arXiv 2406.02507: e_weak + w (e_c - e_weak), e_weak for the same class by a less trained model."""
    (e_c,) = eps("class")
    (e_weak,) = eps("class", other=True)
    return e_c, e_weak + w * (e_c - e_weak)


def domain(eps: Callable, w: float, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Domain Guidance, arXiv 2504.01521: e_base + w (e_c - e_base), e_base for the null class by the base model."""
    (e_c,) = eps("class")
    (e_base,) = eps("base null", other=True)
    return e_c, e_base + w * (e_c - e_base)


def random_class(eps: Callable, w: float, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Control experiment: e_r + w (e_c - e_r), r another class, drawn for each image."""
    e_c, e_r = eps("class", "another class")
    return e_c, e_r + w * (e_c - e_r)


def wrong_superclass(eps: Callable, w: float, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Control experiment: e_q + w (e_c - e_q), q a superclass other than the class's own, drawn for each image."""
    e_c, e_q = eps("class", "another superclass")
    return e_c, e_q + w * (e_c - e_q)


FORMULAS = {
    "superclass": superclass,
    "null": null,
    "chain": chain,
    "autoguidance": autoguidance,
    "domain": domain,
    "random-class": random_class,
    "wrong-superclass": wrong_superclass,
}
GUIDANCES = (*FORMULAS, "none")

# ---- rows of the class table ---------------------------------------------------------------------
#
# Each takes the embedder, labels (N,) and a key per image, and returns rows (N,).


def hash_integer(text: str) -> int:
    """Return the 128-bit BLAKE2b digest of a text as an integer in 0..2**128-1, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def draw_other(own: int, count: int, key: Sequence) -> int:
    """Draw a number in 0..count-1 other than `own`, all equally likely; `key` alone decides the draw."""
    drawn = hash_integer(f"guide {' '.join(map(str, key))}") % (count - 1)
    return drawn + (drawn >= own)


def other_classes(embedder: torch.nn.Module, labels: torch.Tensor, keys: Sequence[Sequence]) -> torch.Tensor:
    """Draw the row of another class for each of `labels` (N,), as int64 (N,)."""
    return torch.tensor([draw_other(c, embedder.num_classes, key) for c, key in zip(labels.tolist(), keys)])


def other_superclasses(embedder: torch.nn.Module, labels: torch.Tensor, keys: Sequence[Sequence]) -> torch.Tensor:
    """Draw the row of a superclass other than its own for each of `labels` (N,), as int64 (N,)."""
    own = embedder.superclass_rows(labels) - embedder.num_classes
    drawn = [draw_other(p, embedder.num_super_classes, key) for p, key in zip(own.tolist(), keys)]
    return torch.tensor(drawn) + embedder.num_classes


ROWS = {
    "class": lambda embedder, labels, keys: labels,
    "superclass": lambda embedder, labels, keys: embedder.superclass_rows(labels),
    "null": lambda embedder, labels, keys: embedder.null_rows(labels),
    "base null": lambda embedder, labels, keys: torch.zeros_like(labels),  # the other table has this row only
    "another class": other_classes,
    "another superclass": other_superclasses,
}

# ---- the guided model ----------------------------------------------------------------------------


def check_guidance(guidance: Guidance, embedder: torch.nn.Module) -> None:
    """Raise ValueError if the class table of `embedder`, a `TieredEmbedder`, lacks rows that the guidance needs."""
    kind, lack = guidance.kind, None
    if kind in ("null", "chain") and not embedder.has_null:
        lack = "has no null row: train it with --null-prob"
    if kind == "wrong-superclass" and embedder.num_super_classes == 1:
        lack = "has a single superclass: choose another guidance"
    if kind == "random-class" and embedder.num_classes == 1:
        lack = "has a single class: choose another guidance"
    if lack:
        raise ValueError(f"--guidance is {kind}, but the model {lack}.")
    needs_weights = kind in ("autoguidance", "domain") and not guidance.idle
    assert guidance.other_weights or not needs_weights, f"{kind} needs other weights"


@contextmanager
def swapped(pairs: Sequence[tuple[torch.nn.Parameter, torch.Tensor]]) -> Iterator[None]:
    """Replace each parameter's tensor by the other of its pair inside a `with` block; nothing is copied.

    The two may differ in shape.
    """
    own = [parameter.data for parameter, _ in pairs]
    try:
        for parameter, tensor in pairs:
            parameter.data = tensor
        yield
    finally:
        for (parameter, _), data in zip(pairs, own):
            parameter.data = data


def repeated(t: torch.Tensor | int, x: torch.Tensor) -> torch.Tensor:
    """Return timestep t, an int or a tensor (M,) that holds it, once for each image of x (N, ...), as int64 (N,)."""
    if isinstance(t, int):
        return torch.full(x.shape[:1], t, device=x.device)
    return t.repeat(len(x) // len(t))


def guided(
    model: torch.nn.Module, labels: torch.Tensor, guidance: Guidance, keys: Sequence[Sequence] | None
) -> Callable[[torch.Tensor, torch.Tensor | int], torch.Tensor]:
    """Return f(x, t), the model's prediction guided towards `labels`, for x (N, C, h, w) at one timestep t.

    t is an int, or a tensor (N,) that has the timestep N times. With an interval, a tensor on a GPU is waited for.

    model     a `DiT`
    labels    (N,) classes, on the model's device
    guidance  one that `check_guidance` accepts
    keys      a key per image, which decides the rows drawn by random-class and wrong-superclass; None for other kinds

    f makes one forward pass of N images if nothing is guided: at scale 1 or outside the interval. Otherwise all rows of
    the formula are one forward pass of 2N or 3N images; rows of the other weights are one forward pass more.
    """
    if guidance.idle:
        return lambda x, t: model(x, repeated(t, x), labels)
    formula, (low, high) = FORMULAS[guidance.kind], guidance.interval
    count = model.in_channels if guidance.channels == "all" else guidance.channels
    pairs = [(model.get_parameter(name), tensor) for name, tensor in (guidance.other_weights or {}).items()]
    rows = {}  # kind of row -> (N,), the same at every timestep

    def rows_of(kind):
        if kind not in rows:
            rows[kind] = ROWS[kind](model.y_embedder, labels, keys).to(labels.device)
        return rows[kind]

    def f(x, t):
        if guidance.interval != ALL_TIMESTEPS and not low <= (t if isinstance(t, int) else t[0]) <= high:
            return model(x, repeated(t, x), labels)

        def eps(*kinds, other=False):
            n = len(kinds)
            y = torch.cat([rows_of(kind) for kind in kinds])  # (n * N,)
            with swapped(pairs) if other else nullcontext():
                x_n = x.repeat(n, 1, 1, 1)
                out = model(x_n, repeated(t, x_n), y)  # (n * N, 2C, h, w)
            return out.float().chunk(n)  # float32, since guidance would amplify half-precision rounding

        e_c, pushed = formula(eps, guidance.scale, guidance.parent_scale)
        return torch.cat([pushed[:, :count], e_c[:, count:]], dim=1)

    return f
