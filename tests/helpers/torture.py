"""Results for the rows of docs/reliability.md, from the tests marked with a row; --torture runs them in full.

    @pytest.mark.reliability("R3", "damaged files are detected")
    def test_...(cases, figure):
        for case in range(cases(60, full=1500)):
            ...
        figure(f"{found} of {count}")

A row whose tests report no result counts its tests. Write --figures=FILE with an equals sign: as a separate word, an
existing FILE would be taken for a path of tests, since pytest looks for those before it reads these options.
"""

import os
import platform
from collections import defaultdict
from datetime import date
from pathlib import Path

import pytest
import torch

from runtime.text import markdown_table


def pytest_addoption(parser):
    parser.addoption(
        "--torture", action="store_true", help="run the tests of docs/reliability.md with their full counts"
    )
    parser.addoption("--figures", metavar="FILE", help="write the results of these rows to FILE, in Markdown")


def pytest_configure(config):
    config.addinivalue_line("markers", "reliability(row, what): a guarantee of docs/reliability.md, R1 to R16")


def pytest_runtest_setup(item):
    if mark := item.get_closest_marker("reliability"):
        item.user_properties.append(("reliability", mark.args))


@pytest.fixture(scope="session")
def cases(request):
    """cases(short, full) -> number of cases to try."""
    return lambda short, full: full if request.config.getoption("--torture") else short


@pytest.fixture
def figure(request):
    """figure(text): report the result of this test for the table."""
    return lambda text: request.node.user_properties.append(("figure", text))


def table(reports):
    """Return the reports of marked tests as a Markdown table, or "" if there are none."""
    groups = defaultdict(list)
    for report in reports:
        properties = dict(getattr(report, "user_properties", ()))
        if "reliability" in properties:
            found = properties.get("figure") if report.passed else None
            groups[tuple(properties["reliability"])].append((report.passed, found, report.duration))
    rows = []
    for (row, what), tests in sorted(groups.items(), key=lambda item: (int(item[0][0][1:]), item[0][1])):
        passed, results, seconds = zip(*tests)
        found = "; ".join(filter(None, results)) or f"{sum(passed)} of {len(passed)}"
        if not all(passed):
            found = f"**FAILED**, {found}"
        rows.append([row, what, found, f"{sum(seconds):.0f}"])
    return "\n".join(markdown_table(("row", "what", "found", "seconds"), rows, align="lllr")) if rows else ""


def pytest_terminal_summary(terminalreporter, config):
    stats = terminalreporter.stats
    reports = [r for kind in ("passed", "failed") for r in stats.get(kind, []) if r.when == "call"]
    reports += stats.get("error", [])
    text = table(reports)
    if text:
        terminalreporter.write_line(f"\n{text}")
    if path := config.getoption("--figures"):
        form = "in full" if config.getoption("--torture") else "the short form"
        versions = f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
        Path(path).write_text(f"# Reliability, {form}, {date.today()}\n\n    make torture\n\n{versions}.\n\n{text}\n")
