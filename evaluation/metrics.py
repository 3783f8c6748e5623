"""Formulas of the metrics, from features alone: Frechet and kernel distance, Inception score, LPIPS; see also neighbours.py.

Features are (n, d) tensors of any float type, one row per image; all sums are float64. Features that are too few or
non-finite raise ValueError before they reach an eigenvalue solver.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

FLOAT = torch.float64


def check_features(features: torch.Tensor, least: int = 2) -> torch.Tensor:
    """Return (n, d) features as float64.

    Raises ValueError if the shape is another, if there are fewer than `least` rows, or if a value is non-finite.
    """
    if features.ndim != 2:
        raise ValueError(
            f"Features have the shape {tuple(features.shape)}, expected (images, dimensions): reshape them."
        )
    if len(features) < least:
        raise ValueError(f"Found features of {len(features)} images, expected at least {least}: add images.")
    if not torch.isfinite(features).all():
        row = int((~torch.isfinite(features).all(1)).nonzero()[0])
        raise ValueError(f"The features of image {row} are non-finite, expected finite features: leave it out.")
    return features.to(FLOAT)


# ---- mean and covariance -------------------------------------------------------------------------


class Gaussian(NamedTuple):
    """Mean (d,) and unbiased covariance (d, d) of the features of n images; n is None if unknown."""

    n: int | None
    mean: torch.Tensor
    covariance: torch.Tensor


class Moments:
    """Running n, mean (d,) and scatter (d, d) = sum_i (x_i - mean)(x_i - mean)^T of the rows added so far.

    Uses the pairwise update of Chan, Golub & LeVeque (1983), which avoids the cancellation of plain sums of squares.
    """

    def __init__(self, dim: int, device: str | torch.device = "cpu"):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=FLOAT, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=FLOAT, device=device)

    def add(self, features: torch.Tensor):
        """Add the rows of (n, d) features."""
        rows = check_features(features, least=1)
        mean = rows.mean(0)
        centred = rows - mean
        self.scatter.addmm_(centred.T, centred)
        self._shift(len(rows), mean)

    def merge(self, other: "Moments"):
        """Add all rows of `other`."""
        if other.n:
            self.scatter += other.scatter
            self._shift(other.n, other.mean)

    def _shift(self, n: int, mean: torch.Tensor):
        total, delta = self.n + n, mean - self.mean
        self.scatter.addr_(delta, delta, alpha=self.n * n / total)
        self.mean += delta * (n / total)
        self.n = total

    def scatter_about(self, centre: torch.Tensor) -> torch.Tensor:
        """Return sum_i (x_i - centre)(x_i - centre)^T, (d, d), for a centre (d,)."""
        return torch.addr(self.scatter, self.mean - centre, self.mean - centre, alpha=self.n)

    def gaussian(self) -> Gaussian:
        """Return mean and unbiased covariance. Raises ValueError if there are fewer than 2 rows."""
        if self.n < 2:
            raise ValueError(f"Found features of {self.n} images, expected at least 2 for a covariance: add images.")
        return Gaussian(self.n, self.mean, self.scatter / (self.n - 1))


# ---- Frechet distance ----------------------------------------------------------------------------
# A distribution is a pair (mean (d,), root (d, r)); root root^T is its covariance.

Distribution = tuple[torch.Tensor, torch.Tensor]


def gaussian_root(gaussian: Gaussian) -> Distribution:
    """Return (mean (d,), root (d, d)) from a symmetric eigendecomposition; eigenvalues at rounding level become 0.

    Raises ValueError if the shapes do not match or a value is non-finite.
    """
    mean, covariance = gaussian.mean.to(FLOAT), gaussian.covariance.to(FLOAT)
    if covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"A covariance has the shape {tuple(covariance.shape)}, expected ({len(mean)}, {len(mean)}) as its mean has."
        )
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise ValueError("A mean or covariance is non-finite, expected finite values: compute the statistics again.")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    noise = len(values) * torch.finfo(FLOAT).eps * values.abs().max()
    return mean, vectors * torch.where(values > noise, values, 0).sqrt()


def features_root(features: torch.Tensor) -> Distribution:
    """Return (mean (d,), root (d, min(n, d))) of (n, d) features; the root is exact for any n and d.

    The root is the transpose of the centred rows over sqrt(n - 1), or of their R factor if n > d.
    """
    rows = check_features(features)
    mean = rows.mean(0)
    root = (rows - mean) / (len(rows) - 1) ** 0.5
    if len(rows) > rows.shape[1]:
        root = torch.linalg.qr(root, mode="r").R  # X = Q R has X^T X = R^T R
    return mean, root.T


def frechet_distance(a: Distribution, b: Distribution) -> float:
    """Return the squared Frechet distance of two Gaussians (Dowson & Landau 1982), at least 0.

    a, b: (mean (d,), root (d, r)). On Inception features this is FID (arXiv 1706.08500).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2. The last trace equals the nuclear norm of R1^T R2, the sum
    of its singular values, so no matrix product needs a square root and covariances may be singular.

    Raises ValueError if the dimensions differ or the distance overflows float64.
    """
    (mean1, root1), (mean2, root2) = a, b
    if mean1.shape != mean2.shape:
        raise ValueError(
            f"Features have {len(mean1)} and {len(mean2)} dimensions, expected the same for both sets: use one network."
        )
    overlap = torch.linalg.svdvals(root1.T @ root2).sum()
    distance = (mean1 - mean2).square().sum() + root1.square().sum() + root2.square().sum() - 2 * overlap
    if not torch.isfinite(distance):
        raise ValueError("The Frechet distance overflows float64, expected features of moderate size: scale them down.")
    return max(0.0, distance.item())  # rounding may leave -1e-13 for equal sets


# ---- kernel distance -----------------------------------------------------------------------------

KID_SUBSETS, KID_SIZE = 100, 1000


def kid_size(n: int, m: int) -> int:
    """Return the subset size: 1,000 as in the literature, or half of the smaller set if that has fewer images."""
    return KID_SIZE if min(n, m) >= KID_SIZE else max(2, min(n, m) // 2)


def kid(
    real: torch.Tensor, fake: torch.Tensor, subsets: int = KID_SUBSETS, size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Return the kernel inception distance (arXiv 1801.01401): mean and standard deviation over random subsets.

    It is the unbiased squared MMD under the kernel (x.y / d + 1)^3. torch-fidelity draws the same subsets for this seed
    if `fake` is its first input.

    real, fake: features (n, d) and (m, d)
    size: images per subset, default `kid_size(n, m)`

    Raises ValueError if a set has fewer than 2 images, `size` is outside 2 to min(n, m), or the distance overflows float64.
    """
    real, fake = check_features(real), check_features(fake)
    size = size or kid_size(len(real), len(fake))
    if not 2 <= size <= min(len(real), len(fake)):
        raise ValueError(
            f"The KID subsets have {size} images, expected 2 to {min(len(real), len(fake))}: choose another size."
        )
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        y = fake[draw.choice(len(fake), size, replace=False)]
        x = real[draw.choice(len(real), size, replace=False)]
        within = sum(k.sum() - k.diagonal().sum() for k in (polynomial_kernel(x, x), polynomial_kernel(y, y)))
        values.append((within / (size * (size - 1)) - 2 * polynomial_kernel(x, y).mean()).item())
    with np.errstate(over="ignore", invalid="ignore"):  # refused below
        mean, std = float(np.mean(values)), float(np.std(values))
    if not (np.isfinite(mean) and np.isfinite(std)):
        raise ValueError("The kernel distance overflows float64, expected features of moderate size: scale them down.")
    return mean, std


