"""The order of training data: a function of the seed and the step."""

from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Sampler

# ---- the order of a training ---------------------------------------------------------------------


class StepBatches(Sampler):
    """Batch sampler: this rank's rows of step start_step, start_step + 1, ... (no end if max_steps
    is None, else up to step max_steps - 1).

    Epoch e is a permutation drawn from (seed, e); step k has rows k mod steps_per_epoch of epoch
    k // steps_per_epoch, the last incomplete batch is dropped, and rank r takes the r-th of `world`
    equal slices. Every start of the iteration begins at start_step.
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
            near = max(1, round(global_batch / world)) * world
            raise ValueError(
                f"--global-batch-size {global_batch} does not divide among {world} processes: "
                f"the nearest that does is {near}."
            )
        if n < global_batch:
            raise ValueError(
                f"The data has {n} images, fewer than --global-batch-size {global_batch}: "
                f"pass at most {n // world * world}."
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"--global-seed is {seed}; expected 0 to {2**32 - 1}.")
        self.n, self.global_batch, self.seed = n, global_batch, seed
        self.rank, self.world = rank, world
        self.start_step, self.max_steps = start_step, max_steps
        self.steps_per_epoch = n // global_batch
        self.share = global_batch // world
        self.mine = slice(rank * self.share, (rank + 1) * self.share)

    def __iter__(self):
        step = self.start_step
        while self.max_steps is None or step < self.max_steps:
            yield self.rows(step)[self.mine].tolist()
            step += 1

    def rows(self, step: int) -> torch.Tensor:
        """The whole batch of a step, that of all ranks: int64 (global_batch,)."""
        epoch, k = divmod(step, self.steps_per_epoch)
        return epoch_order(self.n, self.seed, epoch)[k * self.global_batch : (k + 1) * self.global_batch]

    def __len__(self):
        if self.max_steps is None:
            raise TypeError("StepBatches without max_steps has no end.")
        return max(0, self.max_steps - self.start_step)


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """Permutation of n by (seed, epoch). torch's CPU generator reads only the low 32 bits of its
    seed, so the pair is hashed to 32 bits rather than shifted together."""
    mixed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))
