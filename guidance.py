"""Guidance: a class's prediction, pushed away from a more general or a worse one.

Shapes: N images x (N, C, h, w), predictions (N, 2C, h, w): the noise, then the variance. e_c is the prediction for the
class c, e_p for its superclass p, e_0 for the null class; w is the scale. At w = 1 all of them are e_c.
"""

import hashlib
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

ALL_TIMESTEPS = (0, 999)


@dataclass(frozen=True)
class Guidance:
    """kind           a name in FORMULAS, or "none"
    scale          w, 0 or more; of a chain w_c
    parent_scale   a chain's w_p, 0 or more
    interval       first and last timestep, 0..999, that are guided; the others see the class alone
                   (arXiv 2404.07724, where the ends are noise levels)
    channels       how many of the first channels are guided (3 as in the official code), or "all"; the rest is e_c's
    other          {parameter: tensor}, what autoguidance and domain put in place of the model's own for a moment
    """

    kind: str = "superclass"
    scale: float = 4.0
    parent_scale: float = 1.0
    interval: tuple = ALL_TIMESTEPS
    channels: int | str = 3
    other: dict | None = None

    @property
    def idle(self):
        """True where the guided prediction is e_c, whatever the formula."""
        return self.kind == "none" or (self.scale == 1 and (self.kind != "chain" or self.parent_scale == 1))


# ---- the formulas: each takes predictions, eps(row, ...) -> one for each kind of row, and the scales; it gives
# ---- e_c and the guided prediction ----------------------------------------------------------------------------------


def away(e_c, e, w):
    """e + w (e_c - e)"""
    return e_c, e + w * (e_c - e)


def superclass(eps, w, _):
    """e_p + w (e_c - e_p): FineDiffusion, arXiv 2402.18331, eq. 1; on a plain DiT p is the null class."""
    return away(*eps("class", "superclass"), w)


def null(eps, w, _):
    """e_0 + w (e_c - e_0): classifier-free guidance, arXiv 2207.12598, whose w is ours less 1."""
    return away(*eps("class", "null"), w)


def chain(eps, w_c, w_p):
    """e_0 + w_p (e_p - e_0) + w_c (e_c - e_p): down the hierarchy, a scale for each step.

    w_p = 1 is FineDiffusion's and w_p = w_c classifier-free guidance: what cancels is not computed. For two conditions
    one after the other see arXiv 2211.09800, section 3.2.
    """
    if w_p == 1:
        return superclass(eps, w_c, w_p)
    if w_p == w_c:
        return null(eps, w_c, w_p)
    e_c, e_p, e_0 = eps("class", "superclass", "null")
    return e_c, e_0 + w_p * (e_p - e_0) + w_c * (e_c - e_p)


def autoguidance(eps, w, _):
    """e_weak + w (e_c - e_weak), e_weak for the same class by a less trained model: arXiv 2406.02507."""
    return away(*eps("class"), *eps("class", other=True), w)


def domain(eps, w, _):
    """e_base + w (e_c - e_base), e_base for the null class by the model before fine-tuning: Domain Guidance, arXiv 2504.01521."""
    return away(*eps("class"), *eps("only", other=True), w)


def random_class(eps, w, _):
    """Control: e_r + w (e_c - e_r), r another class, drawn for each image."""
    return away(*eps("class", "another class"), w)


def wrong_superclass(eps, w, _):
    """Control: e_q + w (e_c - e_q), q a superclass that is not the class's, drawn for each image."""
    return away(*eps("class", "another superclass"), w)


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

# ---- rows of the class table: each takes the embedder, labels (N,) and a key for each image -------------------------


def draw_other(own, count, key):
    """One of 0..count-1 but `own`, evenly, set by `key`."""
    digest = hashlib.blake2b(f"guide {' '.join(map(str, key))}".encode(), digest_size=16).digest()
    other = int.from_bytes(digest, "little") % (count - 1)
    return other + (other >= own)


def other_classes(embedder, labels, keys):
    return torch.tensor([draw_other(c, embedder.num_classes, key) for c, key in zip(labels.tolist(), keys)])


def other_superclasses(embedder, labels, keys):
    own = embedder.superclass_rows(labels) - embedder.num_classes
    drawn = [draw_other(p, embedder.num_super_classes, key) for p, key in zip(own.tolist(), keys)]
    return torch.tensor(drawn) + embedder.num_classes


ROWS = {
    "class": lambda embedder, labels, keys: labels,
    "superclass": lambda embedder, labels, keys: embedder.superclass_rows(labels),
    "null": lambda embedder, labels, keys: embedder.null_rows(labels),
    "only": lambda embedder, labels, keys: torch.zeros_like(labels),  # of a table with the base's null row alone
    "another class": other_classes,
    "another superclass": other_superclasses,
}

# ---- the guided model -----------------------------------------------------------------------------------------------


def check_guidance(guidance, embedder):
    """ValueError where the model of `embedder` cannot be guided so."""
    lacking = {
        "null": None if embedder.has_null else "has no null row: train it with --null-prob",
        "wrong-superclass": None if embedder.num_super_classes > 1 else "has a single superclass: leave it out",
        "random-class": None if embedder.num_classes > 1 else "has a single class: leave it out",
    }
    lacking["chain"] = lacking["null"]
    if lacking.get(guidance.kind):
        raise ValueError(f"--guidance is {guidance.kind}, but the model {lacking[guidance.kind]}.")
    assert guidance.other or guidance.idle or guidance.kind not in ("autoguidance", "domain"), (
        "other weights are needed"
    )


@contextmanager
def swapped(pairs):
    """For a moment each parameter of `pairs` [(parameter, tensor)] is the tensor; pointers move, no number is copied.

    A tensor may have another shape than its parameter.
    """
    own = [parameter.data for parameter, _ in pairs]
    try:
        for parameter, tensor in pairs:
            parameter.data = tensor
        yield
    finally:
        for (parameter, _), data in zip(pairs, own):
            parameter.data = data


def guided(model, labels, guidance, keys):
    """The model as f(x, t) of N images, t (N,) one timestep, guided towards `labels` (N,).

    `keys`: a tuple for each image, which sets what its guidance draws. Where nothing is guided (scale 1, outside the
    interval) f is one forward pass of N; else the rows of a formula go through the model together, 2N or 3N, and those
    of other weights after them.
    """
    if guidance.idle:
        return lambda x, t: model(x, t, labels)
    formula, (low, high) = FORMULAS[guidance.kind], guidance.interval
    count = model.in_channels if guidance.channels == "all" else guidance.channels
    other = guidance.other or {}
    pairs = [(model.get_parameter(name), tensor) for name, tensor in other.items()]
    rows = {}

    def row(kind):
        if kind not in rows:
            rows[kind] = ROWS[kind](model.y_embedder, labels, keys).to(labels.device)
        return rows[kind]

    def f(x, t):
        if guidance.interval != ALL_TIMESTEPS and not low <= t[0] <= high:
            return model(x, t, labels)

        def eps(*kinds, other=False):
            n = len(kinds)
            with swapped(pairs) if other else nullcontext():
                out = model(x.repeat(n, 1, 1, 1), t.repeat(n), torch.cat([row(kind) for kind in kinds]))
            return out.float().chunk(n)  # the scale would blow half precision's rounding up

        own, pushed = formula(eps, guidance.scale, guidance.parent_scale)
        return torch.cat([pushed[:, :count], own[:, count:]], dim=1)

    return f
