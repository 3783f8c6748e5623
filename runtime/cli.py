"""Plumbing that every script shares: a user's mistake as one sentence, files that appear whole, signals, the device."""

import argparse
import atexit
import errno
import fcntl
import hashlib
import multiprocessing
import os
import signal
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import torch

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ("no", "fp16", "bf16")  # of --mixed-precision
TRY_AGAIN = 75  # exit code of a run that was asked to leave and can go on: EX_TEMPFAIL of sysexits.h


def run_command(main):
    """Call `main()`; a ValueError or an unusable path, the user's mistake, becomes one line on stderr and exit code 2."""
    try:
        return main()
    except ValueError as error:
        text = str(error)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = f"{error.filename or 'The disk'} cannot be used ({error.strerror}): check it or choose another path."
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))  # a file may have put anything in it
    print(f"{program()}: {line}", file=sys.stderr)
    raise SystemExit(2)


def program():
    """The name of the running command: train.py, or figures.py for tools/figures/__main__.py."""
    path = Path(sys.argv[0])
    return path.name if path.name != "__main__.py" else f"{path.parent.name}.py"


def few(names, show=repr, most=3):
    """'a', 'b', 'c' and 7 more"""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(show, names[:most])) + rest


class Parser(argparse.ArgumentParser):
    """One to whom a flag that is unknown or no number is a user's mistake like others: one line, without the usage."""

    def __init__(self, **options):
        super().__init__(**{"prog": program()} | options)

    def error(self, message):
        raise ValueError(f"{message}, expected as --help says: change it.")


def check_range(args, **ranges):
    """ValueError where a flag, by its name in `args`, is outside its (low, high); a flag that was not given is not."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {low} to {high}: change it.")


def write_whole(path, write):
    """Call `write(temporary path)`, then move the file to `path`: it appears whole or not at all, and stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with named(path):
        try:
            write(temporary)
            temporary.chmod(0o666 & ~UMASK)  # some writers make private files
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def append(path, text):
    """Add to a file."""
    with named(path), open(path, "a") as file:
        file.write(text)


@contextmanager
def named(path):
    """Have an OSError tell this path where it tells none: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


UMASK = os.umask(0)
os.umask(UMASK)


def sync(path):
    """Have a file, or the names in a folder, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Lock:
    """Keeps other launches from a folder, or a file that is made, until it is closed or this process has ended.

    `doing`, `choose`: for the ValueError where another process has it: what that does there, and the flag that names
    another place. Where a file system knows no locks nobody is kept away.
    """

    handle = None

    def __init__(self, path, doing, choose):
        self.handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
        held = weakref.ref(self)  # the workers of a DataLoader outlive a killed process for seconds: without its lock
        os.register_at_fork(after_in_child=lambda: held() and held().close())
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            folder = path if path.is_dir() else path.parent
            raise ValueError(
                f"Another process is {doing} {folder}, expected one at a time: wait for it or choose another {choose}."
            ) from None
        except OSError:
            pass

    def close(self):
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    __del__ = close


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


def compute_type(wanted, device):
    """`wanted` of --mixed-precision, or "fp16" where that is "bf16" and the GPU (before Ampere: V100) only emulates it.

    ValueError for "fp16" on a CPU.
    """
    if wanted == "fp16" and torch.device(device).type == "cpu":
        raise ValueError("--mixed-precision is fp16, expected a GPU for it and found none: choose bf16 or no.")
    if wanted != "bf16" or torch.device(device).type != "cuda":
        return wanted
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def on_main(accelerator, action, *arguments):
    """Call `action(*arguments)` on the main process; where it fails, all processes fail with it rather than wait for it."""
    failure, result = [None], None
    if accelerator.is_main_process:
        try:
            result = action(*arguments)
        except (ValueError, OSError) as error:
            failure = [error]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(failure)
    if failure[0]:
        raise failure[0]
    return result


def store_of_attempt():
    """Options of `init_process_group` with which processes that torchrun has started again meet only one another.

    torchrun (2.10; pytorch issue 135712) gives all attempts the same store, in which the addresses of lost processes still
    stand. Empty where there is no such store, and on several nodes, whose counts of attempts may differ.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env["LOCAL_WORLD_SIZE"] != env["WORLD_SIZE"]:
        return {}
    store = torch.distributed.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    store = torch.distributed.PrefixStore(f"attempt{env['TORCHELASTIC_RESTART_COUNT']}", store)
    return dict(store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]))


GROUPS = []  # of processes, see keep_group


def keep_group(group=None):
    """Have a process group, or that of all processes, live as long as this process; call it before the group is destroyed.

    The destructor of gloo's waits for its threads and holds the interpreter's lock, for which a thread may be waiting, to
    let go of a tensor that was exchanged last: on a busy machine one end of a run in ten hung there.
    """
    if torch.distributed.is_initialized():
        GROUPS.append(group or torch.distributed.group.WORLD)


def end_workers():
    """End a DataLoader's workers at exit: the SIGTERM that multiprocessing sends them there, and waits for, they ignore."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise
    for worker in multiprocessing.active_children():
        worker.kill()


class Signals:
    """What asks a run to leave: SIGTERM, SIGUSR1 and SIGUSR2 (to be started again) and SIGINT (by the user).

    The handlers only take note. Processes agree at a step's end: a signal may reach one of them alone, or each in
    another step. A second SIGINT stops at once.
    """

    CODES = {
        signal.SIGTERM: TRY_AGAIN,
        signal.SIGUSR1: TRY_AGAIN,
        signal.SIGUSR2: TRY_AGAIN,
        signal.SIGINT: 128 + signal.SIGINT,
    }

    def __init__(self, processes):
        self.asked = 0
        self.group = torch.distributed.new_group(backend="gloo") if processes > 1 else None
        keep_group(self.group)
        self.agreement = None
        atexit.register(end_workers)
        self.before = {number: signal.signal(number, self.note) for number in self.CODES}

    def note(self, number, frame):
        self.asked = self.CODES[number]
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def agreed(self):
        """Called by every process once a step: the exit code that one of them was asked to leave with, else 0.

        With several processes the answer is that of the step before, so that no step waits for the network.
        """
        if self.group is None:
            return self.asked
        code = 0
        if self.agreement:
            work, value = self.agreement
            work.wait()
            code = int(value)
        value = torch.tensor(self.asked)
        self.agreement = torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, self.group, True), value
        return code

    def release(self):
        """Put the handlers back that were there before."""
        if self.agreement:
            self.agreement[0].wait()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @classmethod
    def leave_to_parent(cls, _=None):
        """For the workers of a DataLoader: a signal to the whole job is the training process's to answer, see end_workers."""
        for number in cls.CODES:
            signal.signal(number, signal.SIG_IGN)