def polynomial_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return (x_i . y_j / d + 1)^3, (n, m), for rows x (n, d) and y (m, d)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


# ---- Inception score -----------------------------------------------------------------------------


def score_splits(n: int, seed: int = 0, splits: int = 10) -> np.ndarray:
    """Return each image's split for the Inception score, int64 (n,) in [0, min(splits, n)).

    torch-fidelity draws the same splits for this seed.
    """
    splits, split = min(splits, n), np.empty(n, dtype=np.int64)
    order = np.random.RandomState(seed).permutation(n)
    for i in range(splits):
        split[order[i * n // splits : (i + 1) * n // splits]] = i
    return split


def score_sums(logits: torch.Tensor, split: np.ndarray, splits: int) -> torch.Tensor:
    """Return the sums over each split's images that the Inception score needs, (splits, classes + 2); they add over batches.

    The columns are the sum of p (one per class), the sum of p.log p, and the number of images.

    logits: (n, classes)
    split: (n,) in [0, splits)
    """
    log_p = check_features(logits, least=1).log_softmax(1)
    p = log_p.exp()
    columns = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], dim=1)
    sums = torch.zeros(splits, columns.shape[1], dtype=FLOAT, device=p.device)
    return sums.index_add_(0, torch.as_tensor(split, device=p.device), columns)


