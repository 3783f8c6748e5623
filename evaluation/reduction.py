"""Sums and lists over all processes; without torch.distributed they return their input."""

import torch
from torch import distributed

from evaluation.metrics import FLOAT, Moments


def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """Add up the processes' tensors of one shape, in place on every process."""
    if distributed.is_initialized():
        distributed.all_reduce(x)
    return x


def gather_on_main(item: object) -> list | None:
    """Return every process's item in the order of ranks on the main process, None on the others."""
    if not distributed.is_initialized():
        return [item]
    items = [None] * distributed.get_world_size() if distributed.get_rank() == 0 else None
    distributed.gather_object(item, items)
    return items


def merge_over_processes(moments: Moments) -> Moments:
    """Return the moments of all processes' rows, from scatters about their common mean."""
    if not distributed.is_initialized():
        return moments
    total = Moments(len(moments.mean), moments.mean.device)
    n = sum_over_processes(torch.tensor(float(moments.n), dtype=FLOAT, device=moments.mean.device))
    total.n = int(n)
    total.mean = sum_over_processes(moments.mean * moments.n) / n
    total.scatter = sum_over_processes(moments.scatter_about(total.mean))
    return total
