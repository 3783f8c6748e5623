"""Call the commands in this process."""

import contextlib
import io
import sys
from collections.abc import Callable
from types import SimpleNamespace

from runtime.cli import run_command
from runtime.private import reset_accelerate


def call(main: Callable[[], object], *flags) -> SimpleNamespace:
    """Run a command as a shell would; return its exit code, stdout and stderr as code, out and err."""
    reset_accelerate()
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
