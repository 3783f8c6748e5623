"""Choose and load the networks of a comparison, and check them against the sets."""

import argparse
from dataclasses import dataclass, field

import torch

from evaluation import features
from evaluation.features import Network
from evaluation.saved_statistics import Statistics
from evaluation.weights import find_network_weights
from hierarchy import Hierarchy


@dataclass
class Networks:
    """The networks of a comparison.

    features    networks whose features give Frechet distance and KID; Inception, if present, is the first
    lpips       `features.lpips_features`, or None
    classifier  network with "logits" of the data's classes, or None
    """

    features: list[Network] = field(default_factory=list)
    lpips: Network | None = None
    classifier: Network | None = None

    def all(self) -> list[Network]:
        """Return every network."""
        return [*self.features, *filter(None, (self.lpips, self.classifier))]

    def output_dims(self, size: int, device: torch.device) -> dict[Network, dict[str, int]]:
        """Return {network: {output: values per image}} for images of `size` x `size` pixels."""
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
        return {network: {key: x.shape[1] for key, x in network(blank).items()} for network in self.all()}


def load_networks(args: argparse.Namespace, device: torch.device) -> Networks:
    """Load the networks of evaluate.py's flags.

    Raises ValueError if weights are absent, damaged or do not fit, if two networks have one name, or if there is none.
    """
    random, paths = args.random_weights, {}
    for flag, given in (("inception", args.inception), ("lpips-trunk", args.lpips_trunk)):
        if given != "none":
            paths[flag] = None if random and not given else find_network_weights(flag, given)
    networks = Networks([features.named_network(spec, "features", random, device) for spec in args.features or ()])
    names = ["inception", *(network.name for network in networks.features)]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"--features has a second network {repeated[0]!r}, expected different names: rename its file.")
    if "inception" in paths:
        network = features.inception(paths["inception"], args.resize, bool(args.save_adm), device)
        networks.features.insert(0, network)
    if "lpips-trunk" in paths:
        networks.lpips = features.lpips_features(paths["lpips-trunk"], device)
    if args.classifier:
        networks.classifier = features.named_network(args.classifier, "logits", random, device)
    if not networks.all():
        raise ValueError("No network was named, expected Inception, LPIPS, --features or --classifier: name one.")
    return networks


def recorded_networks(statistics: Statistics) -> Networks:
    """Return the network that saved statistics were made with, without its weights: enough if no images are compared."""
    record = statistics.record.get("network", {"name": "inception", "weights": "unknown"})
    return Networks([Network(record["name"], None, record)])


def check_networks(
    networks: Networks,
    sets: list,
    dims: dict[Network, dict[str, int]],
    size: int | None,
    hierarchy: Hierarchy | None,
):
    """Raise ValueError if saved statistics come from another network or crop, or the classifier has other classes.

    sets: as `image_sets.open_set` returns them
    dims: of `Networks.output_dims`, {} if no images are compared
    size: pixels per side of the images
    """
    for each in sets:
        if isinstance(each, Statistics):
            check_statistics(each, networks, dims, size)
    classifier = networks.classifier
    if classifier and hierarchy is None:
        raise ValueError("--classifier is set, but the images have no classes, expected class folders: drop the flag.")
    if classifier and dims and dims[classifier]["logits"] != hierarchy.num_classes:
        raise ValueError(
            f"The classifier has {dims[classifier]['logits']} classes, expected the {hierarchy.num_classes} of "
            f"{hierarchy.name}: name another."
        )


def check_statistics(statistics: Statistics, networks: Networks, dims: dict[Network, dict[str, int]], size: int | None):
    """Raise ValueError unless the statistics were made with the first network, its options and this crop."""
    if not networks.features:
        raise ValueError(
            f"{statistics.path} holds statistics, expected the network they were made with: name it, or the images."
        )
    first = networks.features[0]
    statistics.check(first.record, size)
    found = len(statistics.gaussians[None].mean)
    if dims and found != dims[first]["features"]:
        raise ValueError(
            f"{statistics.path} has statistics of {found} dimensions, expected the {dims[first]['features']} of "
            f"{first.name}: name the network they were made with."
        )
