"""The metrics of generated images against real ones, overall and by superclass.

A set is a `MeasuredSet`, whose images went through the networks, or a `SavedSet`, which has statistics only. Both have
the same methods; those that a `SavedSet` cannot answer return None, and so do the metrics that need them. A group s is a
superclass, or None for all images.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from evaluation.diversity import lpips_diversity
from evaluation.image_pass import PassResult
from evaluation.metrics import (
    Distribution,
    Gaussian,
    Moments,
    features_root,
    frechet_distance,
    gaussian_root,
    inception_score,
    kid,
    kid_size,
)
from evaluation.neighbours import DENSITY_K, PRECISION_K, neighbourhoods, subset
from evaluation.networks import Networks
from evaluation.plan import PER_SUPERCLASS
from evaluation.ranks import Rank, rank_metrics
from evaluation.saved_statistics import Statistics
from runtime.progress import progress_bar

LEAST_EQUAL = 40  # images of a superclass for its recall, density and coverage
CHUNK = 4096  # features that are converted to float64 at a time


class MeasuredSet:
    """A set of images after its pass through the networks.

    digests     (N,) of the pixels
    seconds     see `PassResult`
    kept        "all" or "sample": the images whose features are kept

    size: pixels per side of the images
    device: for KID, precision and recall
    """

    def __init__(self, result: PassResult, size: int, device: torch.device):
        self.result, self.plan, self.size, self.device = result, result.plan, size, device
        self.digests, self.seconds = result.digests, result.seconds
        self.kept = "all" if self.plan.kept.all() else "sample"

    def pixels(self) -> str:
        """Return a SHA-256 (hex) of the pixels of all images, whatever their order."""
        return hashlib.sha256(np.sort(self.digests).tobytes()).hexdigest()

    def n(self, s: int | None) -> int:
        """Return the number of images."""
        return int(self.rows(s).sum())

    def rows(self, s: int | None, half: int | None = None) -> np.ndarray:
        """Return which images belong to the group, and to one half of it if given; bool (N,)."""
        plan = self.plan
        return ((plan.superclass == s) | (s is None)) & ((plan.half == half) | (half is None))

    def gaussian(self, name: str, s: int | None, half: int | None = None) -> Gaussian | None:
        """Return mean and covariance of the features `name`, see `image_pass.moments_name`; None with fewer than 2 images."""
        moments = self.result.moments[name]
        sums = [
            m for group, m in moments.items() if group is None or s in (None, group[0]) and half in (None, group[1])
        ]
        features = None
        if None not in moments:  # groups without moments have the features of all their images
            rows = self.rows(s, half)
            for group in moments:
                rows &= ~self.rows(*group)
            features = self.result.features[name][rows[self.plan.kept]]
        total = Moments(len(sums[0].mean) if sums else features.shape[1], self.device)
        for part in sums:
            total.merge(part)
        for part in features.split(CHUNK) if features is not None and len(features) else ():
            total.add(part.to(self.device))
        if total.n < 2:
            return None
        gaussian = total.gaussian()
        return Gaussian(gaussian.n, gaussian.mean.cpu(), gaussian.covariance.cpu())

    def distribution(self, network: str, s: int | None, half: int | None = None) -> Distribution | None:
        """Return (mean, root) for the Frechet distance; None with fewer than 2 images.

        The root comes from the features themselves if all are kept and there are fewer images than dimensions.
        """
        rows, features = self.rows(s, half), self.result.features[network]
        if rows.sum() < 2:
            return None
        if self.plan.kept[rows].all() and rows.sum() < features.shape[1]:
            return features_root(features[rows[self.plan.kept]])
        return gaussian_root(self.gaussian(network, s, half))

    def sample(self, network: str, s: int | None = None, limit: bool = False) -> torch.Tensor:
        """Return kept features (n, d) of the group.

        limit: for all images, at most `plan.SAMPLE` rows even if more are kept
        """
        rows = self.rows(s) & self.plan.kept
        if s is None and (limit or not rows.all()):
            rows &= self.plan.sampled
        return self.result.features[network][rows[self.plan.kept]].to(self.device)

    def width(self, network: str) -> int:
        """Return the number of features per image."""
        return self.result.features[network].shape[1]

    def score(self) -> tuple[float, float] | None:
        """Return the Inception score of all images, mean and standard deviation; None without Inception."""
        return next(map(inception_score, self.result.score.values()), None)

    def accuracy(self, s: int | None) -> list[float] | None:
        """Return the shares of images classified as the right class and the right superclass; None without a classifier."""
        parents, found = self.plan.parents, self.predictions(s)
        if found is None:
            return None
        labels, best = found[0], found[1][:, 0]
        in_superclass = (best >= 0) & (parents[np.maximum(best, 0)] == parents[labels])
        return [(best == labels).mean().item(), in_superclass.mean().item()]

    def predictions(self, s: int | None) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the labels (n,) of the group's images, and the classes that the classifier finds, `PassResult.predicted`.

        None without a classifier or images.
        """
        rows, found = self.rows(s), self.result.predicted
        return None if found is None or not rows.any() else (self.plan.labels[rows], found[rows])

    def diversity(self, s: int | None, seed: int) -> dict:
        """Return the metrics of `lpips_diversity`; {} without LPIPS."""
        return lpips_diversity(self.result.diversity, self.plan, s, seed) if self.result.diversity else {}


