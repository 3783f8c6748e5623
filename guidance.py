"""Guidance: push a class's prediction away from a more general or a worse one.

The table of classes is a tree: the null class, the superclasses, further tiers if there are any, and the classes. Its
guidances are sums of steps down this tree, each with a scale (`down_the_tree`). Equation 1 of FineDiffusion
(arXiv 2402.18331) has one step, e_p + w (e_c - e_p).

Shapes: N images x (N, C, h, w); predictions (N, 2C, h, w), the noise and then the variance. e_c is the prediction for the
class c, e_p for its superclass p and e_0 for the null class; w is the guidance scale. If all scales are 1, the guided
prediction is e_c.
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

    kind           a name in GUIDANCES
    scale          w, 0 or more; for "chain" it is the scale below the superclasses
    parent_scale   "chain": scale between the null class and the superclasses, 0 or more; other kinds ignore it
    interval       first and last guided timestep, both in 0..999; at all others the prediction is e_c
                   (arXiv 2404.07724, which gives the interval in noise levels)
    channels       how many of the first channels are guided: 3 as in the official code, or "all" C; the others are e_c's
    other_weights  {parameter name: tensor} that autoguidance and domain guidance swap in for a second model
    tier           "superclass": the tier in the place of the superclass, 0 for the superclasses
    scales         "chain": the scale of each tier, from coarse to fine, and of the class, in place of the two above
    intervals      "chain": the interval of each tier and of the class, in place of `interval`
    """

    kind: str = "superclass"
    scale: float = 4.0
    parent_scale: float = 1.0
    interval: tuple[int, int] = ALL_TIMESTEPS
    channels: int | str = 3
    other_weights: dict[str, torch.Tensor] | None = None
    tier: int = 0
    scales: tuple[float, ...] | None = None
    intervals: tuple[tuple[int, int], ...] | None = None

    @property
    def idle(self) -> bool:
        """Whether the guided prediction is e_c at every timestep."""
        if self.kind == "chain":
            return set(self.scales or (self.scale, self.parent_scale)) == {1}
        return self.kind == "none" or self.scale == 1

    @property
    def timed(self) -> bool:
        """Whether the guidance depends on the timestep."""
        return self.intervals is not None or self.interval != ALL_TIMESTEPS

    def step_scales(self, tiers: int, t: int = 0) -> tuple[float, ...]:
        """Return the scales of the formula at timestep t: of tiers + 1 steps down the tree, or the one of another kind."""
        steps = {
            "superclass": (1.0,) * (self.tier + 1) + (self.scale,) * (tiers - self.tier),
            "null": (self.scale,) * (tiers + 1),
            "chain": self.scales or (self.parent_scale, *(self.scale,) * tiers),
        }.get(self.kind, (self.scale,))
        if not self.timed:
            return steps
        intervals = self.intervals or (self.interval,) * len(steps)
        return tuple(w if low <= t <= high else 1.0 for w, (low, high) in zip(steps, intervals))


# ---- formulas ------------------------------------------------------------------------------------
#
# Each takes eps, which computes predictions, and scales, and returns (e_c, the guided prediction), all (N, 2C, h, w).
# eps("class", "null") returns the predictions for these rows of the class table, named as in ROWS or by the number of a
# tier, in one forward pass; eps(..., other=True) returns those of the model with the other weights.


