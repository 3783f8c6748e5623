"""Check the GPU; precisions."""

import torch

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ("no", "fp16", "bf16")  # choices of --mixed-precision


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


def resolve_precision(wanted: str, device: str | torch.device) -> str:
    """Return the precision to use for --mixed-precision: "fp16" for "bf16" on a GPU that only emulates it (V100).

    Raises ValueError for "fp16" on a CPU.
    """
    if wanted == "fp16" and torch.device(device).type == "cpu":
        raise ValueError("--mixed-precision is fp16, expected a GPU for it, found none: choose bf16 or no.")
    if wanted != "bf16" or torch.device(device).type != "cuda":
        return wanted
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
