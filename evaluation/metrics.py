"""Figures for sets of images, computed from features: formulas only, no images and no networks.

Features are (n, d) tensors, a row per image, of any float type; everything is computed in float64. What is impossible
or not finite is a ValueError, before it reaches an eigenvalue solver.
"""

from typing import NamedTuple

import numpy as np
import torch

FLOAT = torch.float64


def check_features(features, least=2):
    """Features as float64; ValueError if they are not (n, d), fewer than `least` rows, or not finite."""
    if features.ndim != 2:
        raise ValueError(f"Features have the shape {tuple(features.shape)}, expected (images, numbers): reshape them.")
    if len(features) < least:
        raise ValueError(f"There are features of {len(features)} images, expected at least {least}: add images.")
    if not torch.isfinite(features).all():
        row = int((~torch.isfinite(features).all(1)).nonzero()[0])
        raise ValueError(f"The features of image {row} are not finite, expected numbers: leave it out.")
    return features.to(FLOAT)


# ---- mean and covariance -------------------------------------------------------------------------


class Gaussian(NamedTuple):
    """n images (None: unknown), mean (d,) and covariance (d, d), which is the unbiased one."""

    n: int | None
    mean: torch.Tensor
    covariance: torch.Tensor


class Moments:
    """n, mean (d,) and scatter (d, d) = sum_i (x_i - mean)(x_i - mean)^T of the rows seen so far.

    Merged by the pairwise update of Chan, Golub & LeVeque (1983), which does not cancel as sums of squares do.
    """

    def __init__(self, dim, device="cpu"):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=FLOAT, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=FLOAT, device=device)

    def add(self, features):
        """Take in the rows of (n, d) features."""
        rows = check_features(features, least=1)
        mean = rows.mean(0)
        centred = rows - mean
        self.scatter.addmm_(centred.T, centred)
        self._shift(len(rows), mean)

    def merge(self, other):
        """Take in all that `other` has seen."""
        if other.n:
            self.scatter += other.scatter
            self._shift(other.n, other.mean)

    def _shift(self, n, mean):
        total, delta = self.n + n, mean - self.mean
        self.scatter.addr_(delta, delta, alpha=self.n * n / total)
        self.mean += delta * (n / total)
        self.n = total

    def sums_about(self, centre):
        """sum_i (x_i - centre)(x_i - centre)^T"""
        return torch.addr(self.scatter, self.mean - centre, self.mean - centre, alpha=self.n)

    def gaussian(self):
        if self.n < 2:
            raise ValueError(f"There are features of {self.n} images, expected at least 2: a covariance needs them.")
        return Gaussian(self.n, self.mean, self.scatter / (self.n - 1))


# ---- Frechet distance ----------------------------------------------------------------------------
# A distribution is (mean (d,), root (d, r)) with root root^T = its covariance.


def gaussian_root(gaussian):
    """(mean, root) of a `Gaussian`, by the symmetric eigendecomposition; eigenvalues that are rounding become 0."""
    mean, covariance = gaussian.mean.to(FLOAT), gaussian.covariance.to(FLOAT)
    if covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"A covariance is {tuple(covariance.shape)} for a mean of {len(mean)} numbers, expected d x d."
        )
    if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise ValueError("A mean or covariance is not finite, expected numbers: compute the statistics again.")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    noise = len(values) * torch.finfo(FLOAT).eps * values.abs().max()
    return mean, vectors * torch.where(values > noise, values, 0).sqrt()


def features_root(features):
    """(mean, root) of (n, d) features: the centred rows themselves over sqrt(n - 1), exact for any n and d."""
    rows = check_features(features)
    mean = rows.mean(0)
    root = (rows - mean) / (len(rows) - 1) ** 0.5
    if len(rows) > rows.shape[1]:
        root = torch.linalg.qr(root, mode="r").R  # X = Q R has X^T X = R^T R
    return mean, root.T


def frechet_distance(a, b):
    """Squared Frechet distance of two Gaussians (Dowson & Landau 1982), each (mean, root); of Inception features FID
    (arXiv 1706.08500).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2, where the last trace is the sum of the singular values of
    R1^T R2, its nuclear norm: no root of a matrix product is taken, and a singular covariance is as good as another.
    """
    (mean1, root1), (mean2, root2) = a, b
    if mean1.shape != mean2.shape:
        raise ValueError(
            f"Features have {len(mean1)} and {len(mean2)} numbers, expected as many on both sides: use one network."
        )
    overlap = torch.linalg.svdvals(root1.T @ root2).sum()
    distance = (mean1 - mean2).square().sum() + root1.square().sum() + root2.square().sum() - 2 * overlap
    if not torch.isfinite(distance):
        raise ValueError(
            "The Frechet distance is too large for a float64, expected features of moderate size: scale them."
        )
    return max(0.0, distance.item())  # of equal sets, rounding may leave -1e-13


# ---- kernel distance, precision and recall -------------------------------------------------------

