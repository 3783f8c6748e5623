"""Scores: an evaluation finds its run, step and parameter counts, and fills the paper's tables."""

import json

import pytest
from helpers.evaluated_runs import EvaluatedRuns, change
from helpers.tiny_models import refusal

from checkpoint.loading import build_model
from finetune import METHODS, select
from hierarchy import Hierarchy
from tools.figures import figures, scores
from tools.figures.__main__ import main


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


def test_tables_show_the_papers_metrics_beside_ours(command, runs, tmp_path):
    inat = Hierarchy.load("inat2021")
    shape = {"hierarchy": inat, "model": "DiT-XL/2", "image_size": 256, "latent_size": 32, "channels": 4}
    entries = runs.write("ours", fids={9: 11.25}, speed=3.0, **shape), runs.write("full", "full", {9: 12.5}, **shape)
    files = runs.files["ours"] + runs.files["full"]
    change(files[1], comparable=False, not_comparable=["random weights"])
    result = command(main, "tables", "--runs", *entries, "--metrics", *files, "--out", tmp_path / "t.md")
    assert result.code == 0, result.err
    text = (tmp_path / "t.md").read_text()
    assert result.out == text + "\n" and [text.count(f"### Table {n}:") for n in range(1, 6)] == [1, 1, 1, 1, 0]
    lines = text.splitlines()
    assert "| FID | Full, paper | Full, ours | BitFit, paper | BitFit, ours | DiffFit, paper | DiffFit, ours | " in text
    assert "| Plants | – | 13.500 | – | – | – | – | – | 12.250 |" in lines
    assert "| Animalia | – | 23.500 | – | – | – | – | – | 22.250 |" in lines
    assert "| overall | ≈10.66 | 12.500 | ≈10.59 | – | ≈10.79 | – | 9.776 | 11.250 |" in lines
    assert (
        "| FineDiffusion | 12.382 | – | 0.667 | – |" in lines and "| FineDiffusion | 9.490 | – | 0.723 | – |" in lines
    )
    assert "| Full | 685.20 | 685.20 | 100.00 | 99.94 | 1.00 | 1.00 |" in lines
    assert "| FineDiffusion | 12.15 | 12.15 | 1.77 | 1.77 | 1.56 | 1.50 |" in lines
    assert "step 9, 100 against 90 images, superclass guidance 4.0, 250 ddpm steps" in text
    assert text.count("NOT COMPARABLE: random weights") == 2  # Tables 1 and 4


def test_paper_json_names_known_methods_hierarchies_and_metrics():
    paper = json.loads(figures.PAPER.read_text())
    assert paper["methods"].keys() < METHODS.keys()
    for table in paper["tables"]:
        assert Hierarchy.load(table["hierarchy"]).num_super_classes in (11, 25)
        assert table["paper"].keys() <= paper["methods"].keys()
        for row in table["paper"].values():
            assert row.keys() <= set(table["columns"]) <= scores.METRICS.keys()
