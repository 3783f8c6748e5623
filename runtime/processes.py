"""Helpers for several processes under torchrun or accelerate."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState

from runtime.device import check_gpu


def run_on_main(accelerator, action, *arguments):
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


def ask_main(state: PartialState | Accelerator, question: Callable[[], object]) -> object:
    """Return the main process's answer on all processes. The answer must be picklable."""
    answer = [run_on_main(state, question)]
    if state.num_processes > 1:
        torch.distributed.broadcast_object_list(answer)
    return answer[0]


def attempt_store():
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


def start_processes(timeout: timedelta | None = None) -> PartialState:
    """Join the processes of torchrun or accelerate, or start alone, and check that torch serves the GPU.

    timeout: how long a collective may wait; the backend's default if None.
    """
    # without cpu=True, accelerate takes each process of torchrun on a CPU for a world of its own
    options = {} if timeout is None else {"timeout": timeout}
    state = PartialState(cpu=not torch.accelerator.is_available(), **attempt_store(), **options)
    check_gpu(state.device)
    return state


KEPT_GROUPS = []  # of processes, see keep_group


def keep_process_group(group=None):
    """Have a process group, or that of all processes, live as long as this process; call it before the group is destroyed.

    The destructor of gloo's waits for its threads and holds the interpreter's lock, for which a thread may be waiting, to
    let go of a tensor that was exchanged last: on a busy machine one end of a run in ten hung there.
    """
    if torch.distributed.is_initialized():
        KEPT_GROUPS.append(group or torch.distributed.group.WORLD)
