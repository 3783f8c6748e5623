"""The formulas against closed forms, 50-digit arithmetic and the published programs, on the same features."""

import itertools
import math
import warnings

import mpmath
import numpy as np
import pytest
import torch
from helpers.tiny_models import refusal
from scipy import linalg
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pytorch_fid.fid_score import calculate_frechet_distance

from evaluation.metrics import (
    Gaussian,
    Moments,
    bootstrap_weights,
    features_root,
    frechet_distance,
    gaussian_root,
    inception_score,
    kid,
    kid_size,
    mean_over_pairs,
    mean_over_weighted_pairs,
    percentile_interval,
    score_splits,
    score_sums,
)
from evaluation.neighbours import neighbourhoods


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gaussian(mean, covariance):
    return gaussian_root(Gaussian(None, torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()))


def moments(x, batch=7):
    """The `Gaussian` of features (n, d) added in batches."""
    total = Moments(x.shape[1])
    for part in x.split(batch):
        total.add(part)
    return total.gaussian()


def by_features(x, y):
    return frechet_distance(features_root(x), features_root(y))


def by_statistics(x, y):
    return frechet_distance(gaussian_root(moments(x)), gaussian_root(moments(y)))


def rotation(seed, d):
    return torch.linalg.qr(draw(seed, d, d)).Q


