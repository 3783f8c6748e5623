"""Signals that ask a run to stop."""

import atexit
import multiprocessing
import signal

import torch

from runtime.processes import keep_process_group

EXIT_RETRY = 75  # exit code of a run that was asked to leave and can go on: EX_TEMPFAIL of sysexits.h


def kill_workers():
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
        signal.SIGTERM: EXIT_RETRY,
        signal.SIGUSR1: EXIT_RETRY,
        signal.SIGUSR2: EXIT_RETRY,
        signal.SIGINT: 128 + signal.SIGINT,
    }

    def __init__(self, processes):
        self.asked = 0
        self.group = torch.distributed.new_group(backend="gloo") if processes > 1 else None
        keep_process_group(self.group)
        self.agreement = None
        atexit.register(kill_workers)
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
