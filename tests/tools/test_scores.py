"""Scores: an evaluation finds its run, step and parameter counts."""

import json

import pytest
from helpers.evaluated_runs import EvaluatedRuns, change
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


# ---- evaluations in one figure -------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"real": {"pixels": "b" * 64}}, "differ in real images, expected the same"),
        ({"real": {"n": 91}}, "differ in number of real images \\(90 and 91\\)"),
        ({"fake": {"n": 50}}, "differ in number of generated images \\(100 and 50\\)"),
        ({"choices": {"image_size": 6}}, "differ in pixels per side \\(8 and 6\\)"),
        ({"choices": {"networks": []}}, "differ in networks, expected"),
        (
            {"sampling": {"cfg_scale": 1.5}},
            "of ours differ in guidance \\(superclass guidance 4.0 and superclass guidance 1.5",
        ),
    ],
)
def test_evaluations_that_differ_are_not_compared(runs, changes, words):
    entry = runs.write("ours")
    change(runs.files["ours"][1], **changes)
    with refusal(words):
        scores.check_alike(scores.match(figures.parse_named([entry], "--runs"), runs.files["ours"]))


def test_reports_of_earlier_versions_are_compared_by_what_they_have(runs):
    entry = runs.write("ours")
    report = json.loads(runs.files["ours"][1].read_text())
    del report["real"]["pixels"], report["choices"]["image_size"]
    runs.files["ours"][1].write_text(json.dumps(report))
    scores.check_alike(scores.match(figures.parse_named([entry], "--runs"), runs.files["ours"]))


def test_the_legend_has_the_guidance_if_the_runs_differ_in_it(runs):
    entries = runs.write("ours"), runs.write("bits", "bitfit", {100: 30.0})
    legend = {}
    for scale in (4.0, 1.5):
        change(runs.files["bits"][0], sampling={"cfg_scale": scale})
        found = scores.match(
            figures.parse_named(entries, "--runs"), [file for files in runs.files.values() for file in files]
        )
        scores.check_alike(found)
        legend[scale] = list(scores.legends(scores.by_run(found)).values())
    assert legend[4.0] == ["ours", "bits"]
    assert legend[1.5] == ["ours, superclass guidance 4.0", "bits, null guidance 1.5"]
    more = {"guidance": "chain", "cfg_scale_parent": 2.0, "guidance_interval": [100, 800], "cfg_channels": "all"}
    change(runs.files["ours"][0], sampling=more)
    (score,) = scores.match(figures.parse_named(entries[:1], "--runs"), runs.files["ours"][:1])
    assert score.guidance_text == "chain guidance 4.0, 2.0 to the superclass, timesteps 100 to 800, all channels"


def test_the_label_of_an_axis():
    assert scores.axis_label("lpips") == "LPIPS (higher is better)"
    assert scores.axis_label("features.vit.v1@224.fd") == "FD vit.v1@224 (lower is better)"
    assert scores.axis_label("n_fake") == "n_fake"
