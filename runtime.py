"""Plumbing that every script shares: a user's mistake as one sentence, files that appear whole, the device."""

import hashlib
import os
import sys
from pathlib import Path

import torch


def run_command(main):
    """Call `main()`; a ValueError or an unusable path, the user's mistake, becomes one line on stderr and exit code 2."""
    try:
        return main()
    except ValueError as error:
        text = str(error)
    except OSError as error:
        if error.filename is None:
            raise
        text = f"{error.filename} cannot be used ({error.strerror}): check it or choose another path."
    print(f"{Path(sys.argv[0]).name}: {' '.join(text.split())}", file=sys.stderr)
    raise SystemExit(2)


def write_whole(path, write):
    """Call `write(temporary path)`, then move the file to `path`: it appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
