"""Precision, recall, density and coverage against torch-fidelity, the published formulas and closed forms."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from evaluation.neighbours import expected_coverage, neighbourhoods, subset


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, m, d", [(80, 60, 4), (200, 150, 48)])
def test_precision_and_recall_equal_torch_fidelity(n, m, d):
    real, fake = draw(0, n, d), draw(1, m, d) * 0.7 + 0.2
    expected = prc_features_to_metric(fake, real, verbose=False)
    found = neighbourhoods(real, fake, chunk=37)
    assert found[:2] == pytest.approx((expected["precision"], expected["recall"]), abs=1e-5)
    assert 0 < found.recall < found.precision


def by_the_formulas(real, fake, k):
    """Density and coverage as in arXiv 2002.09797, section 3, pair by pair."""

    def distance(a, b):
        return np.linalg.norm(np.asarray(a, dtype=float) - np.asarray(b, dtype=float))

    radius = [sorted(distance(x, other) for other in real)[k] for x in real]
    inside = np.array([[distance(x, y) <= r for y in fake] for x, r in zip(real, radius)])
    return inside.sum() / (k * len(fake)), inside.any(1).mean()


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_are_those_of_the_formulas(k):
    real, fake = draw(0, 40, 3), draw(1, 30, 3) * 0.7 + 0.2
    found = neighbourhoods(real, fake, density_k=k, chunk=7)
    assert found[2:] == pytest.approx(by_the_formulas(real, fake, k), abs=1e-12)
    assert 0.2 < found.coverage < 1 and found.density > 0.2


def test_a_hand_computed_example():
    real = torch.tensor([[0.0], [1], [2], [3], [50]])
    fake = torch.tensor([[-2.9], [-3.1], [3.5], [49], [1]])
    # the radii of the real points with k = 3 are 3, 2, 2, 3, 49
    found = neighbourhoods(real, fake, density_k=3)
    assert found.precision == pytest.approx(4 / 5)  # all but -3.1
    assert found.density == pytest.approx((1 + 0 + 3 + 1 + 5) / 15)
    assert found.coverage == 1  # -2.9 is in the first, 1 in all the others
    assert neighbourhoods(real[:4], fake, density_k=3).precision == pytest.approx(3 / 5)  # and 49


def test_two_samples_of_one_distribution_have_a_density_of_1_and_the_expected_coverage():
    pairs = [(draw(seed, 100, 2), draw(1000 + seed, 60, 2)) for seed in range(40)]
    found = np.mean([neighbourhoods(*pair)[2:] for pair in pairs], axis=0)
    assert found == pytest.approx((1, expected_coverage(100, 60)), abs=0.02)
    assert expected_coverage(1, 1, k=1) == 1 and expected_coverage(3, 1, k=1) == pytest.approx(1 / 3)
    assert expected_coverage(10**6, 10**6) == pytest.approx(1 - 2**-5, abs=1e-4)


def test_copies_of_few_images_have_a_high_density_and_a_low_coverage():
    real = draw(0, 200, 4)
    copies = real[:10].repeat(20, 1) + 1e-3 * draw(1, 200, 4)
    found = neighbourhoods(real, copies)
    assert found.precision == 1 and found.coverage < 0.4 and found.recall < 0.1


def test_a_subset_is_random_and_in_order():
    x = torch.arange(20.0)[:, None]
    found = subset(x, 8, seed=0)
    assert found.equal(subset(x, 8, seed=0)) and not found.equal(subset(x, 8, seed=1))
    assert (found.diff(dim=0) > 0).all() and subset(x, 20, seed=3).equal(x)
