"""The label embedder of FineDiffusion: one table with a row for each class and each superclass.

Rows 0 .. num_classes-1 belong to the classes and rows num_classes .. num_classes+num_super_classes-1 to the superclasses
(arXiv 2402.18331, section 3.2). With a single superclass the last row is the null class of classifier-free guidance
(arXiv 2207.12598), and the module is the label embedder of a plain DiT. A table with several superclasses may end with a
null row, the root of the hierarchy, in row num_classes+num_super_classes.
"""

from collections.abc import Sequence

import torch
from torch import nn


class TieredEmbedder(nn.Module):
    """Embed class labels; in training, replace a label by its superclass with probability `dropout_prob`.

    num_classes        1 or more
    num_super_classes  1 or more; 1 makes it the label embedder of a plain DiT
    hidden_size        width D of a row
    dropout_prob       probability in 0..1 of replacing a label by its superclass
    parents            int64 (num_classes,): the superclass of each class, in 0..num_super_classes-1. It is no part of
                       the state dict. If it is None, a single superclass gets all classes; with several superclasses,
                       rows can be looked up but no label can be dropped
    null_row           add a null row at the end of the table. Labels become it only if `force_drop_ids` is 2

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
    ):
        super().__init__()
        if not 0 <= dropout_prob <= 1:
            raise ValueError(f"The label dropout is {dropout_prob}, expected a probability in 0..1.")
        if num_classes < 1 or num_super_classes < 1:
            raise ValueError(
                f"Found {num_classes} classes and {num_super_classes} superclasses, expected at least one of "
                "each: a model without superclasses has one, the null class."
            )
        # on the CPU even under a meta device: the map is an argument and never comes from the state dict
        if parents is None and num_super_classes == 1:
            parents = torch.zeros(num_classes, dtype=torch.long, device="cpu")
        if parents is not None:
            parents = torch.as_tensor(parents, dtype=torch.long, device="cpu")
            check_parents(parents, num_classes, num_super_classes)
        self.num_classes = num_classes
        self.num_super_classes = num_super_classes
        self.dropout_prob = dropout_prob
        self.null_row = null_row
        self.embedding_table = nn.Embedding(num_classes + num_super_classes + null_row, hidden_size)
        self.register_buffer("parents", parents, persistent=False)

    @property
    def has_null(self) -> bool:
        """Whether the last row is a null class: a null row, or the single superclass of a plain DiT."""
        return self.null_row or self.num_super_classes == 1

    def null_rows(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the row of the null class for each of `labels` (N,), as int64 (N,)."""
        assert self.has_null, "this embedder was made without a null row"
        return torch.full_like(labels, self.embedding_table.num_embeddings - 1)

    def superclass_rows(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the rows of the superclasses of `labels` (N,), as int64 (N,); superclass and null rows stay as they are."""
        assert self.parents is not None, "this embedder was made without a superclass map"
        rows = self.parents[labels.clamp(max=self.num_classes - 1)] + self.num_classes
        return torch.where(labels < self.num_classes, rows, labels)

    def token_drop(self, labels: torch.Tensor, force_drop_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return a copy of `labels` (N,) in which some are replaced by their superclass rows.

        force_drop_ids  (N,): 1 replaces the label by its superclass, 2 by the null row if the embedder has one, and any
                        other value keeps it. If it is None, labels are replaced at random with probability
                        `dropout_prob`, by their superclasses only
        """
        if force_drop_ids is None:
            drop = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
        else:
            drop = force_drop_ids == 1
        dropped = torch.where(drop, self.superclass_rows(labels), labels)
        if force_drop_ids is not None and self.has_null:
            dropped = torch.where(force_drop_ids == 2, self.null_rows(labels), dropped)
        return dropped

    def forward(self, labels: torch.Tensor, train: bool, force_drop_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Embed labels (N,), rows of the table, as (N, D); drop labels in training, or if `force_drop_ids` is given.

        See `token_drop` for `force_drop_ids` (N,).
        """
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels)


def check_parents(parents: torch.Tensor, num_classes: int, num_super_classes: int) -> None:
    """Raise ValueError if `parents` is not (num_classes,) with values in 0..num_super_classes-1."""
    if parents.shape != (num_classes,):
        raise ValueError(
            f"The superclass map has shape {tuple(parents.shape)}, expected ({num_classes},): pass the hierarchy of "
            "these classes."
        )
    if parents.min() < 0 or parents.max() >= num_super_classes:
        raise ValueError(
            f"The superclass map has values {parents.min()}..{parents.max()}, expected 0..{num_super_classes - 1}: "
            "pass the hierarchy of these classes."
        )
