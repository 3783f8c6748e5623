"""The figures of generated images against real ones, overall and by superclass, from what was measured of both.

A side is what `measure` returns, or saved statistics, of which only some figures can be had: the others are None.
"""

import numpy as np
import torch

from evaluation.metrics import (
    Gaussian,
    Moments,
    features_root,
    frechet_distance,
    gaussian_root,
    inception_score,
    interval,
    kid,
    kid_size,
    mean_over_pairs,
    mean_over_weighted_pairs,
    precision_recall,
    resamples,
)

NEIGHBOURS = 3  # of precision and recall
FEW_IMAGES = 2048  # images, below which a covariance of Inception features is singular and FID is mostly its own bias


class MeasuredSet:
    """A side of the comparison that was measured; groups are superclasses s, or None for all images."""

    def __init__(self, measured, device):
        self.plan, self.measured, self.device = measured.plan, measured, device
        self.digests, self.seconds = measured.digests, measured.seconds
        self.kept = "all" if self.plan.kept.all() else "sample"

    def n(self, s):
        return int(self.rows(s).sum())

    def rows(self, s, part=None):
        """Which images (N,) are of the group, and of one half."""
        plan = self.plan
        return ((plan.superclass == s) | (s is None)) & ((plan.part == part) | (part is None))

    def gaussian(self, name, s, part=None):
        """None with fewer than 2 images."""
        total = None
        for (group, half), moments in self.measured.moments[name].items():
            if s in (None, group) and part in (None, half):
                total = total or Moments(len(moments.mean), moments.mean.device)
                total.merge(moments)
        if total is None or total.n < 2:
            return None
        found = total.gaussian()
        return Gaussian(found.n, found.mean.cpu(), found.covariance.cpu())

    def distribution(self, name, s, part=None):
        """(mean, root) for the Frechet distance, from the features where they are fewer than their numbers."""
        rows, features = self.rows(s, part), self.measured.features[name]
        if rows.sum() < 2:
            return None
        if self.plan.kept[rows].all() and rows.sum() < features.shape[1]:
            return features_root(features[rows[self.plan.kept]])
        return gaussian_root(self.gaussian(name, s, part))

    def sample(self, name, s=None, most=False):
        """Kept features, all of a random sample where not all are kept or `most` of it are asked for."""
        rows = self.rows(s) & self.plan.kept
        if s is None and (most or not rows.all()):
            rows &= self.plan.sampled
        return self.measured.features[name][rows[self.plan.kept]].to(self.device)

    def score(self):
        """Inception score: (mean, deviation) or None."""
        return next(map(inception_score, self.measured.score.values()), None)

    def accuracy(self, s):
        """Shares of images read as the right class, as the right superclass; or None."""
        right = self.measured.right
        return None if right is None else (right[:, slice(s, None if s is None else s + 1)].sum(1) / self.n(s)).tolist()

    def diversity(self, s, seed):
        """LPIPS within a class and pooled, with intervals; {} where it was left out."""
        return diversity(self.measured.diversity, self.plan, s, seed) if self.measured.diversity else {}


class Saved:
    """A side of which there are only statistics, of the features of `network` (name). `names`: of the superclasses s;
    `lpips`: the record of the LPIPS that is asked for."""

    digests = seconds = kept = None

    def __init__(self, statistics, names, network, lpips):
        self.statistics, self.names, self.network, self.lpips = statistics, names, network, lpips

    def saved(self, s):
        return self.statistics.gaussians[None if s is None else self.names[s]]

    def n(self, s):
        return self.saved(s).n

    def distribution(self, name, s, part=None):
        gaussian = self.saved(s)
        return gaussian_root(gaussian) if name == self.network and part is None and gaussian.n not in (0, 1) else None

    def sample(self, name, s=None, most=False):
        return None

    def score(self):
        return None

    def accuracy(self, s):
        return None

    def diversity(self, s, seed):
        """As measured when the statistics were saved, if it was with the same network."""
        saved = self.statistics.record.get("lpips")
        if not saved or saved["network"] != self.lpips:
            return {}
        return saved["overall"] if s is None else saved["superclasses"][self.names[s]]


