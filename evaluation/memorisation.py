"""Are generated images copies of training images? Distances to the nearest training image, beside those of real images.

A distance alone says little. So the generated images are compared with real images that were held out from training: a
model that copies comes closer to its training images than new real images do.
"""

from collections.abc import Iterable

import numpy as np
import torch
from scipy import stats

from evaluation.comparison import MeasuredSet
from evaluation.metrics import FLOAT
from evaluation.training_features import TrainingFeatures
from runtime.progress import progress_bar

QUANTILE = 0.01  # of the held-out distances that generated images are compared with
NEAR = 0.1  # share of this quantile below which an image is as close as a copy
LEAST_HELD_OUT = 100  # images for this quantile
UNLIKELY = 1e-3  # p-value below which a note is made
QUERIES, PAIRS = 1024, 2048  # rows of a block of distances, and pairs whose distance is recomputed at a time

# ---- search --------------------------------------------------------------------------------------


def nearest(
    queries: torch.Tensor, blocks: Iterable[tuple[int, torch.Tensor]], k: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return the Euclidean distances (n, k) to the k nearest rows, nearest first, and their indices, int64 (n, k).

    The result is that of float64, ties go to the lower index. Distances are first computed in float32, by a matrix product;
    all pairs that might be among the nearest, by the worst rounding error of the product, are computed again from their
    difference in float64. One block is in memory at a time.

    queries: float32 (n, d), on the device that computes
    blocks: index of the first row and rows, float32 (m, d), in the order of the index; rows of NaN are left out

    With fewer than k rows, distances are infinite and indices -1.
    """
    best = torch.full((len(queries), k), torch.inf, dtype=FLOAT, device=queries.device)  # squared
    index = torch.full((len(queries), k), -1, device=queries.device)
    centre = queries.mean(0)
    norms = torch.cat([(part - centre).square().sum(1) for part in queries.split(QUERIES)])
    for first, block in blocks:
        kept = (~torch.isnan(block).any(1)).nonzero()[:, 0].to(queries.device)
        block = block.to(queries.device)[kept]
        if not len(block):
            continue
        centred = block - centre
        block_norms = centred.square().sum(1)
        for start in range(0, len(queries), QUERIES):
            rows = slice(start, start + QUERIES)
            found = torch.addmm(block_norms, queries[rows] - centre, centred.T, alpha=-2) + norms[rows, None]
            update(best[rows], index[rows], found, queries[rows], block, first + kept, norms[rows], block_norms.max())
    return best.sqrt().cpu().numpy(), index.cpu().numpy()


def update(
    best: torch.Tensor,
    index: torch.Tensor,
    found: torch.Tensor,
    queries: torch.Tensor,
    block: torch.Tensor,
    places: torch.Tensor,
    norms: torch.Tensor,
    largest: torch.Tensor,
):
    """Put the nearest rows of a block among the nearest so far, `best` and `index` (q, k), in place.

    found: squared distances (q, m) up to rounding; queries: (q, d); block: (m, d); places: (m,) indices of its rows
    norms, largest: squared norms of the centred queries (q,), and the largest one of the centred block
    """
    k, d = best.shape[1], queries.shape[1]
    # |rounding| <= (d + 4) eps (|x| + |y|)^2: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1
    error = (d + 4) * torch.finfo(torch.float32).eps * (norms.sqrt() + largest.sqrt()).square()
    bound = best[:, -1].clone()
    if found.shape[1] >= k:
        kth = found.amin(1) if k == 1 else found.topk(k, largest=False).values[:, -1]
        bound = torch.minimum(bound, kth + error)
    i, j = (found <= (bound + error)[:, None]).nonzero(as_tuple=True)
    if not len(i):
        return
    parts = zip(i.split(PAIRS), j.split(PAIRS))
    exact = torch.cat([(queries[a].to(FLOAT) - block[b].to(FLOAT)).square().sum(1) for a, b in parts])
    # the candidates of each query, in the order of the index, after the nearest so far
    rows, place_of, counts = torch.unique_consecutive(i, return_inverse=True, return_counts=True)
    column = torch.arange(len(i), device=i.device) - (counts.cumsum(0) - counts)[place_of] + k
    distances = torch.full((len(rows), k + int(counts.max())), torch.inf, dtype=FLOAT, device=i.device)
    indices = torch.full(distances.shape, -1, device=i.device)
    distances[:, :k], indices[:, :k] = best[rows], index[rows]
    distances[place_of, column], indices[place_of, column] = exact, places[j]
    order = distances.argsort(dim=1, stable=True)[:, :k]
    best[rows], index[rows] = distances.gather(1, order), indices.gather(1, order)


# ---- copies of real images -----------------------------------------------------------------------


def count_near_copies(real: MeasuredSet, fake: MeasuredSet, network: str) -> int:
    """Return how many generated images are near copies of real ones, of at most `plan.SAMPLE` random images in both sets.

    They are closer to a real image than NEAR times the distance that 99% of the real images keep from each other; images
    with the pixels of a real image are not counted. Copies of real images would have an excellent Frechet distance.
    """
    x, y = (each.sample(network, limit=True) for each in (real, fake))
    if len(x) < 2:
        return 0
    between = nearest(x, [(0, x.cpu())], 2)[0][:, 1]
    between = between[between > 0]  # without copies within the real images
    if not len(between):
        return 0
    distances = nearest(y, [(0, x.cpu())])[0][:, 0]
    near = distances < NEAR * np.quantile(between, QUANTILE)
    return int((near & ~np.isin(fake.digests[fake.plan.kept & fake.plan.sampled], real.digests)).sum())


# ---- comparison with held-out images -------------------------------------------------------------


def closeness(held_out: np.ndarray, generated: np.ndarray) -> dict[str, float | int | None]:
    """Compare the distances of generated images to their nearest training image with those of held-out images.

    threshold        the k-th smallest of the n held-out distances, k = QUANTILE n, at least 1
    closer           share of generated images below it, [0, 1]
    closer_expected  k / (n + 1), the expected share for further held-out images
    closer_than_any  share of generated images below the smallest held-out distance
    near             generated images below NEAR times the threshold; near_held_out the same of held-out images
    p_value          probability that as many further held-out images are below the threshold: for m images this number has
                     a beta-binomial distribution with the parameters m, k, n - k + 1

    held_out, generated: (n,) and (m,), not empty
    """
    n, m = len(held_out), len(generated)
    k = max(1, int(QUANTILE * n))
    threshold = np.sort(held_out)[k - 1]
    below = int((generated < threshold).sum())
    return {
        "threshold": threshold.item(),
        "closer": below / m,
        "closer_expected": k / (n + 1),
        "closer_than_any": (generated < held_out.min()).mean().item(),
        "near": int((generated < NEAR * threshold).sum()),
        "near_held_out": int((held_out < NEAR * threshold).sum()),
        "p_value": float(stats.betabinom.sf(below - 1, m, k, n - k + 1)),
    }


def summary(distances: np.ndarray) -> dict[str, float | int]:
    """Return number, smallest, 1% quantile and median of distances (n,)."""
    low, median = np.quantile(distances, [QUANTILE, 0.5]).tolist()
    return {"n": len(distances), "smallest": distances.min().item(), "quantile": low, "median": median}


class Memorisation:
    """Nearest training image of every real and generated image.

    training        the training images
    distances       {"real", "fake": (n,)}, to the nearest training image
    nearest         {"real", "fake": (n,)}, its index
    copies          {"real", "fake": bool (n,)}, images with the pixels of some training image

    Raises ValueError if all real images are copies: none is held out.
    """

    def __init__(self, real: MeasuredSet, fake: MeasuredSet, training: TrainingFeatures):
        self.training, self.sets = training, {"real": real, "fake": fake}
        self.copies = {
            name: np.isin(each.digests, training.digests[~training.lost]) for name, each in self.sets.items()
        }
        if self.copies["real"].all():
            raise ValueError(
                f"All images of REAL are in {training.images.images.path} too, expected images held out from training: name "
                "others as REAL."
            )
        self.distances, self.nearest = {}, {}
        for name in self.sets:  # one after the other: the features of one are on the device
            title = f"nearest training images of {'REAL' if name == 'real' else 'FAKE'}"
            blocks = progress_bar(training.blocks(), total=training.count(), unit="file", desc=title, leave=False)
            distances, index = nearest(self.queries(name), blocks)
            self.distances[name], self.nearest[name] = distances[:, 0], index[:, 0]

    def queries(self, name: str, rows: np.ndarray | None = None) -> torch.Tensor:
        """Return the features of a set's images, float32 (n, d); rows: indices of images, all if None."""
        features = self.sets[name].result.features[self.training.network.name]
        assert len(features) == len(self.sets[name].digests), "the features of all images are needed"
        return (features if rows is None else features[torch.from_numpy(rows)]).to(self.sets[name].device)

    def held_out(self) -> np.ndarray:
        """Return which real images are not among the training images, bool (n,)."""
        return ~self.copies["real"]

    def metrics(self, superclasses: dict[str, int], labels: np.ndarray | None) -> dict:
        """Return "memorisation" of metrics.json.

        superclasses: {name: label}
        labels: (training images,), None if there are no classes
        """
        held, distances = self.held_out(), self.distances
        groups = {}
        for name, s in superclasses.items():
            mine = distances["real"][held & self.sets["real"].rows(s)], distances["fake"][self.sets["fake"].rows(s)]
            groups[name] = closeness(*mine) if len(mine[0]) >= LEAST_HELD_OUT and len(mine[1]) else None
        report = {
            "path": str(self.training.images.images.path),
            "n": int((~self.training.lost).sum()),
            "network": self.training.network.name,
            "held_out": summary(distances["real"][held]) | {"copies": int(self.copies["real"].sum())},
            "generated": summary(distances["fake"]) | {"copies": int(self.copies["fake"].sum())},
            "overall": closeness(distances["real"][held], distances["fake"]),
            "superclasses": groups,
        }
        if labels is not None:
            for key, name, rows in (("held_out", "real", held), ("generated", "fake", slice(None))):
                same = labels[self.nearest[name]] == self.sets[name].plan.labels
                report[key]["same_class"] = same[rows].mean().item()
        return report


def memorisation_notes(report: dict, real: str, fake: str) -> list[str]:
    """Return sentences about copies of training images.

    report: of `Memorisation.metrics`; real, fake: paths of the sets
    """
    held, generated, overall, notes = report["held_out"], report["generated"], report["overall"], []
    if generated["copies"]:
        notes.append(f"{generated['copies']:,} images of {fake} are exact copies of training images.")
    near = overall["near"] - generated["copies"]
    if near > 0:
        notes.append(
            f"{near:,} more images of {fake} are as close to a training image as a changed copy: closer than a tenth of the "
            f"distance that 99% of held-out images keep, against {overall['near_held_out']:,} of {held['n']:,} held-out images."
        )
    if overall["p_value"] < UNLIKELY:
        notes.append(
            f"{overall['closer']:.1%} of the images of {fake} are closer to a training image than 99% of held-out images are, "
            f"expected {overall['closer_expected']:.1%}: some may be copies of training images, so look at the closest pairs."
        )
    if held["copies"]:
        notes.append(
            f"{held['copies']:,} images of {real} are exact copies of training images: they do not count as held out."
        )
    if held["n"] < LEAST_HELD_OUT:
        notes.append(
            f"Only {held['n']:,} images of {real} are held out from training: generated images are compared with the closest "
            "of them."
        )
    return notes