class SavedSet:
    """A set of which only saved statistics are available.

    superclasses: their names, None without a hierarchy
    network: name of the network of the statistics
    lpips: `Network.record` of this comparison's LPIPS, None without LPIPS
    """

    digests = seconds = kept = None

    def __init__(self, statistics: Statistics, superclasses: tuple[str, ...] | None, network: str, lpips: dict | None):
        self.statistics, self.superclasses, self.network, self.lpips = statistics, superclasses, network, lpips

    def gaussian(self, s: int | None) -> Gaussian:
        """Return the saved mean and covariance."""
        return self.statistics.gaussians[None if s is None else self.superclasses[s]]

    def pixels(self) -> str | None:
        """Return `MeasuredSet.pixels` of the images that the statistics were made of, None if unknown."""
        return self.statistics.record.get("pixels")

    def n(self, s: int | None) -> int | None:
        """Return the number of images, None if unknown."""
        return self.gaussian(s).n

    def distribution(self, network: str, s: int | None, half: int | None = None) -> Distribution | None:
        """Return (mean, root); None for halves, other networks, or fewer than 2 images."""
        if network != self.network or half is not None or self.n(s) in (0, 1):
            return None
        return gaussian_root(self.gaussian(s))

    def sample(self, network: str, s: int | None = None, limit: bool = False) -> None:
        """Return None: there are no features."""

    def width(self, network: str) -> int:
        """Return the number of features per image."""
        return len(self.gaussian(None).mean)

    def score(self) -> None:
        """Return None: there are no logits."""

    def accuracy(self, s: int | None) -> None:
        """Return None: there are no predictions."""

    def predictions(self, s: int | None) -> None:
        """Return None: there are no predictions."""

    def diversity(self, s: int | None, seed: int) -> dict:
        """Return the LPIPS metrics saved with the statistics; {} if they are of another network or absent."""
        saved = self.statistics.record.get("lpips")
        if not saved or saved["network"] != self.lpips:
            return {}
        return saved["overall"] if s is None else saved["superclasses"][self.superclasses[s]]


# ---- metrics -------------------------------------------------------------------------------------

ComparedSet = MeasuredSet | SavedSet


@dataclass(frozen=True)
class Floor:
    """The distance between two sets of real images, below which no model comes except by chance.

    second: a second set of real images, as large as FAKE; if None, the two halves of REAL are compared, and FAKE also at
            their size
    """

    second: MeasuredSet | None = None

    def metrics(
        self, real: ComparedSet, fake: ComparedSet, network: str, s: int | None
    ) -> dict[str, float | int | None]:
        """Return "floor", its number of images "floor_n", and for halves FAKE's distance at this number, "fd_at_floor_n"."""
        if self.second:
            return {
                "floor": distance_of(real.distribution(network, s), self.second.distribution(network, s)),
                "floor_n": self.second.n(s),
            }
        halves = [real.distribution(network, s, half) for half in (0, 1)]
        part = fake.distribution(network, s, 0)
        return {
            "floor": distance_of(*halves),
            "floor_n": int(real.rows(s, 0).sum()),
            "fd_at_floor_n": distance_of(halves[0], part),
        }


