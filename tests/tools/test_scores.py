"""Scores: an evaluation finds its run, step and parameter counts."""

import json

import pytest
from helpers.evaluated_runs import EvaluatedRuns
from helpers.tiny_models import refusal

from checkpoint.loading import build_model
from finetune import METHODS, select
from tools.figures import figures, scores


@pytest.fixture
def runs(tmp_path):
    return EvaluatedRuns(tmp_path)


def test_an_evaluation_finds_its_run_step_and_parameter_counts(runs):
    entries = runs.write("ours"), runs.write("bits", "bitfit", {300: 12.0})
    files = runs.files["bits"] + runs.files["ours"][::-1]
    found = scores.match(figures.parse_named(entries, "--runs"), files)
    assert [(score.run, score.step, score.metric("fid")) for score in found] == [
        ("ours", 100, 20.0),
        ("ours", 200, 10.0),
        ("bits", 300, 12.0),
    ]
    assert found[0].metric("features.dino.fd") == 3.0
    # apart from the table's rows (5 and 4), FineDiffusion trains more than BitFit only by the norms
    model = build_model(found[0].description)
    trained = sum(p.numel() for p in select(model, METHODS["finediffusion"]).values())
    assert found[0].metric("trained_params") == trained > found[2].metric("trained_params")
    # 50 steps at 2 per second, then 50 at 1, twice
    assert found[0].metric("hours") == pytest.approx(75 / 3600) and found[1].metric("hours") == pytest.approx(
        150 / 3600
    )
    assert found[1].metric("images_per_s") == pytest.approx(200 * 64 / 150)
    with refusal("has no metric 'lpsi'", "hours, images_per_s, kid, lpips", "choose another"):
        found[0].metric("lpsi")


def test_training_time_ends_at_the_step_and_is_unknown_beyond_the_log(tmp_path):
    rows = [
        {"step": 10, "steps_per_s": 1.0, "images_per_s": 8.0},
        {"step": 20, "steps_per_s": 0.5, "images_per_s": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert scores.training_speed(tmp_path, 15) == {
        "hours": pytest.approx(20 / 3600),
        "images_per_s": pytest.approx(6.0),
    }
    assert scores.training_speed(tmp_path, 21) == {} and scores.training_speed(tmp_path / "none", 1) == {}
