"""One pass over a set of images, on any number of processes: all that the figures of the evaluation need of it.

Images come class by class, in batches whose composition does not depend on the number of processes; each process takes
a run of them. Sums are float64 and are added over the processes, so that splitting changes no more than their rounding.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader
from tqdm import tqdm

from evaluation.metrics import FLOAT, Moments, score_splits, score_sums

SAMPLE = 10_000  # images of a set whose features are kept in any case: as many as ADM's reference batches hold
PER_SUPERCLASS = 2048  # the same of a superclass: its covariance is singular below this number
KEPT_BYTES = 2**29  # of features, up to which those of all images of a set are kept
BLOCKS = 10  # of classes in a superclass: the units of the bootstrap of the pooled diversity


@dataclass
class Networks:
    """`features`: those whose distances are asked for; `lpips`, `classifier`: one or None."""

    features: list = field(default_factory=list)
    lpips: object = None
    classifier: object = None

    def every(self):
        return [*self.features, *filter(None, (self.lpips, self.classifier))]

    def sizes(self, size, device):
        """{network: {output: numbers an image}} for images of side `size`."""
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
        return {network: {key: x.shape[1] for key, x in network(blank).items()} for network in self.every()}


# ---- what becomes of each image ------------------------------------------------------------------


@dataclass
class Plan:
    """What becomes of each of N images.

    labels, superclass  (N,) int; parents (classes,) the superclass of each class
    order               (N,) the images class by class
    part                (N,) 0 and 1: in one half, in the other, 2: in neither
    kept, sampled       (N,) bool: its features are kept; it is one of the random `SAMPLE` of all
    split               (N,) of the Inception score
    block               (classes,) the block of classes it is in, numbered over all superclasses; -1 without images
    """

    labels: np.ndarray
    parents: np.ndarray
    superclass: np.ndarray
    order: np.ndarray
    part: np.ndarray
    kept: np.ndarray
    sampled: np.ndarray
    split: np.ndarray
    block: np.ndarray

    def groups(self):
        """(superclass, part) of all images, without repetition."""
        return sorted(set(zip(self.superclass.tolist(), self.part.tolist())))


def make_plan(labels, parents, keep="auto", numbers=0, halves=None, seed=0):
    """`keep` the features of "all" images, of a "sample", or "auto": by their `numbers` an image; `halves`: None or, by
    superclass, how many images a half has at most."""
    shuffled, superclass = np.random.default_rng(seed).permutation(len(labels)), parents[labels]
    sampled = np.zeros(len(labels), dtype=bool)
    sampled[shuffled[:SAMPLE]] = True
    kept = sampled.copy()
    for s in np.unique(superclass):
        kept[shuffled[superclass[shuffled] == s][:PER_SUPERCLASS]] = True
    if keep == "all" or keep == "auto" and 4 * numbers * len(labels) <= KEPT_BYTES:
        kept[:] = True
    part = np.full(len(labels), 2)
    for s, most in enumerate([] if halves is None else halves):
        for half, rows in enumerate(split_in_two(shuffled[superclass[shuffled] == s], labels, most, seed)):
            part[rows] = half
    order, split = np.argsort(labels, kind="stable"), score_splits(len(labels), seed)
    block = blocks_of_classes(labels, parents, seed)
    return Plan(labels, parents, superclass, order, part, kept, sampled, split, block)


def split_in_two(rows, labels, most, seed):
    """Two halves (2, m) of `rows`, m <= most: one of each pair of images of a class in each."""
    rows = rows[np.argsort(labels[rows], kind="stable")]
    classes = np.split(rows, np.flatnonzero(np.diff(labels[rows])) + 1)
    pairs = np.concatenate([of[: len(of) // 2 * 2].reshape(-1, 2) for of in classes])
    return np.random.default_rng(seed).permutation(pairs)[:most].T


def blocks_of_classes(labels, parents, seed):
    """The classes of each superclass dealt out at random to at most `BLOCKS` blocks."""
    block, present, count = np.full(len(parents), -1), np.unique(labels), 0
    for s in np.unique(parents[present]):
        classes = np.random.default_rng((seed, s)).permutation(present[parents[present] == s])
        block[classes] = count + np.arange(len(classes)) % BLOCKS
        count += min(BLOCKS, len(classes))
    return block


# ---- sums over the processes ---------------------------------------------------------------------


def summed(tensor):
    """The sum of the processes' tensors, on each; in place."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def gathered(thing):
    """[thing of process 0, ...] on the main process, None on the others."""
    if not distributed.is_initialized():
        return [thing]
    things = [None] * distributed.get_world_size() if distributed.get_rank() == 0 else None
    distributed.gather_object(thing, things)
    return things


