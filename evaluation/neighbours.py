"""Metrics of nearest neighbours: precision, recall, density and coverage, from features alone.

Features are (n, d) tensors of any float type, one row per image; distances are float64.
"""

from typing import NamedTuple

import torch

from evaluation.metrics import check_features

PRECISION_K, DENSITY_K = 3, 5  # neighbours of precision and recall, and of density and coverage, as published


class Neighbourhoods(NamedTuple):
    """Shares of images in the balls of others; a ball of k reaches from an image to its k-th nearest in the same set.

    precision  of fake images in some real ball, [0, 1] (arXiv 1904.06991, as recall)
    recall     of real images in some fake ball, [0, 1]
    density    mean number of real balls that a fake image lies in, over k; 1 for two samples of one distribution
               (arXiv 2002.09797, as coverage)
    coverage   of real balls with some fake image, [0, 1]; see `expected_coverage`
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(
    real: torch.Tensor, fake: torch.Tensor, k: int = PRECISION_K, density_k: int = DENSITY_K, chunk: int = 1000
) -> Neighbourhoods:
    """Return precision and recall with k neighbours, density and coverage with density_k.

    A point on the edge of a ball lies in it.

    real, fake: features (n, d) and (m, d)
    chunk: rows per block of the distance matrix

    Raises ValueError if the real set has density_k images or fewer, or the fake set k or fewer.
    """
    real, fake = check_features(real, least=max(k, density_k) + 1), check_features(fake, least=k + 1)
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    (real_ball, density_ball), (fake_ball,) = radii(real, (k, density_k), chunk), radii(fake, (k,), chunk)
    in_real, balls = [], []  # of each fake image: whether a real ball has it, and how many density balls
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool, device=real.device) for _ in range(2))
    for part, ball in zip(fake.split(chunk), fake_ball.split(chunk)):
        distance = squared_distances(part, real)
        in_real.append((distance <= real_ball).any(1))
        recalled |= (distance <= ball[:, None]).any(0)
        inside = distance <= density_ball
        balls.append(inside.sum(1))
        covered |= inside.any(0)
    means = [x.double().mean().item() for x in (torch.cat(in_real), recalled, torch.cat(balls), covered)]
    return Neighbourhoods(means[0], means[1], means[2] / density_k, means[3])


def radii(x: torch.Tensor, ks: tuple[int, ...], chunk: int = 1000) -> list[torch.Tensor]:
    """Return for each k the squared distance of every row of x (n, d) to its k-th nearest other row, (n,)."""
    parts = [[], *([] for _ in ks[1:])]
    for rows in x.split(chunk):
        nearest = squared_distances(rows, x).topk(max(ks) + 1, largest=False).values  # the first is the row itself
        for part, k in zip(parts, ks):
            part.append(nearest[:, k])
    return [torch.cat(part) for part in parts]


def expected_coverage(n: int, m: int, k: int = DENSITY_K) -> float:
    """Return the expected coverage of n real images by m images of the same distribution (arXiv 2002.09797, appendix).

    None of the m lies in the ball if, of the n - 1 + m other images, the k nearest are all real. For large n = m it is
    1 - 2^-k.
    """
    missed = 1.0
    for i in range(1, k + 1):
        missed *= (n - i) / (n + m - i)
    return 1 - missed


def squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return |x_i - y_j|^2, (n, m), exactly 0 for equal rows; x (n, d), y (m, d)."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    distance = norms - 2 * x @ y.T
    return torch.where(distance > 1e-12 * norms, distance, 0)


def subset(features: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """Return n random rows of features (m, d), all of them in their order if n is m."""
    assert n <= len(features)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:n]
    return features[order.sort().values.to(features.device)]