def down_the_tree(eps: Callable, scales: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every step down the tree with its own scale: e_0 + w_1 (e_1 - e_0) + ... + w_c (e_c - e_L), for tiers 1..L.

    scales: w_1, ..., w_L, w_c. With w_1 = 1 and the others w it is equation 1 of arXiv 2402.18331, and with all equal to w
    classifier-free guidance, arXiv 2207.12598, equation 6, whose w is this w minus 1. Predictions that cancel are not
    computed. arXiv 2211.09800, section 3.2, has such a chain for an image and a text as conditions.
    """
    levels = ("null", *range(len(scales) - 1), "class")
    ends = [i for i in range(1, len(levels)) if i == len(scales) or scales[i] != scales[i - 1]]  # equal steps are one
    steps = [(scales[end - 1], start, end) for start, end in zip([0, *ends], ends)]
    if steps[0][0] == 1:
        steps = steps[1:]
    base = steps[0][1] if steps else len(scales)
    used = sorted({len(scales), base, *(end for _, _, end in steps)}, reverse=True)
    e = dict(zip(used, eps(*(levels[i] for i in used))))
    pushed = e[base]
    for w, start, end in steps:
        pushed = pushed + w * (e[end] - e[start])
    return e[len(scales)], pushed


def autoguidance(eps: Callable, scales: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Autoguidance, arXiv 2406.02507: e_weak + w (e_c - e_weak), e_weak for the same class by a less trained model."""
    (w,), (e_c,) = scales, eps("class")
    (e_weak,) = eps("class", other=True)
    return e_c, e_weak + w * (e_c - e_weak)


def domain(eps: Callable, scales: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Domain Guidance, arXiv 2504.01521: e_base + w (e_c - e_base), e_base for the null class by the base model."""
    (w,), (e_c,) = scales, eps("class")
    (e_base,) = eps("base null", other=True)
    return e_c, e_base + w * (e_c - e_base)


def random_class(eps: Callable, scales: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Control experiment: e_r + w (e_c - e_r), r another class, drawn for each image."""
    (w,), (e_c, e_r) = scales, eps("class", "another class")
    return e_c, e_r + w * (e_c - e_r)


def wrong_superclass(eps: Callable, scales: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Control experiment: e_q + w (e_c - e_q), q a superclass other than the class's own, drawn for each image."""
    (w,), (e_c, e_q) = scales, eps("class", "another superclass")
    return e_c, e_q + w * (e_c - e_q)


FORMULAS = {
    "superclass": down_the_tree,
    "null": down_the_tree,
    "chain": down_the_tree,
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
    "null": lambda embedder, labels, keys: embedder.null_rows(labels),
    "base null": lambda embedder, labels, keys: torch.zeros_like(labels),  # the other table has this row only
    "another class": other_classes,
    "another superclass": other_superclasses,
}

# ---- the guided model ----------------------------------------------------------------------------


def check_guidance(guidance: Guidance, embedder: torch.nn.Module) -> None:
    """Raise ValueError if the class table of `embedder`, a `TieredEmbedder`, lacks rows that the guidance needs."""
    kind, lack = guidance.kind, None
    needs_null = kind == "null" or kind == "chain" and guidance.step_scales(embedder.tiers)[0] != 1
    if needs_null and not embedder.has_null:
        lack = "has no null row: train it with --null-prob"
    if kind == "wrong-superclass" and embedder.num_super_classes == 1:
        lack = "has a single superclass: choose another guidance"
    if kind == "random-class" and embedder.num_classes == 1:
        lack = "has a single class: choose another guidance"
    if lack:
        raise ValueError(f"--guidance is {kind}, but the model {lack}.")
    needs_weights = kind in ("autoguidance", "domain") and not guidance.idle
    assert guidance.other_weights or not needs_weights, f"{kind} needs other weights"
    assert FORMULAS.get(kind) != down_the_tree or len(guidance.step_scales(embedder.tiers)) == embedder.tiers + 1


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
    the formula are one forward pass of 2N or more images; rows of the other weights are one forward pass more.
    """
    if guidance.idle:
        return lambda x, t: model(x, repeated(t, x), labels)
    count = model.in_channels if guidance.channels == "all" else guidance.channels
    pairs = [(model.get_parameter(name), tensor) for name, tensor in (guidance.other_weights or {}).items()]
    rows = {}  # kind of row, or a tier -> (N,), the same at every timestep

    def rows_of(kind):
        if kind not in rows:
            embedder = model.y_embedder
            found = ROWS[kind](embedder, labels, keys) if kind in ROWS else embedder.tier_rows(labels, kind)
            rows[kind] = found.to(labels.device)
        return rows[kind]

    def f(x, t):
        def eps(*kinds, other=False):
            n = len(kinds)
            y = torch.cat([rows_of(kind) for kind in kinds])  # (n * N,)
            with swapped(pairs) if other else nullcontext():
                x_n = x.repeat(n, 1, 1, 1)
                out = model(x_n, repeated(t, x_n), y)  # (n * N, 2C, h, w)
            return out.float().chunk(n)  # float32, since guidance would amplify half-precision rounding

        time = (t if isinstance(t, int) else t[0].item()) if guidance.timed else 0
        scales = guidance.step_scales(model.y_embedder.tiers, time)
        if set(scales) == {1}:
            return model(x, repeated(t, x), labels)
        e_c, pushed = FORMULAS[guidance.kind](eps, scales)
        return torch.cat([pushed[:, :count], e_c[:, count:]], dim=1)

    return f
