"""Progress bars that suit a log file too."""

import sys

from tqdm import tqdm

LINE_SECONDS = 60  # between two lines, if there is no terminal


class Lines:
    """A file in which each drawing of a bar becomes a line of its own."""

    def __init__(self, file):
        self.file = file

    def write(self, text: str):
        line = text.strip("\r\n ")
        if line and "\x1b" not in line:
            self.file.write(line + "\n")

    def flush(self):
        self.file.flush()

    def isatty(self) -> bool:
        return False


def progress_bar(*arguments, **options) -> tqdm:
    """Return tqdm's bar on stderr; without a terminal it prints a line a minute instead of a thousand drawings."""
    file = sys.stderr
    if file.isatty():
        return tqdm(*arguments, file=file, **options)
    # the delay skips the line at 0%
    calm = dict(mininterval=LINE_SECONDS, maxinterval=LINE_SECONDS, delay=1e-9, ascii=True, leave=True)
    return tqdm(*arguments, file=Lines(file), **calm | options)
