"""Answer --help at once: with it on the command line, placeholders take the place of packages that are slow to import.

torch and the packages on it take seconds to import. A parser needs only names that our own modules define, so these modules
are imported with placeholders, and the parser prints its help and exits. Without --help this module does nothing. If a
module does not get along with the placeholders, the command starts again with the packages.

Every command imports this module first; the packages `tools`, `benchmarks` and `examples` do it for the commands in them.
"""

import importlib.abc
import importlib.machinery
import os
import subprocess
import sys
import types

HEAVY = {"accelerate", "diffusers", "filelock", "huggingface_hub", "lpips", "matplotlib", "PIL", "safetensors"}
HEAVY |= {"scipy", "sklearn", "timm", "torch", "torch_fidelity", "torchvision", "tqdm"}
COMPLETE = "FINEDIFFUSION_COMPLETE_HELP"  # set when a command starts again


class Placeholder(types.ModuleType):
    """Stands for a module and everything in it: an attribute, a call and an item of it are placeholders too."""

    __path__ = ()

    def __init__(self, name: str = "placeholder"):
        super().__init__(name)

    def __getattr__(self, name: str) -> "Placeholder":
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(name)

    def __mro_entries__(self, bases: tuple) -> tuple:
        return ()  # as a base class

    def __bool__(self) -> bool:
        return False

    def __iter__(self):
        return iter(())

    def operate(self, *arguments, **options) -> "Placeholder":
        return Placeholder()

    __call__ = __getitem__ = __or__ = __ror__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = operate
    __truediv__ = __rtruediv__ = __pow__ = __neg__ = __matmul__ = operate


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a placeholder for each module of the packages in HEAVY."""

    def find_spec(self, name: str, path: object = None, target: object = None):
        if name.split(".")[0] in HEAVY:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Placeholder:
        return Placeholder(spec.name)

    def exec_module(self, module: Placeholder):
        pass


def start_again(*error):
    """Run the same command with the packages; the handler of an error that nothing caught."""
    run = subprocess.run([sys.executable, *sys.orig_argv[1:]], env=os.environ | {COMPLETE: "1"})
    os._exit(run.returncode)


if {"-h", "--help"} & set(sys.argv[1:]) and COMPLETE not in os.environ and not HEAVY & sys.modules.keys():
    sys.meta_path.insert(0, Finder())
    sys.excepthook = start_again
