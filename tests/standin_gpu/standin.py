"""A stand-in GPU for machines without one: PyTorch runs on it, but its kernels compute nothing.

    python tests/standin_gpu/standin.py h200 train.py --model DiT-S/4 ...
    python tests/standin_gpu/standin.py v100 -m pytest -m gpu tests/gpu

runs a program on a pretended H200, A100 or V100. PyTorch's dispatcher, autocast, autograd, caching allocator, NCCL process
group, Inductor and Triton run unchanged above a CUDA runtime of our own (runtime.c, nccl.c, driver.c). It shows dtype and
device mistakes, launches, waits of the CPU, peak memory, out-of-memory errors, graph breaks and recompilations. Numbers
and GPU times mean nothing: tensors hold zeros or leftovers.

Needs gcc and the CUDA build of torch 2.10.0 from PyPI; another torch may need other functions.
"""

import ctypes
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CARDS = ("h200", "a100", "v100")
TORCH = "2.10.0"
COUNTERS = "launches", "products", "waits", "copies", "replays"  # as in runtime.c


def obstacle() -> str | None:
    """Return the reason why the stand-in cannot be built here, or None."""
    if not shutil.which("gcc"):
        return "the stand-in GPU needs gcc"
    version = importlib.metadata.version("torch").split("+")[0]
    if version != TORCH:
        return f"the stand-in GPU is written for torch {TORCH}, found {version}"
    if not headers().is_dir() or not list(Path(sysconfig.get_paths()["purelib"]).glob("torch/lib/libtorch_cuda.so")):
        return "the stand-in GPU needs the CUDA build of torch"
    return None


def headers() -> Path:
    """Return the folder of CUDA's headers that comes with Triton."""
    return Path(sysconfig.get_paths()["purelib"], "triton/backends/nvidia/include")


def build(folder: Path):
    """Compile the stand-in into a folder, unless it is there."""
    if (folder / "libcuda.so.1").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    compiler = ["gcc", "-O2", "-shared", "-fPIC", f"-I{headers()}"]
    subprocess.run([*compiler, HERE / "runtime.c", HERE / "nccl.c", "-o", folder / "libstandin.so"], check=True)
    subprocess.run([*compiler, HERE / "driver.c", "-o", folder / "libcuda.so.1"], check=True)


def environment(folder: Path, card: str) -> dict[str, str]:
    """Return the environment variables with which a Python runs on a card. folder: of `build`."""
    paths = [HERE / "site", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    own = {
        "STANDIN_GPU": card,
        "LD_PRELOAD": folder / "libstandin.so",
        "LD_LIBRARY_PATH": folder,
        "TRITON_LIBCUDA_PATH": folder,
        "TRITON_CACHE_DIR": folder / f"triton-{card}",
        "TORCHINDUCTOR_CACHE_DIR": folder / f"inductor-{card}",
        "TORCHINDUCTOR_COMPILE_THREADS": 1,
        "CUDA_VISIBLE_DEVICES": 0,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    return os.environ | {name: str(value) for name, value in own.items()}


class Counters:
    """Counters of this process: `launches` of kernels, matrix `products`, `waits` of the CPU for the GPU, `copies` between
    CPU and GPU, and `replays` of graphs."""

    def __init__(self):
        self.values = (ctypes.c_long * len(COUNTERS)).in_dll(ctypes.CDLL(None), "standin_counters")
        self.triton = ctypes.c_long.in_dll(ctypes.CDLL("libcuda.so.1"), "standin_triton_launches")

    def count(self, call) -> dict[str, int]:
        """Return what `call()` adds to each counter; launches include those of Triton's kernels."""
        before = [*self.values, self.triton.value]
        call()
        *added, triton = (now - then for now, then in zip([*self.values, self.triton.value], before))
        counted = dict(zip(COUNTERS, added))
        return counted | {"launches": counted["launches"] + triton}


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in CARDS:
        sys.exit(f"Expected {' or '.join(CARDS)}, then a program with its flags.")
    if reason := obstacle():
        sys.exit(f"{reason[0].upper()}{reason[1:]}.")
    place = Path(tempfile.gettempdir(), f"standin-gpu-{os.getuid()}")
    build(place)
    os.execve(sys.executable, [sys.executable, *sys.argv[2:]], environment(place, sys.argv[1]))
