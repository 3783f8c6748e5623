"""GPU check and precisions."""

import torch

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ("no", "fp16", "bf16")  # of --mixed-precision


def check_gpu(device):
    """ValueError if the installed torch has no kernels for this GPU, before the first of them fails."""
    if torch.device(device).type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    built = torch.cuda.get_arch_list()
    # binaries run on later minor versions of their major, PTX ("compute_NN") on anything later
    numbers = [(kind, int(digits.rstrip("af"))) for kind, digits in (a.split("_") for a in built)]
    mine = 10 * major + minor
    fits = [n <= mine if kind == "compute" else n // 10 == major and n <= mine for kind, n in numbers]
    if not any(fits):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} is sm_{mine}, expected one of {', '.join(built)}, for which torch "
            f"{torch.__version__} was built: install torch 2.10.0 with torchvision 0.25.0 (CUDA 12.6 or 12.8 builds "
            "serve sm_70 and later)."
        )


def resolve_precision(wanted, device):
    """`wanted` of --mixed-precision, or "fp16" where that is "bf16" and the GPU (before Ampere: V100) only emulates it.

    ValueError for "fp16" on a CPU.
    """
    if wanted == "fp16" and torch.device(device).type == "cpu":
        raise ValueError("--mixed-precision is fp16, expected a GPU for it and found none: choose bf16 or no.")
    if wanted != "bf16" or torch.device(device).type != "cuda":
        return wanted
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
