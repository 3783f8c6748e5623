"""benchmarks.gpu: the page of a recorded run, cases that do not fit or do not run, the summary of the tests."""

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_page import make_page
from benchmarks.harness import Bench, Row

RECORD = json.loads(Path(__file__).with_name("gpu_record.json").read_text())  # of a stand-in GPU, with a fault added


def tables(page):
    """Return the tables of a page, each a list of rows of cells."""
    found, inside = [], False
    for line in page.splitlines():
        if line.startswith("|"):
            found += [] if inside else [[]]
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        inside = line.startswith("|")
    return found


def test_the_page_is_well_formed():
    page = make_page(RECORD)
    found = tables(page)
    assert all(len(row) == len(table[0]) for table in found for row in table)
    titles = [table[0][0] for table in found]
    assert titles == [
        "case",
        "what",
        "step",
        "step",
        "what",
        "case",
    ]  # speed, ceilings, steps, memory, coding, predictions
    for text in ("None", "nan", "inf"):
        assert not any(cell == text for table in found for row in table for cell in row)
    assert "the numbers mean nothing" in page and "## Predicted and measured" in page and "## Tests" in page
    assert page.endswith("\n") and "\n\n\n" not in page


def test_each_case_is_on_the_page():
    page, record = make_page(RECORD), {case["name"]: case for case in RECORD["cases"]}
    names = {row[0] for row in tables(page)[0]}
    for name, case in record.items():
        assert f"{name} {case['seconds']:.0f} s" in page
        assert {row["name"] for row in case.get("rows", ())} <= names
    assert "does not fit in memory" in page and "train-512" in names
    for name, reason in RECORD["not_run"]:
        assert f"{name} ({reason})" in page
    for name, reason in RECORD["tests"]["skipped"]:
        assert f"- {name}: {reason}" in page


def test_a_real_gpu_is_not_called_a_stand_in():
    record = copy.deepcopy(RECORD)
    record["gpu"]["name"], record["tiny"] = "NVIDIA H200", False
    page = make_page(record)
    assert page.startswith("# NVIDIA H200, ") and "mean nothing" not in page


def case(run, **changes):
    return gpu.Case("a", "b", 10, run, **changes)


def full(*arguments, **settings):
    raise torch.OutOfMemoryError("CUDA out of memory")


def broken(*arguments, **settings):
    raise RuntimeError("no such kernel")


def test_a_case_that_does_not_fit_is_recorded():
    bench = Bench("cpu", tiny=True)
    assert gpu.run_case(case(full), bench, None)["fault"] == "does not fit in memory"
    assert gpu.run_case(case(full, settings={}), bench, None)["fault"] == "does not fit in memory"
    assert gpu.run_case(case(broken), bench, None)["fault"] == "RuntimeError: no such kernel"


@pytest.mark.parametrize("reference", [None, "official"])
def test_ours_is_timed_alone_without_the_official_code_or_if_that_does_not_fit(reference):
    def alone(bench, name, about, batch):
        yield Row(name, about, "images/s", 100.0, goal=90.0, at_least=True)

    bench = Bench("cpu", reference, tiny=False)
    settings = dict(settings={}, reference=True, alone=alone, alone_settings={"batch": 2})
    record = gpu.run_case(case(full, flop=("DiT-S/4", 32, None, 1), **settings), bench, peak=1e12)
    (row,) = record["rows"]
    assert (
        row["about"] == "b, ours alone" and row["within"] and 0.2 < row["nominal"] < 2
    )  # 100 images of about 10 GFLOP


def test_cases_are_begun_only_if_they_end_in_time():
    first = case(full)
    assert gpu.obstacle(first, 11) is None and gpu.obstacle(first, 9) == "9 s left, expected 10 s"
    assert gpu.obstacle(case(full, needs=("torch", "no_such_package")), 99) == "needs no_such_package"


def test_the_cases_end_in_time():
    """The last cases of `make gpu` fit only if earlier ones are faster than expected; those of `make gpu-quick` all fit."""
    assert sum(each.seconds for each in gpu.CASES) <= 335
    quick = gpu.choose_cases(gpu.parse_args(["--quick"]))
    assert 0 < sum(each.seconds for each in quick) <= 110 and {"train-256", "sampling-256"} <= {
        each.name for each in quick
    }
    assert len({each.name for each in gpu.CASES}) == len(gpu.CASES)


def test_the_summary_of_the_tests(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(
        """<testsuites><testsuite time="3.5">
        <testcase name="a"><properties><property name="memory" value="2 GiB"/></properties></testcase>
        <testcase name="b"><skipped message="needs two GPUs"/></testcase>
        <testcase name="c"><failure message="differs by 1&#10;and more"/></testcase>
        </testsuite></testsuites>"""
    )
    found = gpu.read_tests(path)
    assert (
        found["passed"] == 1
        and found["skipped"] == [["b", "needs two GPUs"]]
        and found["recorded"] == {"a: memory": "2 GiB"}
    )
    assert [name for name, _ in found["failed"]] == ["c"] and "\n" not in found["failed"][0][1]
    assert gpu.read_tests(tmp_path / "absent.xml") == {}


def test_names_and_numbers():
    assert gpu.short_name("NVIDIA H200") == "h200" and gpu.short_name("Tesla V100-SXM2-32GB") == "v100-sxm2-32gb"
    assert gpu.finite({"a": [1.0, float("nan")], "b": float("inf")}) == {"a": [1.0, None], "b": None}


@pytest.mark.parametrize(
    "flags, words",
    [([], "Found no GPU, expected one"), (["--only", "speed"], "--only has speed, expected names of ceilings,")],
)
def test_invalid_calls_are_refused(command, flags, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = command(gpu.main, *flags)
    assert result.code == 2 and words in result.err
