"""Run programs in forks of the test process, as torchrun starts its ranks: torch is already imported, so a start is free.

The test process must not have computed on several threads, see conftest.one_thread.

codes = launch(train.main, flags, tmp_path, world=2, prepare=lambda rank: rank == 1 and die_at(7))
"""

import ctypes
import faulthandler
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from tqdm import tqdm

from runtime.cli import run_command
from runtime.private import reset_accelerate

DEADLY = [(os, "replace"), (os, "pwrite"), (os, "fsync"), (os, "unlink")]  # every step that makes or removes a file
LONGEST = 120  # seconds after which a launch counts as hanging


def launch(
    main: Callable[[], object],
    flags: Iterable,
    folder: Path,
    world: int = 1,
    prepare: Callable[[int], object] | None = None,
    kill: tuple[Iterable[int], float] | None = None,
    patience: float = 0.0,
) -> dict[int, int]:
    """Run the program of `main` in `world` processes; return {rank: exit code} in the order in which they ended.

    prepare   called with the rank at the start of each process, to break something there
    kill      (ranks, seconds): kill these ranks after so long with signal 9
    patience  seconds that the others have to exit after one has failed, before they are killed too, as by torchrun

    Output goes to the files `out<rank>` and `err<rank>` in `folder`. Raises AssertionError if a process still runs after
    LONGEST seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun, ranks, codes, failed = time.monotonic(), {}, {}, None
    for rank in range(world):
        child = os.fork()
        if not child:
            work(main, flags, folder, world, rank, port, prepare)
        ranks[child] = rank
    while ranks:
        for child in list(ranks):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[ranks.pop(child)] = code = os.waitstatus_to_exitcode(status)
                failed = failed or (code and time.monotonic())
        now = time.monotonic()
        doomed = ranks if failed and now - failed >= patience or now - begun > LONGEST else {}
        if kill and now - begun >= kill[1]:
            doomed, kill = [child for child in ranks if ranks[child] in kill[0]] or doomed, None
        for child in doomed:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    assert time.monotonic() - begun <= LONGEST + patience, f"{main.__module__} hung, see {folder}/err*"
    return codes


def work(main, flags, folder, world, rank, port, prepare):
    """Run the program in a forked process; never returns."""
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            file = open(folder / f"{name}{rank}", "w", buffering=1)
            os.dup2(file.fileno(), number)
            setattr(sys, f"std{name}", file)
        faulthandler.dump_traceback_later(LONGEST - 5)  # to stderr: shows where it hangs
        if world > 1:
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.environ |= dict(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        reset_accelerate()
        tqdm.set_lock(threading.RLock())  # forks share an inherited lock: a kill while it is held would stop all others
        sys.argv = [f"{main.__module__.rsplit('.', 1)[-1]}.py", *map(str, flags)]
        if prepare:
            prepare(rank)
        run_command(main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def worst(codes: dict[int, int]) -> int:
    """Return the exit code of the first process that failed, or else 0."""
    return next((code for code in codes.values() if code), 0)


def die_at(count: int, operations: list[tuple] = DEADLY):
    """Kill this process, as kill -9 does, when it begins an operation after `count` earlier ones."""
    left = [count]

    def deadly(function):
        def replacement(*arguments, **options):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments, **options)

        return replacement

    for module, name in operations:
        setattr(module, name, deadly(getattr(module, name)))


def without_privileges(rank: int = 0):
    """Make this process obey file permissions, even as root: drop all capabilities, see capset(2)."""
    version, this_process = 0x20080522, 0
    assert ctypes.CDLL(None).capset(struct.pack("Ii", version, this_process), bytes(24)) == 0
