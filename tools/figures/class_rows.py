"""How the class rows of the label embedder lie: do classes of one superclass lie together?

`separation` answers on the rows as they are; the map of `tsne` is for the eye, and its distances mean little.
Shapes: N rows (N, D), groups int64 (N,) with values 0..S-1, the superclasses.
"""

import torch

from checkpoint.download import find_weights
from checkpoint.format import read_weights
from checkpoint.loading import TABLE
from hierarchy import Hierarchy


def table_of(path, spec=None):
    """(class rows (N, D), superclass rows (S, D) or None, hierarchy) of an adapter, or of a checkpoint with the hierarchy
    `spec`; float32."""
    tensors, description = read_weights(find_weights(path))
    hierarchy = Hierarchy.load(spec) if spec else description and description.hierarchy
    if hierarchy is None:
        raise ValueError(f"{path} does not know the superclasses of its classes: pass --hierarchy, such as inat2021.")
    rows = tensors.get(TABLE)
    n, s = hierarchy.num_classes, hierarchy.num_super_classes
    if rows is None or len(rows) - n not in (1, s, s + 1):  # a null row, superclass rows, or both
        found = "no class table" if rows is None else f"a class table of {len(rows)} rows"
        raise ValueError(
            f"{path} has {found}, expected one for {hierarchy!r}: name an adapter, or pass the --hierarchy it was trained on."
        )
    return rows[:n].float(), rows[n : n + s].float() if len(rows) >= n + s else None, hierarchy


def separation(rows, groups, k=10, block=1024):
    """For each row, by Euclidean distance, float64 (N,) and (N,):

    purity      the share of its k nearest rows that are of its group, 0..1: the neighbourhood hit of Paulovich et al.,
                IEEE TVCG 14(3), 2008
    silhouette  (b - a) / max(a, b), -1..1, with a the mean distance to the other rows of its group and b the least mean
                distance to another group; 0 where it is alone in its group: Rousseeuw, J. Comput. Appl. Math. 20, 1987
    """
    rows = rows.double()
    members = torch.nn.functional.one_hot(groups).double()  # (N, S)
    counts = members.sum(0)
    assert len(rows) > k and (counts > 0).sum() > 1, "more rows than neighbours, and two groups, are needed"
    purity, silhouette = [], []
    for start in range(0, len(rows), block):
        mine = groups[start : start + block, None]  # (n, 1)
        own = torch.arange(start, start + len(mine))[:, None]
        distances = torch.cdist(rows[start : start + block], rows).scatter(1, own, 0.0)  # (n, N); rounding, where not 0
        sums, size = distances @ members, counts[mine]  # (n, S), (n, 1)
        a = sums.gather(1, mine) / (size - 1).clamp(min=1)
        b = (sums / counts).nan_to_num(torch.inf).scatter(1, mine, torch.inf).amin(1, keepdim=True)  # nan: of no rows
        s = (b - a) / torch.maximum(a, b).clamp(min=torch.finfo(torch.float64).tiny)
        silhouette.append(torch.where(size > 1, s, 0.0).flatten())
        near = distances.scatter(1, own, torch.inf).topk(k, largest=False).indices  # (n, k)
        purity.append((groups[near] == mine).double().mean(1))
    return torch.cat(purity), torch.cat(silhouette)


def summary(rows, hierarchy, k):
    """The means of `separation`, overall and by superclass, and the purity to expect of rows that lie anyhow."""
    groups, names = hierarchy.parents, hierarchy.superclasses
    purity, silhouette = separation(rows, groups, k)

    def means(mine):
        return {
            "classes": len(purity[mine]),
            "purity": purity[mine].mean().item(),
            "silhouette": silhouette[mine].mean().item(),
        }

    counts = torch.bincount(groups).double()
    chance = (counts * (counts - 1)).sum().item() / (
        len(rows) * (len(rows) - 1)
    )  # of another row to be of the same group
    parts = {name: means(groups == s) for s, name in enumerate(names)}
    return means(slice(None)) | {"neighbours": k, "purity_by_chance": chance, "superclasses": parts}


def tsne(rows, perplexity=30.0, seed=0):
    """t-SNE (van der Maaten and Hinton, JMLR 9, 2008) of rows (N, D) in the plane: float32 (N, 2).

    ValueError where scikit-learn, whose it is, is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise ValueError("t-SNE is scikit-learn's, which is not installed here: pip install scikit-learn.") from None
    perplexity = min(perplexity, (len(rows) - 1) / 3)  # which has about three times as many neighbours
    return torch.from_numpy(TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows.numpy()))
