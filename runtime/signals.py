"""Signals that ask a run to stop."""

import atexit
import multiprocessing
import signal

import torch

from runtime.processes import keep_process_group

EXIT_RETRY = 75  # exit code of a run that a signal stopped and that can be resumed: EX_TEMPFAIL of sysexits.h


class Signals:
    """Note signals that ask a run to stop: SIGTERM, SIGUSR1 and SIGUSR2 (to be resumed) and SIGINT (by the user).

    The handlers only take a note, and the processes agree at the end of a step: a signal may reach one of them alone, or
    each in another step. A second SIGINT stops at once.
    """

    CODES = {
        signal.SIGTERM: EXIT_RETRY,
        signal.SIGUSR1: EXIT_RETRY,
        signal.SIGUSR2: EXIT_RETRY,
        signal.SIGINT: 128 + signal.SIGINT,
    }

    def __init__(self, processes: int):
        self.exit_code = 0  # of the last signal
        self.group = torch.distributed.new_group(backend="gloo") if processes > 1 else None
        keep_process_group(self.group)
        self.exchange = None  # the exchange of exit codes under way
        atexit.register(kill_workers)
        self.earlier_handlers = {number: signal.signal(number, self.note) for number in self.CODES}

    def note(self, number: int, frame):
        self.exit_code = self.CODES[number]
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def agreed(self) -> int:
        """Return the exit code that a signal asks for, 0 if there was none; called by every process at the end of each step.

        With several processes this is the answer of the step before, so that no step waits for the network.
        """
        if self.group is None:
            return self.exit_code
        code = 0
        if self.exchange:
            work, value = self.exchange
            work.wait()
            code = int(value)
        value = torch.tensor(self.exit_code)
        self.exchange = torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, self.group, True), value
        return code

    def release(self):
        """Restore the earlier signal handlers."""
        if self.exchange:
            self.exchange[0].wait()
        for number, handler in self.earlier_handlers.items():
            signal.signal(number, handler)


def ignore_signals(_worker: int = 0):
    """Ignore signals in a DataLoader's worker: the training process answers them, and ends its workers."""
    for number in Signals.CODES:
        signal.signal(number, signal.SIG_IGN)


def kill_workers():
    """Kill the workers of a DataLoader at exit: they ignore the SIGTERM with which Python would end and await them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
    for worker in multiprocessing.active_children():
        worker.kill()
