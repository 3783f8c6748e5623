"""Samplers, and the parts of the sampling commands."""

from sampling.samplers import sample_keyed, sample_latents

__all__ = ["sample_keyed", "sample_latents"]
