"""Choose and load the networks of a comparison, and check them against the sets."""

import argparse
from dataclasses import dataclass, field

import numpy as np
import torch

from evaluation import features
from evaluation.class_embeddings import embedding_classifier
from evaluation.class_names import match_names
from evaluation.features import Network
from evaluation.named_networks import named_network
from evaluation.saved_statistics import Statistics
from evaluation.weights import find_network_weights
from hierarchy import Hierarchy
from runtime.text import shorten


@dataclass
class Networks:
    """The networks of a comparison.

    features    networks whose features give Frechet distance and KID; Inception, if present, is the first
    lpips       `features.lpips_features`, or None
    classifier  network with "logits" of the data's classes, or None
    outputs     int64 (outputs,), label of each output of the classifier, -1 for a class that the data lack; None until
                `check_networks`
    """

    features: list[Network] = field(default_factory=list)
    lpips: Network | None = None
    classifier: Network | None = None
    outputs: np.ndarray | None = None

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
    networks = Networks([named_network(spec, "features", random, device) for spec in args.features or ()])
    names = ["inception", *(network.name for network in networks.features)]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"--features has a second network {repeated[0]!r}, expected different names: rename its file.")
    if "inception" in paths:
        network = features.inception(paths["inception"], args.resize, bool(args.save_adm), device)
        networks.features.insert(0, network)
    if "lpips-trunk" in paths:
        networks.lpips = features.lpips_features(paths["lpips-trunk"], device)
    if args.classifier and args.class_embeddings:
        networks.classifier = embedding_classifier(args.classifier, args.class_embeddings, random, device)
    elif args.classifier:
        networks.classifier = named_network(args.classifier, "logits", random, device)
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

    Sets `Networks.outputs`.

    sets: as `image_sets.open_set` returns them
    dims: of `Networks.output_dims`, {} if no images are compared
    size: pixels per side of the images
    """
    for each in sets:
        if isinstance(each, Statistics):
            check_statistics(each, networks, dims, size)
    if networks.classifier and hierarchy is None:
        raise ValueError("--classifier is set, but the images have no classes, expected class folders: drop the flag.")
    if networks.classifier and dims:
        networks.outputs = match_outputs(networks.classifier, dims[networks.classifier]["logits"], hierarchy)


def match_outputs(classifier: Network, count: int, hierarchy: Hierarchy) -> np.ndarray:
    """Return the label of each of the classifier's outputs, int64 (count,), -1 for a class that the hierarchy lacks.

    Without names, or with names that came with the weights and are not the hierarchy's, output k is class k.

    Raises ValueError if the outputs are not as many as their names, or if a class of the hierarchy has no output.
    """
    file = classifier.classes_file
    if file and len(classifier.classes) != count:
        raise ValueError(
            f"{file} has {len(classifier.classes)} classes, expected the {count} outputs of {classifier.name}: correct it."
        )
    if classifier.classes and len(classifier.classes) == count:
        labels = match_names(classifier.classes, hierarchy).labels
        missing = sorted(set(range(hierarchy.num_classes)) - set(labels.tolist()))
        if not missing:
            return labels
        if file:
            names = shorten(hierarchy.classes[c] for c in missing)
            raise ValueError(
                f"{file} lacks {len(missing)} classes of {hierarchy!r} ({names}): correct it, or name another classifier."
            )
    if count != hierarchy.num_classes:
        raise ValueError(
            f"The classifier has {count} classes, expected the {hierarchy.num_classes} of {hierarchy.name}: name another, or "
            "put its class names beside it as STEM.classes.txt."
        )
    return np.arange(count)


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
