"""Files of weights: adapters, training states, the checkpoints of DiT and FineDiffusion."""

from checkpoint.loading import load_adapted

__all__ = ["load_adapted"]
