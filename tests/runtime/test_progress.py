"""Progress without a terminal: a line now and then, for a log file."""

import io
import sys

from tqdm import tqdm

from runtime import progress


def lines_of(monkeypatch, seconds, steps=1000):
    """Return what a bar of `steps` steps prints, one line every `seconds` seconds."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "LINE_SECONDS", seconds)
    for _ in progress.progress_bar(range(steps), unit="step"):
        pass
    return sys.stderr.getvalue().splitlines()


def test_a_short_bar_is_one_line(monkeypatch):
    (line,) = lines_of(monkeypatch, 60)
    assert line.startswith("100%") and "1000/1000" in line and "\r" not in line


def test_each_drawing_is_a_line(monkeypatch):
    lines = lines_of(monkeypatch, 0, steps=5)
    counts = [line.split("|")[2].split()[0] for line in lines]
    assert counts == sorted(counts) and len(set(counts)) >= 4 and counts[-1] == "5/5"


def test_a_terminal_gets_the_moving_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in progress.progress_bar(range(3)):
        pass
    assert terminal.getvalue().count("\r") > 1


def test_other_lines_are_printed_between(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.progress_bar(total=2) as bar:
        bar.update()
        tqdm.write("in between", file=sys.stderr)
        bar.update()
    assert [line[:4] for line in sys.stderr.getvalue().splitlines()][0] == "in b"
