"""Private attributes of other packages: each has one place here, with the version that it was checked against."""

from collections.abc import Iterator

import torch
from torch import nn

# ---- torch ---------------------------------------------------------------------------------------


def ddp_exchanged_bytes(wrapped: nn.parallel.DistributedDataParallel) -> int:
    """Return the bytes of gradients that a step exchanges.

    torch 2.10: a prototype interface, which torch has no public one for.
    """
    return wrapped._get_ddp_logging_data()["total_parameter_size_bytes"]


def shutdown_workers(batches: Iterator):
    """End the workers of a DataLoader's iterator; it must have some.

    torch 2.10: otherwise they end only when the iterator is deleted, which an exception's traceback delays.
    """
    batches._shutdown_workers()


def skip_update_if(optimizer: torch.optim.Optimizer, flag: torch.Tensor):
    """Make the next steps of a fused AdamW leave everything unchanged if `flag`, a scalar on its device, is not 0.

    torch 2.10: fused AdamW reads this attribute, which otherwise only the fp16 gradient scaler sets.
    """
    optimizer.found_inf = flag


def run_eagerly_if_compilation_fails():
    """Let torch.compile warn and run a model uncompiled if it cannot compile it (torch 2.10: an option in a private module)."""
    import torch._dynamo  # slow to import

    torch._dynamo.config.suppress_errors = True


def lerp_all(tensors: list[torch.Tensor], ends: list[torch.Tensor], weight: float):
    """Move each tensor towards its end, in place: t <- t + weight (end - t).

    torch 2.10: one kernel for many tensors instead of one for each.
    """
    torch._foreach_lerp_(tensors, ends, weight)


# ---- accelerate ----------------------------------------------------------------------------------


def reset_accelerate():
    """Forget the Accelerator of this process, so that another one may have other settings.

    accelerate 1.15: its states are singletons, and only its own tests reset them.
    """
    from accelerate.state import AcceleratorState, GradientState  # slow to import

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def accelerator_state() -> dict:
    """Return a copy of the state that all Accelerators share (accelerate 1.15)."""
    from accelerate.state import AcceleratorState

    return dict(AcceleratorState._shared_state)


def restore_accelerator_state(state: dict):
    """Put a state from `accelerator_state` back, for the Accelerator that it belonged to (accelerate 1.15)."""
    from accelerate.state import AcceleratorState

    AcceleratorState._shared_state.update(state)
