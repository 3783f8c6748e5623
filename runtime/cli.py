"""The command line: parsers with examples, and user errors as one sentence."""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_command(main: Callable[[], object]) -> object:
    """Call `main()`; print a user error, a ValueError or an unusable path, as one line and exit with code 2."""
    try:
        return main()
    except ValueError as error:
        text = str(error)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = f"{error.filename or 'The disk'} cannot be used ({error.strerror}): check it or choose another path."
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))  # a quoted file may hold any bytes
    print(f"{program_name()}: {line}", file=sys.stderr)
    raise SystemExit(2)


def program_name() -> str:
    """Return the name of the running command: train.py, or figures.py for tools/figures/__main__.py."""
    path = Path(sys.argv[0])
    return path.name if path.name != "__main__.py" else f"{path.parent.name}.py"


def command_words() -> str:
    """Return the words that start the running command: train.py, or python -m tools.figures for a module in a folder."""
    path = Path(sys.argv[0]).resolve()
    if path.parent == ROOT or ROOT not in path.parents:
        return path.name
    return "python -m " + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the default of every flag that has one, and keep the line breaks of the examples.

    Python 3.11: the overridden method is private.
    """

    def _get_help_string(self, action):
        if any(action.default is value for value in (None, False, argparse.SUPPRESS)):  # 0 is shown, and equals False
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError for an unknown or malformed flag.

    examples: command lines for the end of --help, one per line.
    """

    def __init__(self, *, examples: str = "", **options):
        lines = [line.strip() for line in examples.strip().splitlines()]
        epilog = "\n  ".join(["examples:", *lines]) if lines else None
        defaults = {"prog": command_words(), "formatter_class": HelpFormatter, "epilog": epilog}
        super().__init__(**defaults | options)

    def error(self, message: str):
        if int(os.environ.get("RANK", 0)):  # the first process of torchrun says it
            raise SystemExit(2)
        raise ValueError(f"{message} (see --help).")


def check_range(args: argparse.Namespace, **ranges: tuple[float, float]):
    """Raise ValueError if a flag, named as in `args`, is outside its (low, high); None passes."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {low} to {high}.")