def distance_of(a: Distribution | None, b: Distribution | None) -> float | None:
    """Return the Frechet distance, None if a distribution is unknown."""
    return frechet_distance(a, b) if a and b else None


def distances(
    real: ComparedSet, fake: ComparedSet, network: str, s: int | None, seed: int, floor: Floor | None
) -> dict[str, float | int | None]:
    """Return Frechet distance "fd" and "kid" of one network's features, and the metrics of `floor` if given."""
    row = {"fd": distance_of(real.distribution(network, s), fake.distribution(network, s))}
    row |= {"kid": None, "kid_std": None, "kid_size": None}
    x, y = real.sample(network, s), fake.sample(network, s)
    if x is not None and y is not None and min(len(x), len(y)) > 1:
        row["kid"], row["kid_std"] = kid(x, y, seed=seed)
        row["kid_size"] = kid_size(len(x), len(y))
    return row | (floor.metrics(real, fake, network, s) if floor else {})


def group_metrics(
    real: ComparedSet,
    fake: ComparedSet,
    networks: Networks,
    s: int | None = None,
    seed: int = 0,
    floor: Floor | None = None,
    ranks: Sequence[Rank] = (),
) -> dict:
    """Return the metrics of superclass s, or of all images if None.

    "fid" and "kid" are of Inception's features; those of other networks are under "features". "ranks" are the
    `ranks.rank_metrics` for the classifier.
    """
    row = {"n_real": real.n(s), "n_fake": fake.n(s)}
    for network in networks.features:
        values = distances(real, fake, network.name, s, seed, floor)
        if network.name == "inception":
            row |= {key.replace("fd", "fid"): value for key, value in values.items()}
        else:
            row.setdefault("features", {})[network.name] = values
    if networks.lpips:
        row |= fake.diversity(s, seed) | {f"{key}_real": value for key, value in real.diversity(s, seed).items()}
    for suffix, each in {"": fake, "_real": real}.items():
        if networks.classifier and each.accuracy(s):
            row[f"top1{suffix}"], row[f"superclass_accuracy{suffix}"] = each.accuracy(s)
            labels, found = each.predictions(s)
            row |= {f"ranks{suffix}": rank_metrics(ranks, labels, found[:, 0])} if ranks else {}
    return row


def overall_metrics(real: ComparedSet, fake: ComparedSet, networks: Networks) -> dict[str, float | str]:
    """Return the metrics that exist only overall: precision to coverage of the first network, and the Inception score."""
    row = {}
    for network in networks.features[:1]:
        x, y = real.sample(network.name, limit=True), fake.sample(network.name, limit=True)
        if x is not None and y is not None and min(len(x), len(y)) > PRECISION_K:
            row |= neighbourhoods(x, y, density_k=min(DENSITY_K, len(x) - 1))._asdict()
            if len(x) <= DENSITY_K:
                del row["density"], row["coverage"]
            row["precision_network"] = network.name
    for suffix, each in {"": fake, "_real": real}.items():
        if each.score():
            row[f"inception_score{suffix}"], row[f"inception_score_std{suffix}"] = each.score()
    return row


def equal_size_metrics(
    real: ComparedSet, fake: ComparedSet, network: str, groups: Sequence[int], seed: int, second: MeasuredSet | None
) -> dict[int, dict]:
    """Return {superclass: precision, recall, density and coverage} of random images, equally many in all superclasses.

    So they can be compared across superclasses; with more images, recall and coverage would be other ones. Superclasses
    with fewer than LEAST_EQUAL images whose features are kept are left out.

    groups: superclasses
    second: second real set of the floor, which gives the "floor" of each superclass that it has enough images of
    """
    sets = {s: (real.sample(network, s), fake.sample(network, s)) for s in groups}
    sets = {s: both for s, both in sets.items() if all(x is not None and len(x) >= LEAST_EQUAL for x in both)}
    n = min([PER_SUPERCLASS, *(len(x) for both in sets.values() for x in both)])
    rows = {}
    for s, both in progress_bar(sets.items(), desc="neighbours", unit="row", leave=False):
        x, y = (subset(x, n, seed) for x in both)
        rows[s] = {"n": n} | neighbourhoods(x, y)._asdict()
        other = second and second.sample(network, s)
        if other is not None and len(other) >= n:
            rows[s]["floor"] = neighbourhoods(x, subset(other, n, seed))._asdict()
    return rows
