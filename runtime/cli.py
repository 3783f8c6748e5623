"""Plumbing that every script shares: a user's mistake as one sentence, files that appear whole, signals, the device."""

import argparse
import errno
import os
import sys
from pathlib import Path

from runtime.files import UMASK


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
    print(f"{program_name()}: {line}", file=sys.stderr)
    raise SystemExit(2)


def program_name():
    """The name of the running command: train.py, or figures.py for tools/figures/__main__.py."""
    path = Path(sys.argv[0])
    return path.name if path.name != "__main__.py" else f"{path.parent.name}.py"


def shorten(names, show=repr, most=3):
    """'a', 'b', 'c' and 7 more"""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(show, names[:most])) + rest


class Parser(argparse.ArgumentParser):
    """One to whom a flag that is unknown or no number is a user's mistake like others: one line, without the usage."""

    def __init__(self, **options):
        super().__init__(**{"prog": program_name()} | options)

    def error(self, message):
        raise ValueError(f"{message}, expected as --help says: change it.")


def check_range(args, **ranges):
    """ValueError where a flag, by its name in `args`, is outside its (low, high); a flag that was not given is not."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {low} to {high}: change it.")


os.umask(UMASK)