KID_SUBSETS, KID_SIZE = 100, 1000


def kid_size(n, m):
    """Images in a subset: 1,000 as in the literature, or half of the smaller side where one has fewer."""
    return KID_SIZE if min(n, m) >= KID_SIZE else max(2, min(n, m) // 2)


def kid(real, fake, subsets=KID_SUBSETS, size=None, seed=0):
    """Kernel inception distance (arXiv 1801.01401): mean and standard deviation over random subsets.

    The unbiased squared MMD under the kernel (x.y / d + 1)^3. The subsets are torch-fidelity's for this seed, with
    `fake` as its first input.
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
    return float(np.mean(values)), float(np.std(values))


def polynomial_kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(real, fake, k=3, chunk=1000):
    """Improved precision and recall (arXiv 1904.06991): the share of fake rows that lie within the distance of a real
    row to its k-th nearest real neighbour, and the same with the sides changed."""
    real, fake = check_features(real, least=k + 1), check_features(fake, least=k + 1)
    centre = real.mean(0)
    real, fake = real - centre, fake - centre
    radii = [
        torch.cat([squared_distances(part, x).kthvalue(k + 1).values for part in x.split(chunk)]) for x in (real, fake)
    ]
    shares = []
    for x, y, radius in ((fake, real, radii[0]), (real, fake, radii[1])):
        inside = [(squared_distances(part, y) <= radius).any(1) for part in x.split(chunk)]
        shares.append(torch.cat(inside).double().mean().item())
    return tuple(shares)


def squared_distances(x, y):
    """|x_i - y_j|^2 (n, m), exactly 0 for equal rows."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    distance = norms - 2 * x @ y.T
    return torch.where(distance > 1e-12 * norms, distance, 0)


# ---- Inception score -----------------------------------------------------------------------------


def score_splits(n, seed=0, splits=10):
    """The split (n,) of each image for the Inception score: torch-fidelity's for this seed, fewer where n is less."""
    splits, split = min(splits, n), np.empty(n, dtype=np.int64)
    order = np.random.RandomState(seed).permutation(n)
    for i in range(splits):
        split[order[i * n // splits : (i + 1) * n // splits]] = i
    return split


def score_sums(logits, split, splits):
    """Sums (splits, classes + 2) over the images of each split: p, p.log p, and their number. They add over batches."""
    log_p = check_features(logits, least=1).log_softmax(1)
    p = log_p.exp()
    columns = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], dim=1)
    sums = torch.zeros(splits, columns.shape[1], dtype=FLOAT, device=p.device)
    return sums.index_add_(0, torch.as_tensor(split, device=p.device), columns)


def inception_score(sums):
    """exp(mean KL(p || mean p)) (arXiv 1606.03498): mean and standard deviation over the splits."""
    p, entropy, n = sums[:, :-2] / sums[:, -1:], sums[:, -2], sums[:, -1]
    scores = (entropy / n - torch.xlogy(p, p).sum(1)).exp()
    return scores.mean().item(), scores.std(correction=0).item()


# ---- diversity -----------------------------------------------------------------------------------
# LPIPS with weights that are not negative is a squared distance |f_i - f_j|^2 of stacked features, so that the mean
# over pairs needs of a set of images only n, sum |f_i|^2 and the Gram matrix of its sums of features.


def mean_over_pairs(n, squares, total):
    """Mean |f_i - f_j|^2 over the n (n - 1) / 2 pairs: squares = sum |f_i|^2, total = |sum f_i|^2. NaN where n < 2."""
    return torch.where(n > 1, (n * squares - total) / (n * (n - 1) / 2), torch.nan)


def mean_over_weighted_pairs(n, squares, gram, weights):
    """Mean |f_i - f_j|^2 over the pairs of images in B blocks, block b taken weights[r, b] times; (R,).

    n, squares (B,): images and sum |f_i|^2 of each block; gram (B, B): products of the blocks' sums of f. Copies of a
    block are not paired with each other. Weights of 1 give the mean over all pairs.
    """
    distance = n[:, None] * squares + squares[:, None] * n - 2 * gram
    pairs = n[:, None] * n
    inner = n * squares - gram.diagonal(), n * (n - 1) / 2
    sums = []
    for outer, own in zip((distance, pairs), inner):
        outer = outer - torch.diag(outer.diagonal())
        sums.append((weights @ outer * weights).sum(1) / 2 + weights @ own)
    return sums[0] / sums[1]


def resamples(units, seed=0, replicates=1000):
    """Weights (replicates, units): how often each unit is drawn in `units` draws with replacement."""
    draws = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=replicates)
    return torch.from_numpy(draws).to(FLOAT)


def interval(values, level=0.95):
    """The percentile interval [low, high] of bootstrapped values (Efron 1979), None if there are none."""
    values = values[torch.isfinite(values)]
    if len(values) == 0:
        return None
    tail = (1 - level) / 2
    return torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
