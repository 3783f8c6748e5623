"""Every Python on the stand-in GPU runs this at its start: it changes torch as soon as that is imported.

There is no cuDNN: a convolution returns an empty tensor of the right shape. A collective of Python objects would compute
on the GPU: it goes over gloo. Numbers are leftovers: on the CPU they pass for finite, and on the GPU none are non-zero, or
the first one where a caller needs one (`as_tuple`).
"""

import importlib.abc
import importlib.util
import sys
import warnings


class AfterTorch(importlib.abc.MetaPathFinder):
    """Import torch as always, then call `adapt`."""

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            adapt(module)

        spec.loader.exec_module = exec_module
        return spec


def adapt(torch):
    torch.backends.cudnn.enabled = False
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # that it overrides torch's own
        library.impl("_slow_conv2d_forward", convolution, "CUDA")
    torch.standin_library = library  # it is undone when it is collected
    isfinite, nonzero = torch.Tensor.isfinite, torch.Tensor.nonzero
    torch.Tensor.isfinite = lambda x: isfinite(x) if x.is_cuda else torch.ones(x.shape, dtype=torch.bool)

    def found(x, as_tuple=False):
        if not x.is_cuda:
            return nonzero(x, as_tuple=as_tuple)
        return x.ndim * (torch.zeros(1, dtype=torch.long),) if as_tuple else torch.empty(0, x.ndim, dtype=torch.long)

    torch.Tensor.nonzero = found
    distributed, groups = torch.distributed, []
    modules = distributed, distributed.distributed_c10d

    def over_gloo(function):
        def call(*arguments, group=None, **options):
            if not groups:
                groups.append(distributed.new_group(backend="gloo"))
            return function(*arguments, group=groups[0], **options)

        return call

    for name in ("broadcast_object_list", "gather_object", "all_gather_object"):
        replacement = over_gloo(getattr(modules[1], name))
        for module in modules:
            setattr(module, name, replacement)


def convolution(x, weight, kernel, bias, stride, padding):
    """Return what _slow_conv2d_forward would, uninitialized; x: (N, C, H, W)."""
    sides = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], padding, kernel, stride)]
    return x.new_empty(len(x), len(weight), *sides)


sys.meta_path.insert(0, AfterTorch())
