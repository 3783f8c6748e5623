"""Short texts for messages and tables."""

from collections.abc import Callable, Iterable, Sequence


def shorten(names: Iterable, show: Callable[[object], str] = repr, most: int = 3) -> str:
    """Return the first `most` names as text: 'a', 'b', 'c' and 7 more."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(show, names[:most])) + rest


def one_line(error: BaseException, most: int = 200) -> str:
    """Return an exception's message as one line of at most `most` characters without a full stop, or else its type's name."""
    return " ".join(str(error).split())[:most].rstrip(". ") or type(error).__name__


def changed_settings(earlier: dict, now: dict) -> list[str]:
    """Return "key value, here value" for each key whose value differs between two sets of settings."""
    return [
        f"{key} {earlier.get(key)}, here {now.get(key)}" for key in earlier | now if earlier.get(key) != now.get(key)
    ]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence], align: str = "") -> list[str]:
    """Return the lines of a Markdown table.

    align: "l" or "r" for each column; left for the columns it lacks.
    """
    marks = ["---:" if mark == "r" else "---" for mark in align.ljust(len(header), "l")]
    lines = [f"| {' | '.join(map(str, row))} |" for row in (header, *rows)]
    return [lines[0], f"| {' | '.join(marks)} |", *lines[1:]]


def format_value(value: float | None) -> str:
    """Return a number with three digits, or with all of its digits before the point; "" for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
