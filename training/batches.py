"""The order of training data: which images each step has, as a function of the seed and the step."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Sampler


class StepBatches(Sampler):
    """Batch sampler of this process's dataset rows in the steps start_step, start_step + 1, ..., max_steps - 1.

    Epoch e is a permutation of the n images, drawn from (seed, e). Step k has the rows k mod steps_per_epoch of epoch
    k // steps_per_epoch; the last incomplete batch of an epoch is dropped. Rank r takes slice r of `world` equal slices.
    Every iteration begins at start_step, and has no end if max_steps is None.

    steps_per_epoch  complete global batches in an epoch
    local_batch      images per step in this process
    local_slice      this process's rows in the global batch

    Raises ValueError if the global batch is not a multiple of the processes or exceeds the data, or for a seed that is out
    of range.
    """

    def __init__(
        self,
        n: int,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        max_steps: int | None = None,
    ):
        assert 0 <= rank < world and start_step >= 0
        if global_batch < 1 or global_batch % world:
            nearest = max(1, round(global_batch / world)) * world
            raise ValueError(
                f"--global-batch-size is {global_batch}, expected a multiple of the number of processes ({world}): "
                f"pass {nearest}."
            )
        if n < global_batch:
            raise ValueError(
                f"The data has {n} images, fewer than --global-batch-size {global_batch}: pass at most {n // world * world}."
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"--global-seed is {seed}, expected 0 to {2**32 - 1}.")
        self.n, self.global_batch, self.seed = n, global_batch, seed
        self.rank, self.world = rank, world
        self.start_step, self.max_steps = start_step, max_steps
        self.steps_per_epoch = n // global_batch
        self.local_batch = global_batch // world
        self.local_slice = slice(rank * self.local_batch, (rank + 1) * self.local_batch)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while self.max_steps is None or step < self.max_steps:
            yield self.rows(step)[self.local_slice].tolist()
            step += 1

    def rows(self, step: int) -> torch.Tensor:
        """Return the dataset rows of a step's global batch, int64 (global_batch,)."""
        epoch, k = divmod(step, self.steps_per_epoch)
        return epoch_order(self.n, self.seed, epoch)[k * self.global_batch : (k + 1) * self.global_batch]

    def __len__(self) -> int:
        if self.max_steps is None:
            raise TypeError("StepBatches without max_steps has no end.")
        return max(0, self.max_steps - self.start_step)


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the permutation of n images in an epoch, int64 (n,).

    torch's CPU generator reads only the low 32 bits of its seed, so (seed, epoch) is hashed to 32 bits.
    """
    mixed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))