def all_reduced(moments):
    """The moments of the rows of all processes: their sums about the common mean."""
    if not distributed.is_initialized():
        return moments
    total = Moments(len(moments.mean), moments.mean.device)
    n = summed(torch.tensor(float(moments.n), dtype=FLOAT, device=moments.mean.device))
    total.n = int(n)
    total.mean = summed(moments.mean * moments.n) / n
    total.scatter = summed(moments.sums_about(total.mean))
    return total


# ---- diversity -----------------------------------------------------------------------------------


class Diversity:
    """Sums of LPIPS features by class, images coming class by class, and by block of classes.

    The first and the last class of a process may be shared with others: they are closed at the end.
    """

    def __init__(self, block, dim, device):
        self.block, self.sums = block, torch.zeros(block.max() + 1, dim, dtype=FLOAT, device=device)
        self.edges, self.now, self.closed = [], None, []

    def add(self, labels, features):
        """labels (n,), features (n, dim)"""
        for label in dict.fromkeys(labels.tolist()):
            rows = pick(features, labels == label)
            squares = torch.linalg.vector_norm(rows, dtype=FLOAT).item() ** 2
            found = label, len(rows), squares, rows.sum(0, dtype=FLOAT)
            if self.now and self.now[0] == label:
                self.now = joined(self.now, found)
            else:
                self.end_class()
                self.now = found

    def end_class(self):
        if self.now and self.edges:
            self.close(*self.now)
        elif self.now:
            self.edges.append(self.now)

    def close(self, label, n, squares, total):
        self.closed.append((label, n, squares, total.square().sum().item()))
        self.sums[self.block[label]] += total

    def result(self):
        """`Measured.diversity` on the main process, None on the others."""
        edges = gathered([(*edge[:3], edge[3].cpu()) for edge in (*self.edges, self.now) if edge])
        closed, self.sums = gathered(self.closed), summed(self.sums)
        if edges is None:
            return None
        self.closed, together = [row for rows in closed for row in rows], {}
        for edge in (edge for some in edges for edge in some):
            label = edge[0]
            together[label] = joined(together[label], edge) if label in together else edge
        for label, n, squares, total in together.values():
            self.close(label, n, squares, total.to(self.sums.device))
        classes = np.full((len(self.block), 3), np.nan)  # n, squares, total
        for label, *figures in self.closed:
            classes[label] = figures
        return {"classes": torch.from_numpy(classes), "gram": (self.sums @ self.sums.T).cpu()}


