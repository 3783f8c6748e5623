"""A diffusion process over a subset of the timesteps that its model was trained on."""

from collections.abc import Collection, Sequence
from itertools import accumulate, repeat

import numpy as np
import torch

from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | int | Sequence[int]) -> set[int]:
    """Return the timesteps, out of 0..num_timesteps-1, that a shorter process keeps.

    section_counts  "250" or 250: this many steps, evenly spaced from the first timestep to the last.
                    "10,15,25" or a list: the same in each of as many sections of equal length.
                    "ddim25": 25 timesteps 0, s, 2s, .. with an integer stride s, as DDIM has them

    A process of a single step keeps the last timestep: it starts from pure noise, and timestep 0 would return that noise.

    Raises ValueError if the counts cannot be read or do not fit.
    """
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        kept = _integer_stride(num_timesteps, *_integers(section_counts[len("ddim") :], 1))
        return kept if len(kept) > 1 else {num_timesteps - 1}
    if isinstance(section_counts, str):
        counts = _integers(section_counts)
    else:
        counts = [section_counts] if isinstance(section_counts, int) else list(section_counts)
    if min(counts, default=0) < 0 or sum(counts) == 0:
        raise ValueError(f"Found step counts {counts}, expected counts of 0 or more and at least one step.")
    if sum(counts) == 1:
        return {num_timesteps - 1}

    size, longer = divmod(num_timesteps, len(counts))  # the first `longer` sections hold one timestep more
    kept, start = set(), 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if count > length:
            raise ValueError(
                f"Found {count} steps for a section of {length} timesteps, expected at most one step per timestep: "
                "choose fewer."
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # A running sum, not k * stride, as in DiT's code: if k * stride ends in .5, the last bits of the sum choose the
        # timestep, and "250" must be the same process in every implementation.
        offsets = accumulate(repeat(stride, max(count - 1, 0)), initial=0.0)
        kept.update(start + round(offset) for offset, _ in zip(offsets, range(count)))
        start += length
    return kept


def _integer_stride(num_timesteps, count):
    for stride in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, stride)) == count:
            return set(range(0, num_timesteps, stride))
    raise ValueError(
        f'Found "ddim{count}", but no integer stride keeps {count} of {num_timesteps} timesteps: choose another count, '
        "such as ddim25, ddim50 or ddim100."
    )


def _integers(text, limit=None):
    fields = text.split(",")
    if not all(field.strip().isdecimal() for field in fields) or (limit and len(fields) > limit):
        raise ValueError(
            f'Found timestep respacing "{text}", expected a count such as "250", counts such as "10,15,25", or "ddim" '
            'and one count such as "ddim25".'
        )
    return [int(field) for field in fields]


class SpacedDiffusion(GaussianDiffusion):
    """The process of `betas`, restricted to some of its timesteps.

    use_timesteps  the kept timesteps, out of 0..original_num_steps-1
    betas          (original_num_steps,) of the complete process
    kwargs         other arguments of `GaussianDiffusion`

    Every t of its methods counts the kept timesteps, 0..num_timesteps-1; the model receives the original timestep,
    `timestep_map[t]`.
    """

    def __init__(self, use_timesteps: Collection[int], *, betas: np.ndarray, **kwargs):
        self.timestep_map = sorted(use_timesteps)
        self.original_num_steps = len(betas)
        assert self.timestep_map and set(self.timestep_map) <= set(range(len(betas))), use_timesteps
        # The kept timesteps have their original alpha_bar; the betas between them follow from it.
        kept = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))[self.timestep_map]
        super().__init__(betas=1.0 - kept / np.append(1.0, kept[:-1]), **kwargs)
        self._map_on = {}  # device -> (num_timesteps,) int64

    def model_timesteps(self, t: torch.Tensor | int) -> torch.Tensor | int:
        """Convert t, positions (N,) among the kept timesteps or one of them, to original timesteps."""
        if isinstance(t, int):
            return self.timestep_map[t]
        if t.device not in self._map_on:
            self._map_on[t.device] = torch.tensor(self.timestep_map, device=t.device)
        return self._map_on[t.device][t]
