"""Geometry of the class rows of the label embedder: do classes of one superclass lie close together?

`separation` measures it on the rows themselves. A t-SNE map is for looking at; its distances mean little.
Shapes: N rows (N, D), groups int64 (N,) with values 0..S-1, the superclasses.
"""

import os

import torch

from checkpoint.download import find_weights
from checkpoint.format import read_weights
from checkpoint.loading import TABLE
from hierarchy import Hierarchy
from sampling.load import match_hierarchy
from tiered_embedder import ancestor_rows


def read_class_table(
    path: str | os.PathLike, spec: str | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, Hierarchy]:
    """Read the class rows (N, D), superclass rows (S, D) or None, and hierarchy of an adapter or checkpoint; float32.

    spec: the hierarchy of a checkpoint, as for `Hierarchy.load`; for an adapter only names of its classes are new

    Raises ValueError if the superclasses are unknown, the hierarchy is not the adapter's, or the table does not fit it.
    """
    tensors, description = read_weights(find_weights(path))
    own, hierarchy = description and description.hierarchy, Hierarchy.load(spec) if spec else None
    hierarchy = match_hierarchy(hierarchy, own) if hierarchy and own else own or hierarchy and hierarchy.keep()
    if hierarchy is None:
        raise ValueError(
            f"{path} does not contain the superclasses of its classes: pass --hierarchy, such as inat2021."
        )
    rows = tensors.get(TABLE)
    n, s = hierarchy.num_classes, hierarchy.num_super_classes
    nodes = s + sum(len(rank.nodes) for rank in hierarchy.ranks)
    if rows is None or len(rows) - n not in (1, nodes, nodes + 1):  # a null row, rows of nodes, or both
        found = "no class table" if rows is None else f"a class table of {len(rows)} rows"
        raise ValueError(
            f"{path} has {found}, expected one for {hierarchy!r}: pass an adapter, or the --hierarchy it was trained with."
        )
    if own and description.embedder == "path":  # of a class: the sum of the rows on its path
        rows, path = rows.float(), ancestor_rows(own.ancestors, n, [len(tier.nodes) for tier in own.tiers], len(rows))
        rows[:n] += rows[path[:, :n]].sum(0)
    return rows[:n].float(), rows[n : n + s].float() if len(rows) >= n + s else None, hierarchy


def separation(
    rows: torch.Tensor, groups: torch.Tensor, k: int = 10, block: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return purity and silhouette of each row by Euclidean distance, both float64 (N,).

    purity      share of a row's k nearest rows that belong to its group, 0..1: the neighbourhood hit of Paulovich et al.,
                IEEE TVCG 14(3), 2008
    silhouette  (b - a) / max(a, b), -1..1, with a the mean distance to the other rows of the group and b the smallest
                mean distance to another group; 0 for a row alone in its group: Rousseeuw, J. Comput. Appl. Math. 20, 1987

    `block` rows are computed at a time.
    """
    rows = rows.double()
    members = torch.nn.functional.one_hot(groups).double()  # (N, S)
    counts = members.sum(0)
    assert len(rows) > k and (counts > 0).sum() > 1, "more rows than neighbours, and two groups, are needed"
    purity, silhouette = [], []
    for start in range(0, len(rows), block):
        mine = groups[start : start + block, None]  # (n, 1)
        own = torch.arange(start, start + len(mine))[:, None]
        # (n, N); the distance of a row to itself is set to 0, which rounding may miss
        distances = torch.cdist(rows[start : start + block], rows).scatter(1, own, 0.0)
        sums, size = distances @ members, counts[mine]  # (n, S), (n, 1)
        a = sums.gather(1, mine) / (size - 1).clamp(min=1)
        # an empty group gives nan, which becomes infinity
        b = (sums / counts).nan_to_num(torch.inf).scatter(1, mine, torch.inf).amin(1, keepdim=True)
        s = (b - a) / torch.maximum(a, b).clamp(min=torch.finfo(torch.float64).tiny)
        silhouette.append(torch.where(size > 1, s, 0.0).flatten())
        near = distances.scatter(1, own, torch.inf).topk(k, largest=False).indices  # (n, k)
        purity.append((groups[near] == mine).double().mean(1))
    return torch.cat(purity), torch.cat(silhouette)


def summary(rows: torch.Tensor, hierarchy: Hierarchy, k: int) -> dict:
    """Return the means of `separation`, overall and by superclass, and the purity expected by chance."""
    groups, names = hierarchy.parents, hierarchy.superclasses
    purity, silhouette = separation(rows, groups, k)

    def means(mine):
        return {
            "classes": len(purity[mine]),
            "purity": purity[mine].mean().item(),
            "silhouette": silhouette[mine].mean().item(),
        }

    # chance: the probability that another row, drawn uniformly, belongs to the same group
    counts, n = torch.bincount(groups).double(), len(rows)
    chance = (counts * (counts - 1)).sum().item() / (n * (n - 1))
    parts = {name: means(groups == s) for s, name in enumerate(names)}
    return means(slice(None)) | {"neighbours": k, "purity_by_chance": chance, "superclasses": parts}


def tsne(rows: torch.Tensor, perplexity: float = 30.0, seed: int = 0) -> torch.Tensor:
    """Map rows (N, D) to the plane with t-SNE (van der Maaten and Hinton, JMLR 9, 2008): float32 (N, 2).

    Raises ValueError if scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise ValueError("t-SNE needs scikit-learn, which is not installed: pip install scikit-learn.") from None
    perplexity = min(perplexity, (len(rows) - 1) / 3)  # t-SNE looks at about 3 * perplexity neighbours
    return torch.from_numpy(TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows.numpy()))
