"""Start processes under torchrun or accelerate, and act on one of them."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState

from runtime.device import check_gpu


def run_on_main(state: PartialState | Accelerator, action: Callable, *arguments) -> object:
    """Call `action(*arguments)` on the main process and return its result there, None elsewhere.

    If it raises ValueError or OSError, all processes raise it, so that none waits for another.
    """
    failure, result = [None], None
    if state.is_main_process:
        try:
            result = action(*arguments)
        except (ValueError, OSError) as error:
            failure = [error]
    if state.num_processes > 1:
        torch.distributed.broadcast_object_list(failure)
    if failure[0]:
        raise failure[0]
    return result


def ask_main(state: PartialState | Accelerator, question: Callable[[], object]) -> object:
    """Call `question()` on the main process and return its answer, which must be picklable, on all processes."""
    answer = [run_on_main(state, question)]
    if state.num_processes > 1:
        torch.distributed.broadcast_object_list(answer)
    return answer[0]


def agree(state: PartialState, action: Callable, *arguments) -> object:
    """Return `action(*arguments)`, called by every process; if it raises ValueError or OSError in one, all of them end.

    The first process that failed raises its error, the others exit with code 2, so that the user sees one sentence.
    """
    failure, result = None, None
    try:
        result = action(*arguments)
    except (ValueError, OSError) as error:
        failure = error
    failed = [failure is not None] * state.num_processes
    if state.num_processes > 1:
        torch.distributed.all_gather_object(failed, failure is not None)
    if not any(failed):
        return result
    if failure and failed.index(True) == state.process_index:
        raise failure
    keep_process_group()
    raise SystemExit(2)


def agree_on_main(state: PartialState, action: Callable, *arguments) -> object:
    """Return `action(*arguments)` on the main process, None elsewhere; if it fails, all processes end as in `agree`."""
    return agree(state, lambda: action(*arguments) if state.is_main_process else None)


def agree_in_turns(state: PartialState, action: Callable, *arguments) -> object:
    """Do the same as `agree`, on the first process of each node before the others, so that one process downloads."""
    first = state.is_local_main_process
    result = agree(state, lambda: action(*arguments) if first else None)
    return agree(state, lambda: result if first else action(*arguments))


def attempt_store() -> dict:
    """Return options of `init_process_group` that keep each attempt of torchrun apart from the attempts before.

    torchrun (2.10; pytorch issue 135712) gives all attempts the same store, which still holds the addresses of lost
    processes. Returns no options without such a store, and on several nodes, which may count attempts differently.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env["LOCAL_WORLD_SIZE"] != env["WORLD_SIZE"]:
        return {}
    store = torch.distributed.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    store = torch.distributed.PrefixStore(f"attempt{env['TORCHELASTIC_RESTART_COUNT']}", store)
    return dict(store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]))


# How long a process waits for another. By default NCCL ends a job after 10 minutes, but a process may download, preview or
# save for longer, and shares of encoding and sampling end at different times. If a process dies, torchrun stops the others.
LONGEST_WAIT = timedelta(days=7)


def start_processes() -> PartialState:
    """Join the processes of torchrun or accelerate, or start alone.

    Raises ValueError if torch has no kernels for the GPU.
    """
    # without cpu=True, each process of torchrun on a CPU would be alone (accelerate 1.15)
    state = PartialState(cpu=not torch.accelerator.is_available(), **attempt_store(), timeout=LONGEST_WAIT)
    check_gpu(state.device)
    return state


KEPT_GROUPS = []  # see keep_process_group


def keep_process_group(group: "torch.distributed.ProcessGroup | None" = None):
    """Keep a process group, the one of all processes if None, alive until this process ends; call it before destroying it.

    The destructor of a gloo group waits for its threads while it holds the interpreter's lock; a thread may need that lock
    to release the last tensor. On a busy machine, one run in ten hung there at its end (torch 2.10).
    """
    if torch.distributed.is_initialized():
        KEPT_GROUPS.append(group or torch.distributed.group.WORLD)