# ---- mean and covariance -------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1e6])
def test_moments_equal_those_of_all_rows(offset):
    x = draw(0, 50, 6) @ draw(1, 6, 6) + offset
    for batch in (1, 7, 50):
        total = moments(x, batch)
        assert total.n == 50
        torch.testing.assert_close(total.mean, x.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(total.covariance, torch.cov(x.T), rtol=1e-9, atol=1e-9)


def test_merged_moments_equal_those_of_all_rows():
    x = draw(0, 40, 5)
    parts = [Moments(5) for _ in range(4)]
    for part, rows in zip(parts, (slice(0, 1), slice(1, 25), slice(25, 40), slice(40, 40))):
        if len(x[rows]):
            part.add(x[rows])
    total = Moments(5)
    for part in reversed(parts):
        total.merge(part)
    torch.testing.assert_close(total.gaussian().covariance, torch.cov(x.T), rtol=1e-13, atol=1e-14)


# ---- Frechet distance ----------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 30])
def test_with_equal_covariances_it_is_the_distance_of_the_means(d):
    covariance = torch.cov(draw(0, d, 3 * d))
    covariance = covariance.reshape(d, d)
    shift = draw(1, d)
    found = frechet_distance(gaussian(torch.zeros(d), covariance), gaussian(shift, covariance))
    assert found == pytest.approx(shift.square().sum().item(), rel=1e-10)


@pytest.mark.parametrize("d", [1, 2, 30])
def test_with_commuting_covariances_it_is_the_distance_of_their_roots(d):
    vectors, a, b = rotation(0, d), draw(1, d).exp(), draw(2, d).exp()
    a[d // 2 :] *= torch.arange(len(a[d // 2 :])) > 0  # one of them may be singular
    found = frechet_distance(
        gaussian(torch.zeros(d), vectors * a @ vectors.T), gaussian(torch.ones(d), vectors * b @ vectors.T)
    )
    assert found == pytest.approx(d + (a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-10)


def fifty_digits(x, y):
    """The Frechet distance of two small sets (n, d) and (m, d), from its definition in 50-digit arithmetic."""
    with mpmath.workdps(50):
        gaussians = []
        for rows in (mpmath.matrix(x.tolist()), mpmath.matrix(y.tolist())):
            n = rows.rows
            mean = mpmath.matrix([[mpmath.fsum(rows[:, j]) / n for j in range(rows.cols)]])
            centred = mpmath.matrix(n, rows.cols)
            for i, j in itertools.product(range(n), range(rows.cols)):
                centred[i, j] = rows[i, j] - mean[j]
            gaussians.append((mean, centred.T * centred / (n - 1)))
        (m1, s1), (m2, s2) = gaussians
        values, vectors = mpmath.eigsy(s1)
        root = vectors * mpmath.diag([mpmath.sqrt(max(v, 0)) for v in values]) * vectors.T
        overlap = mpmath.fsum(mpmath.sqrt(max(v, 0)) for v in mpmath.eigsy(root * s2 * root, eigvals_only=True))
        trace = mpmath.fsum(s1[i, i] + s2[i, i] for i in range(s1.rows))
        return float(mpmath.fsum((a - b) ** 2 for a, b in zip(m1, m2)) + trace - 2 * overlap)


@pytest.mark.parametrize(
    "n, m, d, scale",
    [
        (20, 20, 4, 0),
        (9, 30, 8, 0),
        (5, 4, 8, 0),  # fewer images than dimensions in both sets
        (4, 40, 8, 0),  # in one set
        (2, 2, 6, 0),
        (30, 30, 6, 5),  # variances span ten orders of magnitude
        (30, 5, 6, 5),
    ],
)
@pytest.mark.parametrize("distance", [by_features, by_statistics])
def test_distance_equals_fifty_digit_arithmetic(n, m, d, scale, distance):
    spread = torch.logspace(0, -scale, d, dtype=torch.float64)
    x = draw(0, n, d) * spread @ rotation(1, d) + 0.5
    y = draw(2, m, d) * spread @ rotation(1, d) * 1.1
    assert distance(x, y) == pytest.approx(fifty_digits(x, y), rel=1e-6)


def test_distance_equals_the_published_programs():
    x = draw(0, 300, 24) @ draw(1, 24, 24)
    y = draw(2, 200, 24) @ draw(3, 24, 24) + 0.3
    stats = [fid_features_to_statistics(z) for z in (x, y)]
    expected = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    for distance in (by_features, by_statistics):
        assert distance(x, y) == pytest.approx(expected, rel=1e-6)
    both = [array for s in stats for array in (s["mu"], s["sigma"])]
    assert by_features(x, y) == pytest.approx(calculate_frechet_distance(*both), rel=1e-6)


def test_distance_equals_the_definition_with_a_matrix_root():
    x, y = draw(0, 60, 5), draw(1, 40, 5) * 2
    a, b = torch.cov(x.T).numpy(), torch.cov(y.T).numpy()
    root = linalg.sqrtm(linalg.sqrtm(a) @ b @ linalg.sqrtm(a)).real
    expected = (x.mean(0) - y.mean(0)).square().sum().item() + np.trace(a + b - 2 * root)
    assert by_features(x, y) == pytest.approx(expected, rel=1e-9)


def test_distance_is_symmetric_and_invariant_to_rotation_and_shift():
    x, y, turn = draw(0, 12, 20), draw(1, 15, 20) + 1, rotation(2, 20)
    assert by_features(x, y) == pytest.approx(by_features(y, x), rel=1e-12)
    assert by_features(x @ turn + 3, y @ turn + 3) == pytest.approx(by_features(x, y), rel=1e-10)


# ---- edge cases ----------------------------------------------------------------------------------

SAME = draw(0, 400, 64)
CENTRED = SAME - SAME.mean(0)
HUGE = draw(1, 20_000, 32)
FLAT = torch.cat([draw(2, 50, 4), torch.zeros(50, 60, dtype=torch.float64)], dim=1)


def nan_at(row):
    x = SAME.clone()
    x[row, 3] = torch.nan
    return x


EDGE_CASES = {  # name: (function, exact value or ValueError)
    "identical, from features": (lambda: by_features(SAME, SAME), 0),
    "identical, from statistics": (lambda: by_statistics(SAME, SAME), 0),
    "identical in another order": (lambda: by_features(SAME, SAME.flip(0)), 0),
    "identical, n < d": (lambda: by_features(SAME[:20], SAME[:20]), 0),
    "identical, Inception's dimension": (lambda: by_features(*2 * [draw(3, 50, 2048, dtype=torch.float32).relu()]), 0),
    "every image twice": (lambda: by_features(CENTRED.repeat(2, 1) * 799**0.5, CENTRED * 798**0.5), 0),
    "shifted": (lambda: by_features(SAME, SAME + 2), 4 * 64),
    "scaled": (
        lambda: by_features(CENTRED, 3 * CENTRED),
        4 * torch.cov(SAME.T).trace().item(),
    ),
    "singular, dead dimensions": (lambda: by_features(FLAT, 2 * FLAT + 1), None),
    "singular, from statistics": (lambda: by_statistics(FLAT, 2 * FLAT + 1), None),
    "constant in both sets": (lambda: by_statistics(torch.ones(5, 8), torch.full((4, 8), 3.0)), 32),
    "constant in one set": (lambda: by_features(torch.zeros(5, 64), SAME), "mean and trace"),
    "two images per set": (lambda: by_features(torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [5.0]])), 16 + 2),
    "tiny numbers": (lambda: by_features(SAME * 1e-100, SAME * 1e-100 + 1e-100) * 1e200, 64),
    "large numbers": (lambda: by_features(SAME * 1e100, SAME * 1e100 + 1e100) * 1e-200, 64),
    "huge n": (lambda: by_features(HUGE, HUGE + 1), 32),
    "huge n, streamed": (lambda: frechet_distance(*(gaussian_root(moments(x, 1000)) for x in (HUGE, HUGE + 1))), 32),
    "one image": (lambda: by_features(SAME[:1], SAME), ValueError),
    "one image, from statistics": (lambda: moments(SAME[:1]), ValueError),
    "no images": (lambda: by_features(SAME[:0], SAME), ValueError),
    "NaN": (lambda: by_features(nan_at(5), SAME), ValueError),
    "NaN, streamed": (lambda: moments(nan_at(5)), ValueError),
    "infinite": (lambda: by_features(SAME / 0, SAME), ValueError),
    "NaN in statistics": (lambda: gaussian(torch.zeros(2), torch.full((2, 2), torch.nan)), ValueError),
    "overflow": (lambda: by_features(SAME * 1e200, SAME), ValueError),
    "another dimension": (lambda: by_features(SAME, SAME[:, :60]), ValueError),
    "covariance of another size": (lambda: gaussian(torch.zeros(3), torch.eye(2)), ValueError),
    "images as features": (lambda: by_features(torch.zeros(4, 3, 8, 8), SAME), ValueError),
    "KID of one image": (lambda: kid(SAME[:1], SAME), ValueError),
    "KID of NaN": (lambda: kid(nan_at(0), SAME), ValueError),
    "KID overflow": (lambda: kid(SAME * 1e60, SAME), ValueError),
    "KID spread overflow": (lambda: kid(SAME * 1e30, SAME), ValueError),
    "KID subsets too large": (lambda: kid(SAME, SAME, size=500), ValueError),
    "KID of identical sets": (lambda: kid(SAME, SAME, subsets=1, size=400)[0] <= 0, True),
    "precision and recall of identical sets": (lambda: neighbourhoods(SAME, SAME)[:2] == (1, 1), True),
    "precision and recall of constants": (lambda: neighbourhoods(SAME * 0, SAME * 0)[:2] == (1, 1), True),
    "precision and recall of three images": (lambda: neighbourhoods(SAME[:3], SAME), ValueError),
    "density and coverage of five images": (lambda: neighbourhoods(SAME[:5], SAME), ValueError),
    "diversity of one image": (lambda: math.isnan(mean_over_pairs(*torch.tensor([[1.0], [2], [2]]))), True),
    "diversity of copies": (lambda: mean_over_pairs(*torch.tensor([[3.0], [6], [18]])).item(), 0),
    "interval without finite values": (lambda: percentile_interval(torch.tensor([torch.nan])), None),
}


@pytest.mark.reliability("R11", "edge cases of FID, KID and LPIPS: the closed form within 1e-6, or refused")
@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_cases(name):
    compute, expected = EDGE_CASES[name]
    if expected is ValueError:
        with refusal(", expected "):
            compute()
        return
    if name.startswith("singular"):
        expected = by_features(FLAT[:, :4], 2 * FLAT[:, :4] + 1) + 60
    elif expected == "mean and trace":
        expected = SAME.mean(0).square().sum().item() + torch.cov(SAME.T).trace().item()
    assert compute() == (expected if expected is None else pytest.approx(expected, rel=1e-6, abs=1e-6))


# ---- kernel distance, Inception score ----------------------------------------------------------------


@pytest.mark.parametrize("n, m", [(60, 50), (500, 40)])
def test_kid_equals_torch_fidelity(n, m):
    real, fake = draw(0, n, 96, dtype=torch.float32).relu(), draw(1, m, 96, dtype=torch.float32).relu() * 1.2
    for seed in (0, 2020):
        expected = kid_features_to_metric(fake, real, kid_subsets=20, kid_subset_size=30, rng_seed=seed, verbose=False)
        found = kid(real, fake, subsets=20, size=30, seed=seed)
        assert found == pytest.approx(list(expected.values()), abs=1e-5, rel=1e-5)


def test_kid_is_unbiased():
    x, y = draw(0, 6, 3), draw(1, 6, 3) + 1
    k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    pairs = list(itertools.permutations(range(6), 2))
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / 30
    expected -= 2 * sum(k(a, b) for a in x for b in y) / 36
    assert kid(x, y, subsets=2, size=6) == pytest.approx((expected.item(), 0), abs=1e-12)


def test_kid_subset_sizes():
    assert [kid_size(*sizes) for sizes in ((1000, 5000), (999, 5000), (50, 7), (2, 2))] == [1000, 499, 3, 2]


@pytest.mark.parametrize("n", [500, 23, 4])
def test_inception_score_equals_torch_fidelity(n):
    logits = draw(0, n, 30, dtype=torch.float32) * 3
    expected = isc_features_to_metric(logits, splits=min(10, n), rng_seed=5)
    split = score_splits(n, seed=5)
    sums = sum(score_sums(logits[i : i + 64], split[i : i + 64], split.max() + 1) for i in range(0, n, 64))
    assert inception_score(sums) == pytest.approx(list(expected.values()), rel=1e-5)


# ---- diversity -----------------------------------------------------------------------------------


def distances(f):
    return (f[:, None] - f).square().sum(2)


def test_mean_over_pairs():
    f = draw(0, 9, 20)
    expected = distances(f).sum() / 72
    found = mean_over_pairs(*(torch.as_tensor(x) for x in (9, f.square().sum(), f.sum(0).square().sum())))
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_weighted_pairs_equal_pairs_of_copied_blocks():
    sizes, weights = [2, 3, 1], torch.tensor([[1.0, 1, 1], [2, 0, 1], [0, 3, 0]])
    blocks = draw(0, 6, 8).split(sizes)
    n = torch.tensor(sizes, dtype=torch.float64)
    squares, sums = torch.stack([f.square().sum() for f in blocks]), torch.stack([f.sum(0) for f in blocks])
    found = mean_over_weighted_pairs(n, squares, sums @ sums.T, weights.double())
    for w, value in zip(weights.int().tolist(), found.tolist()):
        rows = [(b, i) for b in range(3) for _ in range(w[b]) for i in range(sizes[b])]
        copies = [(b, c) for b in range(3) for c in range(w[b]) for _ in range(sizes[b])]
        pairs = [
            distances(torch.stack([blocks[a][i], blocks[b][j]]))[0, 1].item()
            for ((a, i), u), ((b, j), v) in itertools.combinations(zip(rows, copies), 2)
            if a != b or u == v  # not a copy of a block with another copy of it
        ]
        assert value == pytest.approx(np.mean(pairs), rel=1e-12)


def test_bootstrap_weights():
    weights = bootstrap_weights(7, seed=1)
    assert weights.shape == (1000, 7) and (weights.sum(1) == 7).all() and weights.equal(bootstrap_weights(7, seed=1))
    assert weights.mean(0).sub(1).abs().max() < 0.1 and not weights.equal(bootstrap_weights(7, seed=2))


def test_interval_of_a_mean_is_1_96_standard_errors():
    x = draw(0, 400)
    low, high = percentile_interval(bootstrap_weights(400) @ x / 400)
    half = 1.96 / 400**0.5
    assert low < x.mean() < high and high - low == pytest.approx(2 * half, rel=0.15)