# ---- diversity -----------------------------------------------------------------------------------


def diversity(sums, plan, s=None, seed=0):
    """Mean LPIPS over the pairs of images of a class, mean over classes; the same over all pairs of the group.

    Intervals are bootstrapped, over the classes, and for the pooled figure over blocks of them.
    """
    classes = np.array((plan.block >= 0) & ((plan.parents == s) | (s is None)))
    n, squares, total = sums["classes"][classes].T
    within = mean_over_pairs(n, squares, total)
    within = within[torch.isfinite(within)]  # a class with one image has no pairs
    found = {"lpips": None, "lpips_interval": None, "lpips_classes": len(within)}
    if len(within):
        found["lpips"] = within.mean().item()
    if len(within) > 1:
        found["lpips_interval"] = interval(resamples(len(within), seed) @ within / len(within))
    blocks, of = np.unique(plan.block[classes], return_inverse=True)
    by_block = [torch.zeros(len(blocks), dtype=n.dtype).index_add_(0, torch.from_numpy(of), x) for x in (n, squares)]
    gram = sums["gram"][blocks][:, blocks]
    pooled = mean_over_weighted_pairs(*by_block, gram, torch.ones(1, len(blocks), dtype=n.dtype))
    found["lpips_pooled"] = pooled.item() if torch.isfinite(pooled) else None
    several = len(blocks) > 1
    weights = resamples(len(blocks), seed) if several else None
    found["lpips_pooled_interval"] = interval(mean_over_weighted_pairs(*by_block, gram, weights)) if several else None
    return found


# ---- the figures of a group ----------------------------------------------------------------------


def distances(real, fake, name, s, seed, floor):
    """Frechet and kernel distance of one network's features; `floor`: the Frechet distance of two halves of the real ones."""
    a, b = real.distribution(name, s), fake.distribution(name, s)
    found = {"fd": frechet_distance(a, b) if a and b else None, "kid": None, "kid_std": None, "kid_size": None}
    x, y = real.sample(name, s), fake.sample(name, s)
    if x is not None and y is not None and min(len(x), len(y)) > 1:
        found["kid"], found["kid_std"] = kid(x, y, seed=seed)
        found["kid_size"] = kid_size(len(x), len(y))
    if floor:
        halves = [real.distribution(name, s, part) for part in (0, 1)]
        found["floor"] = frechet_distance(*halves) if all(halves) else None
        found["floor_n"] = int(real.rows(s, 0).sum())
    return found


def metrics_of(real, fake, networks, s=None, seed=0, floor=False):
    """The figures of superclass s, or of all images: "fid" and "kid" of Inception's features, those of the others under
    "features"."""
    row = {"n_real": real.n(s), "n_fake": fake.n(s)}
    for network in networks.features:
        found = distances(real, fake, network.name, s, seed, floor)
        if network.name == "inception":
            row |= {"fid": found.pop("fd"), **found}
        else:
            row.setdefault("features", {})[network.name] = found
    if networks.lpips:
        row |= fake.diversity(s, seed) | {f"{key}_real": value for key, value in real.diversity(s, seed).items()}
    for key, side in {"": fake, "_real": real}.items():
        if networks.classifier and side.accuracy(s):
            row[f"top1{key}"], row[f"superclass_accuracy{key}"] = side.accuracy(s)
    return row


def overall_metrics(real, fake, networks):
    """The figures that are only given overall: precision and recall of the first network, Inception score."""
    row = {}
    for network in networks.features[:1]:
        x, y = real.sample(network.name, most=True), fake.sample(network.name, most=True)
        if x is not None and y is not None and min(len(x), len(y)) > NEIGHBOURS:
            row["precision"], row["recall"] = precision_recall(x, y, NEIGHBOURS)
    for key, side in {"": fake, "_real": real}.items():
        if side.score():
            row[f"inception_score{key}"], row[f"inception_score_std{key}"] = side.score()
    return row
