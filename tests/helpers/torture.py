"""The figures of docs/reliability.md: tests marked with a row of it, in a short form and, with --torture, in full.

    @pytest.mark.reliability("R3", "damaged files are detected")
    def test_...(cases, figure):
        for case in range(cases(60, full=1500)):
            ...
        figure(f"{found} of {count}")

A row without a figure of its own counts its tests. Write --figures=FILE: where FILE is a word of its own and there is one,
pytest takes it for tests, of which it reads the options before it knows these.
"""

import os
import platform
from collections import defaultdict
from datetime import date
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--torture", action="store_true", help="the full counts of the rows of docs/reliability.md")
    parser.addoption("--figures", metavar="FILE", help="write what these rows found to FILE, in Markdown")


def pytest_configure(config):
    config.addinivalue_line("markers", "reliability(row, what): a promise of docs/reliability.md, R1 to R15")


def pytest_runtest_setup(item):
    if mark := item.get_closest_marker("reliability"):
        item.user_properties.append(("reliability", mark.args))


@pytest.fixture(scope="session")
def cases(request):
    """cases(short, full) -> how many to try."""
    return lambda short, full: full if request.config.getoption("--torture") else short


@pytest.fixture
def figure(request):
    """figure(text): what this test found, for the table."""
    return lambda text: request.node.user_properties.append(("figure", text))


def table(reports):
    """Markdown of the reports of marked tests."""
    rows = defaultdict(list)
    for report in reports:
        properties = dict(getattr(report, "user_properties", ()))
        if "reliability" in properties:
            found = properties.get("figure") if report.passed else None
            rows[tuple(properties["reliability"])].append((report.passed, found, report.duration))
    lines = ["| row | what | found | seconds |", "|---|---|---|---:|"]
    for (row, what), tests in sorted(rows.items(), key=lambda item: (int(item[0][0][1:]), item[0][1])):
        passed, figures, seconds = zip(*tests)
        found = "; ".join(filter(None, figures)) or f"{sum(passed)} of {len(passed)}"
        if not all(passed):
            found = f"**FAILED**, {found}"
        lines.append(f"| {row} | {what} | {found} | {sum(seconds):.0f} |")
    return "\n".join(lines)


def pytest_terminal_summary(terminalreporter, config):
    stats = terminalreporter.stats
    reports = [r for kind in ("passed", "failed") for r in stats.get(kind, []) if r.when == "call"]
    reports += stats.get("error", [])
    text = table(reports)
    if text.count("\n") > 1:
        terminalreporter.write_line(f"\n{text}")
    if path := config.getoption("--figures"):
        form = "in full" if config.getoption("--torture") else "the short form"
        versions = f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
        Path(path).write_text(f"# Reliability, {form}, {date.today()}\n\n    make torture\n\n{versions}.\n\n{text}\n")
