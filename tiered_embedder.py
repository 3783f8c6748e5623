"""One table with a row per class and a row per superclass: the label embedder of FineDiffusion.

Rows `0 .. num_classes-1` belong to the classes, rows `num_classes .. num_classes+num_super_classes-1` to the
superclasses (arXiv 2402.18331, section 3.2). With a single superclass the last row is the null class of
classifier-free guidance (arXiv 2207.12598), and the module is the label embedder of a plain DiT. A tiered table may
have a null row too, the root of the hierarchy: the last one, `num_classes+num_super_classes`.
"""

import torch
from torch import nn


class TieredEmbedder(nn.Module):
    """Embed class labels; in training, replace a label by its superclass's with probability `dropout_prob`.

    `parents`: LongTensor (num_classes,), values in `0 .. num_super_classes-1`. It is not part of the state dict. It
    may be None: all zeros for a single superclass; else only rows can be looked up and nothing can be dropped.
    `null_row`: one more row below the superclasses', to which labels drop where they are forced to.
    """

    def __init__(self, num_classes, num_super_classes, hidden_size, dropout_prob=0.1, parents=None, null_row=False):
        super().__init__()
        if not 0 <= dropout_prob <= 1:
            raise ValueError(f"The label dropout is {dropout_prob}, expected a probability: choose one in 0..1.")
        if num_classes < 1 or num_super_classes < 1:
            raise ValueError(
                f"Found {num_classes} classes and {num_super_classes} superclasses, expected at least one of "
                "each: a model without superclasses has one, the null class."
            )
        if parents is None and num_super_classes == 1:
            parents = torch.zeros(num_classes, dtype=torch.long, device="cpu")
        if parents is not None:
            parents = torch.as_tensor(parents, dtype=torch.long, device="cpu")  # even under a meta device
            if parents.shape != (num_classes,):
                raise ValueError(
                    f"The map of superclasses has shape {tuple(parents.shape)}, expected ({num_classes},): "
                    "pass the hierarchy of these classes."
                )
            if parents.min() < 0 or parents.max() >= num_super_classes:
                raise ValueError(
                    f"The map of superclasses has values {parents.min()}..{parents.max()}, expected "
                    f"0..{num_super_classes - 1}: pass the hierarchy of these classes."
                )
        self.num_classes = num_classes
        self.num_super_classes = num_super_classes
        self.dropout_prob = dropout_prob
        self.null_row = null_row
        self.embedding_table = nn.Embedding(num_classes + num_super_classes + null_row, hidden_size)
        self.register_buffer("parents", parents, persistent=False)

    @property
    def has_null(self):
        """True where the last row is a null class: the row asked for, or the only superclass of a plain DiT."""
        return self.null_row or self.num_super_classes == 1

    def null_rows(self, labels):
        """The null class's row for each of `labels` (N,)."""
        assert self.has_null, "this embedder was made without a null row"
        return torch.full_like(labels, self.embedding_table.num_embeddings - 1)

    def superclass_rows(self, labels):
        """Rows of the superclasses of `labels` (N,); a label that already is a superclass or null row stays."""
        assert self.parents is not None, "this embedder was made without a map of superclasses"
        rows = self.parents[labels.clamp(max=self.num_classes - 1)] + self.num_classes
        return torch.where(labels < self.num_classes, rows, labels)

    def token_drop(self, labels, force_drop_ids=None):
        """A copy of `labels` (N,), superclass rows where dropped: at random, or where `force_drop_ids` (N,) is 1.

        Where `force_drop_ids` is 2 the null row takes the label's place, if the embedder has one.
        """
        if force_drop_ids is None:
            drop = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
        else:
            drop = force_drop_ids == 1
        dropped = torch.where(drop, self.superclass_rows(labels), labels)
        if force_drop_ids is not None and self.has_null:
            dropped = torch.where(force_drop_ids == 2, self.null_rows(labels), dropped)
        return dropped

    def forward(self, labels, train, force_drop_ids=None):
        """labels: (N,) rows of the table -> (N, hidden_size). Drops when `train`, or where forced."""
        if (train and self.dropout_prob > 0) or force_drop_ids is not None:
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels)
