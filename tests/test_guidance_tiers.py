"""Guidance down a tree of three tiers, on a toy with exact predictions."""

from functools import partial

import torch
from helpers.tiny_models import refusal
from torch.testing import assert_close

from guidance import Guidance, check_guidance, guided
from tiered_embedder import TieredEmbedder


class GaussianTree(torch.nn.Module):
    """Exact noise predictions in float64 for Gaussian classes in three tiers: a node is the mean of its classes.

    For x = sqrt(a) x_0 + sqrt(1 - a) noise and x_0 ~ N(mean, 1), the noise is predicted by sqrt(1 - a) (x - sqrt(a) mean).
    """

    in_channels, a = 1, 0.3

    def __init__(self):
        super().__init__()
        orders = [0, 0, 1, 1, 2, 2]
        self.y_embedder = TieredEmbedder(6, 2, 4, 0.0, [[0, 0, 0, 0, 1, 1], orders], null_row=True, ranks=[3])
        means = torch.tensor([1.0, 3, -2, 5, 7, -9], dtype=torch.float64)
        of_order = torch.stack([means[[0, 1]].mean(), means[[2, 3]].mean(), means[[4, 5]].mean()])
        self.means = torch.cat([means, means[:4].mean()[None], means[4:].mean()[None], of_order, means.mean()[None]])
        self.sizes = []

    def forward(self, x, t, y):
        self.sizes.append(len(x))
        eps = (1 - self.a) ** 0.5 * (x - self.a**0.5 * self.means[y].view(-1, 1, 1, 1))
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)


def test_a_toy_with_exact_scores_follows_the_closed_forms_in_three_tiers(monkeypatch):
    """The guided prediction is that of a Gaussian whose mean is guided."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # predictions are summed in float32 otherwise
    model, labels = GaussianTree(), torch.tensor([0, 3, 5])
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    m_0, m_p, m_o, m_c = model.means[11], model.means[[6, 6, 7]], model.means[[8, 9, 10]], model.means[labels]
    chain = partial(Guidance, "chain", channels="all")
    cases = (  # guidance, mean, predictions
        (Guidance("superclass", 2.5, channels="all"), m_p + 2.5 * (m_c - m_p), 2),
        (Guidance("superclass", 2.5, channels="all", tier=1), m_o + 2.5 * (m_c - m_o), 2),
        (Guidance("null", 2.5, channels="all"), m_0 + 2.5 * (m_c - m_0), 2),
        (chain(scales=(1.5, 2.0, 4.0)), m_0 + 1.5 * (m_p - m_0) + 2 * (m_o - m_p) + 4 * (m_c - m_o), 4),
        (chain(scales=(3.0, 3.0, 3.0)), m_0 + 3 * (m_c - m_0), 2),
        (chain(scales=(1.0, 1.0, 3.0)), m_o + 3 * (m_c - m_o), 2),
        (chain(scales=(1.0, 3.0, 3.0)), m_p + 3 * (m_c - m_p), 2),
        (chain(scales=(1.0, 2.0, 3.0)), m_p + 2 * (m_o - m_p) + 3 * (m_c - m_o), 3),
        (chain(scales=(2.0, 1.0, 1.0)), m_0 + 2 * (m_p - m_0) + (m_c - m_p), 3),
        (chain(scales=(1.0, 1.0, 1.0)), m_c, 1),
    )
    for each, mean, predictions in cases:
        model.sizes.clear()
        out = guided(model, labels, each, None)(x, 500)
        expected = (1 - model.a) ** 0.5 * (x - model.a**0.5 * mean.view(-1, 1, 1, 1))
        assert_close(out[:, :1], expected, rtol=0, atol=1e-13)
        assert model.sizes == [predictions * 3], each


def test_each_step_of_a_chain_has_its_own_interval():
    model, labels = GaussianTree(), torch.tensor([0, 3, 5])
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    timed = Guidance("chain", scales=(1.0, 2.0, 3.0), intervals=((0, 999), (500, 999), (300, 600)), channels="all")
    for t, scales in ((900, (1, 2, 1)), (550, (1, 2, 3)), (400, (1, 1, 3)), (100, (1, 1, 1))):
        same = Guidance("chain", scales=scales, channels="all")
        assert guided(model, labels, timed, None)(x, t).equal(guided(model, labels, same, None)(x, t))
        assert guided(model, labels, timed, None)(x, torch.full((3,), t)).equal(guided(model, labels, same, None)(x, t))


def test_a_chain_without_a_null_row_starts_at_the_superclass():
    embedder = TieredEmbedder(5, 2, 8, 0.1, [[0, 1, 0, 1, 1], [0, 1, 0, 2, 2]], ranks=[3])
    check_guidance(Guidance("chain", scales=(1.0, 2.0, 4.0)), embedder)
    with refusal("--guidance is chain, but the model has no null row: train it with --null-prob"):
        check_guidance(Guidance("chain", scales=(1.5, 2.0, 4.0)), embedder)
