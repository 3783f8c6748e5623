"""The label embedder of FineDiffusion: one table with a row for each class and each node of the tiers above.

Rows 0 .. num_classes-1 belong to the classes and rows num_classes .. num_classes+num_super_classes-1 to the superclasses
(arXiv 2402.18331, section 3.2). The rows of further ranks follow, from coarse to fine. With a single superclass its row is
the null class of classifier-free guidance (arXiv 2207.12598), and without further ranks the module is the label embedder of
a plain DiT. A table with several superclasses may end with a null row, the root of the hierarchy.

A tier is a rank above the classes that has rows: tier 0 are the superclasses.
"""

from collections.abc import Sequence

import torch
from torch import nn


class TieredEmbedder(nn.Module):
    """Embed class labels; in training, replace a label by an ancestor with probability `dropout_prob`.

    num_classes        1 or more
    num_super_classes  1 or more; 1 makes it the label embedder of a plain DiT
    hidden_size        width D of a row
    dropout_prob       probability in 0..1 of replacing a label by an ancestor: its superclass or, with equal probabilities,
                       its node in any tier
    parents            int64 (num_classes,): the superclass of each class, in 0..num_super_classes-1; or (tiers, num_classes):
                       its node in each tier. It is not part of the state dict. If it is None, a single superclass gets all
                       classes; otherwise rows can be looked up but no label can be dropped
    null_row           add a null row at the end of the table. Labels become it only if `force_drop_ids` is 2
    ranks              number of nodes of each tier below the superclasses
    path               embed a label as the sum of its row and those of its ancestors (arXiv 2506.01923), not as its row alone

    Raises ValueError if a size or the probability is out of range or `parents` does not fit the sizes.
    """

    def __init__(
        self,
        num_classes: int,
        num_super_classes: int,
        hidden_size: int,
        dropout_prob: float = 0.1,
        parents: torch.Tensor | Sequence[int] | None = None,
        null_row: bool = False,
        ranks: Sequence[int] = (),
        path: bool = False,
    ):
        super().__init__()
        if not 0 <= dropout_prob <= 1:
            raise ValueError(f"The label dropout is {dropout_prob}, expected a probability in 0..1.")
        sizes = (num_super_classes, *ranks)
        if num_classes < 1 or min(sizes) < 1:
            raise ValueError(
                f"Found {num_classes} classes and {num_super_classes} superclasses, expected at least one of "
                "each: a model without superclasses has one, the null class."
            )
        self.num_classes = num_classes
        self.num_super_classes = num_super_classes
        self.tiers = len(sizes)
        self.dropout_prob = dropout_prob
        self.null_row = null_row
        self.path = path
        rows = num_classes + sum(sizes) + null_row
        self.null = rows - 1 if null_row else num_classes  # the null class, if `has_null`
        self.embedding_table = nn.Embedding(rows, hidden_size)
        if parents is None and sizes == (1,):
            parents = torch.zeros(num_classes, dtype=torch.long, device="cpu")
        if parents is not None:
            # on the CPU even under a meta device: the map is an argument and never comes from the state dict
            parents = torch.as_tensor(parents, dtype=torch.long, device="cpu")
            parents = ancestor_rows(torch.atleast_2d(parents), num_classes, sizes, rows)
        self.register_buffer("ancestors", parents, persistent=False)  # (tiers, rows), see `ancestor_rows`

    @property
    def parents(self) -> torch.Tensor:
        """The superclass of each class, int64 (num_classes,)."""
        return self.ancestors[0, : self.num_classes] - self.num_classes

    @property
    def has_null(self) -> bool:
        """Whether there is a null class: a null row, or the single superclass of a plain DiT."""
        return self.null_row or self.num_super_classes == 1

    def null_rows(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the row of the null class for each of `labels` (N,), as int64 (N,)."""
        assert self.has_null, "this embedder was made without a null row"
        return torch.full_like(labels, self.null)

    def tier_rows(self, labels: torch.Tensor, tier: int) -> torch.Tensor:
        """Return the rows of the ancestors of `labels` (N,) in a tier, as int64 (N,).

        Rows of this tier or a coarser one stay as they are, and so does the null row.
        """
        assert self.ancestors is not None, "this embedder was made without a superclass map"
        return self.ancestors[tier, labels]

    def superclass_rows(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the rows of the superclasses of `labels` (N,), as int64 (N,); superclass and null rows stay as they are."""
        return self.tier_rows(labels, 0)

    def token_drop(self, labels: torch.Tensor, force_drop_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return a copy of `labels` (N,) in which some are replaced by the rows of ancestors.

        force_drop_ids  (N,): how each label is replaced, see `drop_ids`. If it is None, labels are replaced at random with
                        probability `dropout_prob`, and never by the null row
        """
        if force_drop_ids is None:
            u = torch.rand(labels.shape[0], device=labels.device)
            force_drop_ids = drop_ids(u, self.dropout_prob, tiers=self.tiers)
        dropped = labels
        for tier in range(self.tiers):
            dropped = torch.where(force_drop_ids == drop_id(tier), self.tier_rows(labels, tier), dropped)
        if self.has_null:
            dropped = torch.where(force_drop_ids == DROP_TO_NULL, self.null_rows(labels), dropped)
        return dropped

    def forward(self, labels: torch.Tensor, train: bool, force_drop_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Embed labels (N,), rows of the table, as (N, D); drop labels in training, or if `force_drop_ids` is given.

        See `token_drop` for `force_drop_ids` (N,).
        """
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            labels = self.token_drop(labels, force_drop_ids)
        embedding = self.embedding_table(labels)
        for rows in self.ancestors[:, labels] if self.path else ():  # (N,) of each tier; a row is not its own ancestor
            embedding = embedding + self.embedding_table(rows) * (rows != labels)[:, None]
        return embedding


# ---- drops ---------------------------------------------------------------------------------------

DROP_TO_NULL = 2  # drop id of the null row; 0 keeps the label


def drop_id(tier: int) -> int:
    """Return the drop id of a tier: 1, 3, 4, ... from coarse to fine."""
    return tier + 1 + (tier > 0)


def drop_ids(u: torch.Tensor, dropout_prob: float, null_prob: float = 0.0, tiers: int = 1) -> torch.Tensor:
    """Return how each label is replaced, int64 (N,): `drop_id` of a tier, DROP_TO_NULL, or 0 to keep it.

    u             (N,), uniform in [0, 1)
    dropout_prob  probability of an ancestor; all tiers have the same
    null_prob     probability of the null row
    """
    ids = (u < dropout_prob) + DROP_TO_NULL * ((u >= dropout_prob) & (u < dropout_prob + null_prob))
    for tier in range(1, tiers):
        finer = (u >= dropout_prob * tier / tiers) & (u < dropout_prob)
        ids = ids + (drop_id(tier) - drop_id(tier - 1)) * finer
    return ids


# ---- ancestors -----------------------------------------------------------------------------------


def ancestor_rows(parents: torch.Tensor, num_classes: int, sizes: Sequence[int], rows: int) -> torch.Tensor:
    """Return the row of each row's ancestor in each tier, int64 (tiers, rows).

    A row that has no ancestor in a tier, being of that tier or a coarser one, is given itself.

    parents  int64 (tiers, num_classes): the node of each class in each tier
    sizes    number of nodes of each tier
    rows     rows of the table

    Raises ValueError if the parents are out of range.
    """
    if parents.shape != (len(sizes), num_classes):
        raise ValueError(
            f"The superclass map has shape {tuple(parents.shape)}, expected {(len(sizes), num_classes)}: pass the hierarchy "
            "of these classes."
        )
    for nodes, size in zip(parents, sizes):
        if nodes.min() < 0 or nodes.max() >= size:
            raise ValueError(
                f"The superclass map has values {nodes.min()}..{nodes.max()}, expected 0..{size - 1}: "
                "pass the hierarchy of these classes."
            )
    first = [num_classes + sum(sizes[:tier]) for tier in range(len(sizes))]  # row of each tier
    found = torch.arange(rows, device="cpu").repeat(len(sizes), 1)
    for coarse, ancestors in enumerate(found):
        ancestors[:num_classes] = first[coarse] + parents[coarse]
        for fine in range(coarse + 1, len(sizes)):
            ancestors[first[fine] + parents[fine]] = first[coarse] + parents[coarse]
    return found