def inception_score(sums: torch.Tensor) -> tuple[float, float]:
    """Return exp(mean KL(p || mean p)) (arXiv 1606.03498): mean and standard deviation over the splits of `score_sums`."""
    p, entropy, n = sums[:, :-2] / sums[:, -1:], sums[:, -2], sums[:, -1]
    scores = (entropy / n - torch.xlogy(p, p).sum(1)).exp()
    return scores.mean().item(), scores.std(correction=0).item()


# ---- diversity -----------------------------------------------------------------------------------
# LPIPS has non-negative weights, so it is a squared distance |f_i - f_j|^2 of stacked features. Means over pairs of images
# then need only n, sum |f_i|^2 and the Gram matrix of the feature sums.


def mean_over_pairs(n: torch.Tensor, squares: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return the mean of |f_i - f_j|^2 over the n (n - 1) / 2 pairs of each set of images; NaN if n < 2.

    n, squares, total: one entry per set, of any shape; squares = sum |f_i|^2 and total = |sum f_i|^2
    """
    return torch.where(n > 1, (n * squares - total) / (n * (n - 1) / 2), torch.nan)


def mean_over_weighted_pairs(
    n: torch.Tensor, squares: torch.Tensor, gram: torch.Tensor, weights: torch.Tensor, cross: float = 1.0
) -> torch.Tensor:
    """Return R means of |f_i - f_j|^2 over all pairs of images, with block b of the images taken weights[r, b] times; (R,).

    Copies of a block are not paired with each other. Weights of 1 give the mean over all pairs.

    n, squares: (B,) images and sum |f_i|^2 of each block
    gram: (B, B) inner products of the blocks' feature sums
    weights: (R, B)
    cross: factor of the pairs between blocks
    """
    distance = n[:, None] * squares + squares[:, None] * n - 2 * gram
    pairs = n[:, None] * n
    inner = n * squares - gram.diagonal(), n * (n - 1) / 2
    sums = []
    for outer, own in zip((distance, pairs), inner):
        outer = cross * (outer - torch.diag(outer.diagonal()))
        sums.append((weights @ outer * weights).sum(1) / 2 + weights @ own)
    return sums[0] / sums[1]


def bootstrap_weights(units: int, seed: int = 0, replicates: int = 1000) -> torch.Tensor:
    """Return how often each unit is drawn in `units` draws with replacement, float64 (replicates, units)."""
    draws = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=replicates)
    return torch.from_numpy(draws).to(FLOAT)


def percentile_interval(values: torch.Tensor, level: float = 0.95, units: int | None = None) -> list[float] | None:
    """Return the percentile interval [low, high] of bootstrapped values (Efron 1979); None if no value is finite.

    units: number of resampled units; if given, the interval is expanded for few of them (Hesterberg, "What teachers should
           know about the bootstrap", 2015): the normal quantile is sqrt(units / (units - 1)) times Student's
    """
    values = values[torch.isfinite(values)]
    if len(values) == 0:
        return None
    tail = (1 - level) / 2
    if units is not None:
        tail = stats.norm.cdf((units / (units - 1)) ** 0.5 * stats.t.ppf(tail, units - 1)).item()
    return torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
