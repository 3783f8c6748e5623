"""Calls of the commands in this process."""

import contextlib
import io
import sys
from types import SimpleNamespace

from accelerate.state import AcceleratorState, GradientState

from runtime.cli import run_command


def call(main, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    out, err, argv, code = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [sys.modules[main.__module__].__file__, *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command(main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())
