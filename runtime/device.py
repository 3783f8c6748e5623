"""Decide how a device computes: precision, TF32, compilation; check the GPU."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime.private import run_eagerly_if_compilation_fails

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ("auto", "no", "fp16", "bf16")  # choices of --mixed-precision
PRECISION_HELP = "auto: bf16 on GPUs from Ampere on, fp16 on older ones, float32 on a CPU; no: float32"
COMPILE_HELP = "torch.compile every block; if not given, on a GPU in runs long enough to repay it"
COMPILED_STEPS = 1000  # fewest steps of a run that is compiled unasked; compiling takes a minute


def best_device() -> str:
    """Return "cuda", or "mps" for the GPU of an Apple computer, or "cpu" without a GPU."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def check_gpu(device: str | torch.device):
    """Raise ValueError if the installed torch has no kernels for this GPU, before the first kernel fails."""
    if torch.device(device).type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    built = torch.cuda.get_arch_list()
    # binaries ("sm_NN") run on later minor versions of the same major version, PTX ("compute_NN") on all later ones
    versions = [(kind, int(digits.rstrip("af"))) for kind, digits in (name.split("_") for name in built)]
    own = 10 * major + minor
    fits = [n <= own if kind == "compute" else n // 10 == major and n <= own for kind, n in versions]
    if not any(fits):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} is sm_{own}, expected one of {', '.join(built)}, for which torch "
            f"{torch.__version__} was built: install torch 2.10.0 with torchvision 0.25.0 (CUDA 12.6 or 12.8 builds "
            "serve sm_70 and later)."
        )


@contextmanager
def explain_full_memory(images: int | None, advice: str) -> Iterator[None]:
    """Raise ValueError with advice if the GPU's memory is full.

    images: in a forward pass; None while weights are loaded
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        when = f"with {images} images in a forward pass" if images else "while weights are loaded"
        raise ValueError(
            f"The GPU's memory is full {when} ({str(error).split('. ')[0]}), expected room: {advice}."
        ) from None


# ---- precision -----------------------------------------------------------------------------------


def resolve_precision(wanted: str, device: str | torch.device) -> str:
    """Return the precision to use for --mixed-precision: "no", "fp16" or "bf16".

    A GPU that only emulates bf16 (before Ampere, such as the V100) computes in fp16 for "auto" and for "bf16". "auto" is
    "no" on a CPU. Raises ValueError for "fp16" on a CPU.
    """
    gpu = torch.device(device).type == "cuda"
    if wanted == "fp16" and torch.device(device).type == "cpu":
        raise ValueError("--mixed-precision is fp16, expected a GPU for it, found none: choose bf16 or no.")
    if wanted == "auto":
        wanted = "bf16" if gpu else "no"
    if wanted == "bf16" and gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return wanted


def half_dtype(precision: str) -> torch.dtype | None:
    """Return the half-precision type of a precision "fp16" or "bf16", None for "no"."""
    return None if precision == "no" else DTYPES[precision]


def set_tf32(allow: bool):
    """Use TF32 in float32 matrix products and convolutions, on GPUs from Ampere on, or do not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow


def describe_computation(device: str | torch.device, precision: str, compiled: bool) -> str:
    """Return the device, the precision and whether the blocks are compiled, such as "NVIDIA H200, bf16, compiled"."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"
    return ", ".join([name, precision if precision != "no" else "float32", *["compiled"] * compiled])


def compute_deterministically():
    """Make every operation give the same bits in each run, also where a GPU has a faster way; call it before CUDA starts.

    The backward pass of flash attention otherwise adds the parts of a gradient in any order, if there are more than two:
    from 512 pixels on (1024 tokens, in parts of 128), not at 256 pixels.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # all memory is written before it is read


# ---- compilation ---------------------------------------------------------------------------------


def resolve_compile(wanted: bool | None, device: str | torch.device, steps: int) -> bool:
    """Return whether to compile the model's blocks.

    wanted  --compile or --no-compile, or None if neither was given: then a run of at least COMPILED_STEPS steps on a GPU is
            compiled, if the tools for it are installed
    steps   forward passes, or training steps, of the run
    """
    if wanted is not None:
        return wanted
    if torch.device(device).type != "cuda" or steps < COMPILED_STEPS or not can_compile():
        return False
    run_eagerly_if_compilation_fails()  # nobody asked for it
    return True


def can_compile() -> bool:
    """Return whether Triton's tools are there: a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and Path(sysconfig.get_path("include"), "Python.h").is_file()
