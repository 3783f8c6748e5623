"""Which rows of one class table mean the same class, superclass or null class as rows of another."""

import torch

from checkpoint.description import ModelDescription
from hierarchy import Hierarchy
from hierarchy.search import plain

Key = tuple[str, str]


def row_keys(description: ModelDescription) -> list[Key]:
    """Return the meaning of each row of the class table, in order.

    It is ("class", name), ("superclass", name), ("rank NAME", name) for the further ranks, and ("null", "").
    """
    hierarchy = description.hierarchy
    keys = [("class", name) for name in hierarchy.classes]
    if description.tiered:
        kinds = ["superclass", *(f"rank {rank.name}" for rank in hierarchy.ranks)]
        keys += [(kind, name) for kind, tier in zip(kinds, hierarchy.tiers) for name in tier.nodes]
    if description.embedder == "null" or description.null_row:
        keys.append(("null", ""))
    return keys


def find_row(description: ModelDescription, query: str) -> int:
    """Return the row of a class, see `Hierarchy.find`, or of a node above the classes, as NAME or RANK=NAME.

    Raises ValueError if the query fits no row or several.
    """
    query = str(query).strip()
    if query in description.hierarchy.classes or query.isdigit():
        return description.hierarchy.find(query)
    *ranks, name = query.split("=", 1)
    found = {
        rank: description.hierarchy.num_classes + k
        for k, (rank, node) in enumerate(nodes(description))
        if plain(node) == plain(name) and rank in (ranks or [rank])
    }
    if len(found) > 1:
        ranks = " and ".join(found)
        raise ValueError(f"{query!r} names nodes of {ranks}, expected one: write {next(iter(found))}={query}.")
    return next(iter(found.values())) if found else description.hierarchy.find(query)


def nodes(description: ModelDescription) -> list[tuple[str, str]]:
    """Return (rank, name) of each row between those of the classes and the null row."""
    tiers = description.hierarchy.tiers if description.tiered else ()
    return [(tier.name, name) for tier in tiers for name in tier.nodes]


def match_rows(now: ModelDescription, before: ModelDescription) -> list[int | None]:
    """Return for each row of the table of `now` the row of `before` that means the same, or None.

    Classes are matched by name, or by label if one of the hierarchies has only numbers and both have the same parents.
    Superclasses are matched by name, or by having the same classes.
    """
    renamed = dict(zip(before.hierarchy.classes, now.hierarchy.classes)) if same_but_for_names(now, before) else {}
    rows = {}
    for row, (kind, name) in enumerate(row_keys(before)):
        rows[kind, renamed.get(name, name) if kind == "class" else name] = row
    members_before = {classes: name for name, classes in members(before.hierarchy, renamed).items()}
    members_now = members(now.hierarchy, {})

    def find(key: Key) -> int | None:
        if key in rows or key[0] != "superclass":
            return rows.get(key)
        return rows.get(("superclass", members_before.get(members_now.get(key[1]))))

    return [find(key) for key in row_keys(now)]


def same_but_for_names(now: ModelDescription, before: ModelDescription) -> bool:
    """Return whether labels mean the same classes in both, although one of the hierarchies has only numbers."""
    ours, theirs = now.hierarchy, before.hierarchy
    if not (ours.numbered or theirs.numbered) or not (ours.has_parents and theirs.has_parents):
        return False
    return ours.num_classes == theirs.num_classes and ours.parents.equal(theirs.parents)


def members(hierarchy: Hierarchy, renamed: dict[str, str]) -> dict[str, frozenset[str]]:
    """Return the names of the classes of each superclass; empty if they are not known."""
    if not hierarchy.has_parents:
        return {}
    found = {name: set() for name in hierarchy.superclasses}
    for name, parent in zip(hierarchy.classes, hierarchy.parents.tolist()):
        found[hierarchy.superclasses[parent]].add(renamed.get(name, name))
    return {name: frozenset(classes) for name, classes in found.items()}


# ---- extensions: tables with rows for further classes --------------------------------------------


def new_rows(now: ModelDescription, before: ModelDescription) -> list[int]:
    """Return the rows of the table of `now` that the table of `before` lacks."""
    return [row for row, match in enumerate(match_rows(now, before)) if match is None]


def insert_rows(
    rows: torch.Tensor, now: ModelDescription, table: torch.Tensor, before: ModelDescription, source: object
) -> torch.Tensor:
    """Return the table of `now`: the rows of a patch (k, D) in their places, all others from the table of `before`.

    Raises ValueError, which names `source`, if these are not all rows.
    """
    matches = match_rows(now, before)
    wanted = [row for row, match in enumerate(matches) if match is None]
    if now.patch_rows != wanted or rows.shape != (len(wanted), table.shape[1]):
        raise ValueError(
            f"{source} has {tuple(rows.shape)} numbers for rows {now.patch_rows}, expected those that its base lacks: get "
            "the file and its base again."
        )
    result = rows.new_zeros(len(matches), table.shape[1])
    carried = [row for row, match in enumerate(matches) if match is not None]
    result[carried] = table[[matches[row] for row in carried]].to(rows.dtype)
    result[wanted] = rows
    return result


def initial_rows(now: ModelDescription, before: ModelDescription, table: torch.Tensor) -> torch.Tensor:
    """Return the rows with which the table of an extension starts, for all rows of `now`, (rows, D).

    A class has the mean of its superclass's original classes, any other node the mean of its rank's rows, or of all
    original classes if there are none. Original are the classes before the first extension, so that the
    order of extensions does not matter. table: of `before`
    """
    originals = table[: now.original_classes].float()
    parents, superclasses = now.hierarchy.parents.to(table.device), now.hierarchy.num_super_classes
    sums = originals.new_zeros(superclasses, originals.shape[1]).index_add_(0, parents[: len(originals)], originals)
    counts = parents[: len(originals)].bincount(minlength=superclasses)[:, None]
    means = torch.where(counts > 0, sums / counts.clamp(min=1), originals.mean(0))  # of each superclass
    kinds = [kind for kind, _ in row_keys(before)]

    def mean_of(kind):
        rows = [row for row, other in enumerate(kinds) if other == kind]
        return (table[rows].float() if rows else originals).mean(0)

    mean = {kind: mean_of(kind) for kind, _ in row_keys(now)[len(parents) :]}
    return torch.stack([*means[parents], *(mean[kind] for kind, _ in row_keys(now)[len(parents) :])])
