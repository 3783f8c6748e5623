"""One pass over a set of images, on any number of processes: everything that the metrics need from its images.

Images come class by class, in batches that do not depend on the number of processes; each process takes a contiguous
run of batches. Sums are float64 and added over processes, so the number of processes changes only their rounding.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset

from evaluation.diversity import DiversitySums, select_rows
from evaluation.features import Network
from evaluation.image_sets import ENLARGED, UNREADABLE
from evaluation.metrics import FLOAT, Moments, score_sums
from evaluation.networks import Networks
from evaluation.plan import Plan
from evaluation.reduction import gather_on_main, merge_over_processes, sum_over_processes
from runtime.progress import progress_bar
from runtime.text import shorten

TOP = 5  # classes of each image that are kept
MUCH_MEMORY = 4e9  # bytes of a process's sums that are announced


@dataclass
class PassResult:
    """The result of a pass over a set of images, on the main process.

    plan        of the N images that could be read
    rows        (N,) their indices in the set
    moments     {name: {(superclass, half): Moments}}; name: see `moments_name`. Groups of few images whose features are
                all kept have none, see `Plan.large_groups`; ADM's spatial features have one for all images, of group None
    features    {network name: float32 (kept images, d)}, in the order of the images
    score       {network name: sums of `metrics.score_sums`}
    diversity   None without LPIPS, or "classes" (classes, 3): n, sum |f|^2 and |sum f|^2, NaN for classes without images;
                and "gram" (blocks, blocks): inner products of the blocks' feature sums
    predicted   None without a classifier, or int64 (N, TOP or fewer): the classes that it finds most likely, best first, in
                the order of the images; ~k stands for output k if the data lack its class
    digests     (N,) int64, of the pixels, in the order of the images
    seconds     "total" and "network", of the slowest process
    unreadable  names of the images that could not be read, which are left out
    enlarged    number of images that were smaller than the crop
    """

    plan: Plan
    rows: np.ndarray
    moments: dict[str, dict[tuple[int, int] | None, Moments]]
    features: dict[str, torch.Tensor]
    score: dict[str, torch.Tensor]
    diversity: dict[str, torch.Tensor] | None
    predicted: np.ndarray | None
    digests: np.ndarray
    seconds: dict[str, float]
    unreadable: list[str]
    enlarged: int


class PassSums:
    """One process's running sums: fields of `PassResult`; `features` and those for single images are lists of batches."""

    def __init__(self, images: Dataset, plan: Plan, networks: Networks, device: torch.device):
        self.images, self.plan, self.networks = images, plan, networks
        self.device = float64_device(device)
        dims = networks.output_dims(images.size, device)
        self.moments, self.score, self.features, self.digests, self.states = {}, {}, {}, [], []
        self.predicted = []
        for network in networks.features:
            outputs, name = dims[network], network.name
            for key in without_logits(outputs):
                groups = plan.large_groups(outputs[key]) if key == "features" else [None]
                self.moments[moments_name(name, key)] = {group: Moments(outputs[key], self.device) for group in groups}
            self.features[name] = [torch.empty(0, outputs["features"])]
            if "logits" in outputs:
                shape = plan.split.max() + 1, outputs["logits"] + 2
                self.score[name] = torch.zeros(shape, dtype=FLOAT, device=self.device)
        self.diversity = None
        if networks.lpips:
            self.diversity = DiversitySums(plan.block, dims[networks.lpips]["features"], self.device)

    def sum_bytes(self) -> int:
        """Return the size of the moments and of the sums for LPIPS."""
        moments = sum(m.scatter.nbytes for groups in self.moments.values() for m in groups.values())
        return moments + (self.diversity.block_sums.nbytes if self.diversity else 0)

    def add(self, rows: np.ndarray, images: torch.Tensor):
        """Add a batch: image indices `rows` (n,), images uint8 (n, 3, size, size)."""
        plan = self.plan
        for network in self.networks.features:
            self.add_features(network, rows, self.outputs(network, rows, images))
        if self.diversity:
            self.diversity.add(plan.labels[rows], self.outputs(self.networks.lpips, rows, images)["features"])
        if self.networks.classifier:
            logits = self.outputs(self.networks.classifier, rows, images)["logits"]
            found = logits.argsort(dim=1, descending=True, stable=True)[:, :TOP].cpu().numpy()
            labels = self.networks.outputs[found]
            self.predicted.append(np.where(labels >= 0, labels, ~found))

    def outputs(self, network: Network, rows: np.ndarray, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run a network; raises ValueError with the name of the first image whose output is non-finite."""
        outputs = {key: x.to(self.device) for key, x in network(images).items()}
        for x in outputs.values():
            if not torch.isfinite(x).all():
                row = rows[int((~torch.isfinite(x).all(1)).nonzero()[0])]
                raise ValueError(
                    f"The {network.name} features of {self.images.name(row)} are non-finite, expected finite features: replace "
                    "the image or the weights."
                )
        return outputs

    def add_features(self, network: Network, rows: np.ndarray, outputs: dict[str, torch.Tensor]):
        """Add one network's outputs for a batch to the moments, the kept features and the Inception score's sums."""
        plan = self.plan
        groups = list(zip(plan.superclass[rows].tolist(), plan.half[rows].tolist()))
        for key in without_logits(outputs):
            moments = self.moments[moments_name(network.name, key)]
            if None in moments:
                moments[None].add(outputs[key])
            for group in sorted(set(groups) & moments.keys()):
                mask = np.array([other == group for other in groups])
                moments[group].add(select_rows(outputs[key], mask))
        self.features[network.name].append(select_rows(outputs["features"], plan.kept[rows]).float().cpu())
        if "logits" in outputs:
            score = self.score[network.name]
            score += score_sums(outputs["logits"], plan.split[rows], len(score))

    def result(self, seconds: dict[str, float]) -> PassResult | None:
        """Combine the processes; return the result on the main process, None on the others."""
        plan, order = self.plan, self.plan.order
        moments = {
            name: {group: merge_over_processes(m) for group, m in groups.items()}
            for name, groups in self.moments.items()
        }
        score = {name: sum_over_processes(sums).cpu() for name, sums in self.score.items()}
        diversity = self.diversity and self.diversity.result()
        features = {name: torch.cat(batches) for name, batches in self.features.items()}
        processes = gather_on_main((features, self.digests, self.states, self.predicted, seconds))
        if processes is None:
            return None
        features, digests, states, predicted, seconds = zip(*processes)
        # from the order of the pass back to the order of the images:
        digests, states = (
            np.concatenate([batch for batches in values for batch in batches])[np.argsort(order)]
            for values in (digests, states)
        )
        lost = states == UNREADABLE
        predicted = [batch for batches in predicted for batch in batches]
        predicted = np.concatenate(predicted)[np.argsort(order[~lost[order]])] if predicted else None
        back = np.argsort(order[plan.kept[order] & ~lost[order]])
        features = {name: torch.cat([of_process[name] for of_process in features])[back] for name in features[0]}
        seconds = {key: max(of_process[key] for of_process in seconds) for key in seconds[0]}
        unreadable, enlarged = [self.images.name(i) for i in np.flatnonzero(lost)], int((states == ENLARGED).sum())
        left, rows = plan.without(lost), np.flatnonzero(~lost)
        return PassResult(
            left, rows, moments, features, score, diversity, predicted, digests[~lost], seconds, unreadable, enlarged
        )


def without_logits(outputs: dict) -> list[str]:
    """Return the keys of a network's outputs that are features: "features" and Inception's "spatial"."""
    return [key for key in outputs if key != "logits"]


def moments_name(network: str, key: str) -> str:
    """Return the name of moments: the network's for its "features", "NAME spatial" for ADM's spatial features."""
    return network if key == "features" else f"{network} {key}"


def float64_device(device: torch.device) -> torch.device:
    """Return the device for float64 sums: `device`, or the CPU for Apple's GPUs, which have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def check_readable(unreadable: list[str], limit: int):
    """Raise ValueError if more than `limit` images could not be read."""
    if len(unreadable) > limit:
        raise ValueError(
            f"{len(unreadable)} images cannot be read ({shorten(unreadable, str)}), expected at most {limit}: replace or "
            "remove them, or raise --max-bad-images."
        )


def run_pass(
    images: Dataset,
    plan: Plan,
    networks: Networks,
    device: torch.device,
    batch_size: int = 64,
    workers: int = 4,
    title: str = "images",
    max_bad_images: int = 0,
) -> PassResult | None:
    """Run the networks over all images; return the result on the main process, None on the others.

    Every process calls this with the same arguments.

    images: `image_sets.Pixels`, or a Dataset of (uint8 (3, size, size), int64 digest, state) with `.size` and `.name(i)`
    batch_size, workers: images per batch and decoding workers, per process
    title: of the progress bar
    max_bad_images: most images that may be unreadable; they are left out

    Raises ValueError if more images are unreadable.
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    batches = [plan.order[i : i + batch_size] for i in range(0, len(plan.order), batch_size)]
    own = batches[rank * len(batches) // world : (rank + 1) * len(batches) // world]
    sums = PassSums(images, plan, networks, device)
    if sums.sum_bytes() > MUCH_MEMORY and not rank:
        place = f" of {device}" if device.type == "cuda" else ""
        print(
            f"{title}: the sums over superclasses take {sums.sum_bytes() / 1e9:.1f} GB{place} per process",
            file=sys.stderr,
        )
    loader = DataLoader(images, batch_sampler=own, num_workers=workers, pin_memory=device.type == "cuda")
    seconds, start, unreadable = {"total": 0.0, "network": 0.0}, time.perf_counter(), []
    with progress_bar(total=sum(map(len, own)), unit="image", desc=title, disable=rank > 0, leave=False) as bar:
        for rows, (pixels, digests, states) in zip(own, loader):
            begin, read = time.perf_counter(), states != UNREADABLE
            unreadable += [images.name(i) for i in rows[~read.numpy()]]
            check_readable(unreadable, max_bad_images)
            if read.any():
                sums.add(rows[read.numpy()], pixels[read].to(device, non_blocking=True))
            sums.digests.append(digests.numpy())
            sums.states.append(states.numpy())
            seconds["network"] += time.perf_counter() - begin
            bar.update(len(rows))
    seconds["total"] = time.perf_counter() - start
    result = sums.result(seconds)
    if result:
        check_readable(result.unreadable, max_bad_images)
    return result
