"""Programs in forks of the test process, as torchrun starts their ranks: torch is imported already, a start costs nothing.

The test process must not have computed on several threads, see conftest.one_thread.

codes = launch(train.main, flags, tmp_path, world=2, prepare=lambda rank: rank == 1 and die_at(7))
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback

from accelerate.state import AcceleratorState, GradientState
from tqdm import tqdm

from runtime.cli import run_command

DEADLY = [(os, "replace"), (os, "pwrite"), (os, "fsync"), (os, "unlink")]  # every step by which files come about
LONGEST = 120  # seconds until a launch counts as hanging


def launch(main, flags, folder, world=1, prepare=None, kill=None, patience=0.0):
    """Run the program of `main` in `world` processes -> {rank: exit code} in the order in which they ended.

    `prepare(rank)` is called in each of them first, to spoil something there. `kill`: (ranks, seconds after which they
    are killed by signal 9). When one has failed, the others have `patience` seconds to leave before they are killed, too,
    as torchrun does. What they say goes to the files `out<rank>` and `err<rank>` of `folder`. AssertionError where one
    is still there after LONGEST seconds.
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
    """What a forked process does; it does not return."""
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            file = open(folder / f"{name}{rank}", "w", buffering=1)
            os.dup2(file.fileno(), number)
            setattr(sys, f"std{name}", file)
        faulthandler.dump_traceback_later(LONGEST - 5)  # where it hangs, to stderr
        if world > 1:
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.environ |= dict(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        tqdm.set_lock(
            threading.RLock()
        )  # forks share the one they inherit: one that is killed in it would stop all others
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


def worst(codes):
    """The exit code of the first that failed, else 0."""
    return next((code for code in codes.values() if code), 0)


def die_at(count, operations=DEADLY):
    """Have this process be killed, as by kill -9, when it begins one more than `count` of the operations."""
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