def joined(a, b):
    """Two parts of a class: (label, n, squares, total)."""
    return a[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


def float64_device(device):
    """Where float64 sums of what is computed on `device` can be: Apple's GPUs have none."""
    return torch.device("cpu") if device.type == "mps" else device


def pick(x, mask):
    """The rows of a tensor where a NumPy mask is true."""
    return x[torch.from_numpy(np.flatnonzero(mask)).to(x.device)]


# ---- the pass ------------------------------------------------------------------------------------


@dataclass
class PassResult:
    """Of a set of images, on the main process.

    moments     {network: {(superclass, part): Moments}}, "NAME spatial" for ADM's spatial features
    features    {network: float32 (kept images, d)}, in the order of the images
    score       {network: sums of `metrics.score_sums`}
    diversity   None or "classes" (classes, 3): n, sum |f|^2 and |sum f|^2, NaN without images; "gram": of the blocks' sums
    right       None or (2, superclasses): images read as the right class, as the right superclass
    digests     (N,) of the pixels
    seconds     "total" and "network", of the slowest process
    """

    plan: Plan
    moments: dict
    features: dict
    score: dict
    diversity: dict | None
    right: np.ndarray | None
    digests: np.ndarray
    seconds: dict


class PassSums:
    """The sums of one process."""

    def __init__(self, images, plan, networks, device):
        self.images, self.plan, self.networks = images, plan, networks
        self.device = float64_device(device)
        sizes = networks.sizes(images.size, device)
        self.moments, self.score, self.features, self.digests = {}, {}, {}, []
        for network in networks.features:
            outputs, name = sizes[network], network.name
            for key in without_logits(outputs):
                self.moments[moments_name(name, key)] = {
                    group: Moments(outputs[key], self.device) for group in plan.groups()
                }
            self.features[name] = [torch.empty(0, outputs["features"])]
            if "logits" in outputs:
                shape = plan.split.max() + 1, outputs["logits"] + 2
                self.score[name] = torch.zeros(shape, dtype=FLOAT, device=self.device)
        self.diversity = self.right = None
        if networks.lpips:
            self.diversity = Diversity(plan.block, sizes[networks.lpips]["features"], self.device)
        if networks.classifier:
            self.right = np.zeros((2, plan.parents.max() + 1))

    def take(self, rows, images):
        """rows (n,): which images; images: uint8 (n, 3, size, size)"""
        plan = self.plan
        for network in self.networks.features:
            self.add_features(network, rows, self.outputs(network, rows, images))
        if self.diversity:
            self.diversity.add(plan.labels[rows], self.outputs(self.networks.lpips, rows, images)["features"])
        if self.networks.classifier:
            logits = self.outputs(self.networks.classifier, rows, images)["logits"]
            found, label = logits.argmax(1).cpu().numpy(), plan.labels[rows]
            for counts, right in zip(self.right, (found == label, plan.parents[found] == plan.parents[label])):
                np.add.at(counts, plan.superclass[rows], right)

    def outputs(self, network, rows, images):
        found = {key: x.to(self.device) for key, x in network(images).items()}
        for x in found.values():
            if not torch.isfinite(x).all():
                row = rows[int((~torch.isfinite(x).all(1)).nonzero()[0])]
                raise ValueError(
                    f"The {network.name} features of {self.images.name(row)} are not finite, expected numbers: replace the "
                    "image or the weights."
                )
        return found

    def add_features(self, network, rows, found):
        plan, groups = self.plan, list(zip(self.plan.superclass[rows].tolist(), self.plan.part[rows].tolist()))
        for key in without_logits(found):
            for group in sorted(set(groups)):
                mask = np.array([other == group for other in groups])
                self.moments[moments_name(network.name, key)][group].add(pick(found[key], mask))
        self.features[network.name].append(pick(found["features"], plan.kept[rows]).float().cpu())
        if "logits" in found:
            score = self.score[network.name]
            score += score_sums(found["logits"], plan.split[rows], len(score))

    def result(self, seconds):
        """`Measured` on the main process, None on the others."""
        plan, order = self.plan, self.plan.order
        moments = {name: {g: all_reduced(m) for g, m in groups.items()} for name, groups in self.moments.items()}
        score = {name: summed(sums).cpu() for name, sums in self.score.items()}
        right = None if self.right is None else summed(torch.from_numpy(self.right).to(self.device)).cpu().numpy()
        diversity = self.diversity and self.diversity.result()
        parts = gathered(({name: torch.cat(x) for name, x in self.features.items()}, self.digests, seconds))
        if parts is None:
            return None
        features, digests, seconds = zip(*parts)
        back = np.argsort(order[plan.kept[order]])  # from the order of the pass to that of the images
        features = {name: torch.cat([part[name] for part in features])[back] for name in features[0]}
        digests = np.concatenate([digest for part in digests for digest in part])[np.argsort(order)]
        seconds = {key: max(part[key] for part in seconds) for key in seconds[0]}
        return PassResult(plan, moments, features, score, diversity, right, digests, seconds)


def without_logits(outputs):
    return [key for key in outputs if key != "logits"]


def moments_name(network, key):
    return network if key == "features" else f"{network} {key}"


def run_pass(images, plan, networks, device, batch_size=64, workers=4, title="images"):
    """`Measured`, or None on other processes than the main one, of `images`: a Dataset of uint8 (3, size, size) and digest,
    with `.size` and `.name(i)`. Each process calls this with the same arguments."""
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    batches = [plan.order[i : i + batch_size] for i in range(0, len(plan.order), batch_size)]
    mine = batches[rank * len(batches) // world : (rank + 1) * len(batches) // world]
    sums = PassSums(images, plan, networks, device)
    loader = DataLoader(images, batch_sampler=mine, num_workers=workers, pin_memory=device.type == "cuda")
    seconds, start = {"total": 0.0, "network": 0.0}, time.perf_counter()
    with tqdm(total=sum(map(len, mine)), unit="image", desc=title, disable=True if rank else None, leave=False) as bar:
        for rows, (pixels, digests) in zip(mine, loader):
            begin = time.perf_counter()
            sums.take(rows, pixels.to(device, non_blocking=True))
            sums.digests.append(digests.numpy())
            seconds["network"] += time.perf_counter() - begin
            bar.update(len(rows))
    seconds["total"] = time.perf_counter() - start
    return sums.result(seconds)
