"""The interval of the pooled LPIPS covers the truth, or is left out."""

import numpy as np
import torch

from evaluation.diversity import LEAST_BLOCKS, DiversitySums, lpips_diversity
from evaluation.plan import make_plan

CLASSES, EACH, DIMS = 40, 5, 16


def measured(draw, classes):
    """The diversity of images whose classes have random means and spreads."""
    means = draw.normal(size=(classes, 1, DIMS)) * np.exp(draw.normal(0, 0.25, (classes, 1, 1)))
    noise = draw.normal(size=(classes, EACH, DIMS)) * np.exp(draw.normal(0, 0.25, (classes, 1, 1)))
    labels = np.repeat(np.arange(classes), EACH)
    plan = make_plan(labels, np.zeros(classes, int), seed=int(draw.integers(1000)))
    sums = DiversitySums(plan.block, DIMS, torch.device("cpu"))
    sums.add(labels, torch.from_numpy((means + noise).reshape(-1, DIMS)))
    sums.end_class()
    return lpips_diversity(sums.result(), plan)


def test_the_interval_of_the_pooled_lpips_covers_the_truth():
    draw = np.random.default_rng(0)
    variance = DIMS * np.exp(2 * 0.25**2)  # of the means, and of the noise
    within, between = EACH * (EACH - 1) / 2 * CLASSES, EACH**2 * CLASSES * (CLASSES - 1) / 2
    truth = (within * 2 * variance + between * 4 * variance) / (within + between)
    rows = [measured(draw, CLASSES) for _ in range(80)]
    covered = np.mean([low <= truth <= high for low, high in (row["lpips_pooled_interval"] for row in rows)])
    assert 0.87 <= covered <= 0.99
    assert abs(np.mean([row["lpips_pooled"] for row in rows]) / truth - 1) < 0.03


def test_a_few_classes_have_no_interval():
    draw = np.random.default_rng(0)
    few, enough = (measured(draw, count)["lpips_pooled_interval"] for count in (LEAST_BLOCKS - 1, LEAST_BLOCKS))
    assert few is None and enough[0] < enough[1]
