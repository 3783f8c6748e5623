"""The paper's tables: exact values, ours beside them, and tables of other data sets."""

import pytest
from helpers.evaluated_runs import EvaluatedRuns, change
from helpers.tiny_models import refusal

from finetune import METHODS
from hierarchy import Hierarchy
from runtime.files import sha256
from tools.figures import paper_tables, scores
from tools.figures.__main__ import main

INAT = Hierarchy.load("inat2021")
XL = {"model": "DiT-XL/2", "image_size": 256, "latent_size": 32, "channels": 4}


@pytest.fixture
def runs(tmp_path):
    return EvaluatedRuns(tmp_path)


@pytest.fixture
def tables(command, tmp_path):
    """tables(*flags) -> the lines of the Markdown."""

    def tables(*flags):
        result = command(main, "tables", *flags, "--out", tmp_path / "t.md")
        assert result.code == 0, result.err
        text = (tmp_path / "t.md").read_text()
        assert result.out == text + "\n"
        return text.splitlines()

    return tables


def overall(number):
    """Return {name of a row: its values overall} of a table of the paper."""
    table = paper_tables.read_paper()[0][number - 1]
    assert table.number == number
    return {row.name: tuple(row.paper["overall"].values()) for row in table.rows}


def test_the_papers_overall_values_are_exact():
    assert overall(1) == {
        "Full": (10.662, 0.708),
        "BitFit": (10.586, 0.710),
        "DiffFit": (10.788, 0.709),
        "FineDiffusion": (9.776, 0.721),
    }
    assert overall(2) == {
        "Full": (685.2, 100, 15.11, 1),
        "BitFit": (12.01, 1.75, 9.59, 0.635),
        "DiffFit": (12.14, 1.77, 9.65, 0.638),
        "FineDiffusion": (12.15, 1.77, 9.69, 0.642),
    }
    assert overall(3) == {"FineDiffusion-256": (9.776, 0.721), "FineDiffusion-512": (9.490, 0.723)}
    assert overall(4) == {
        "Full": (13.034, 0.651),
        "BitFit": (15.022, 0.654),
        "DiffFit": (15.068, 0.653),
        "FineDiffusion": (12.382, 0.667),
    }


def test_the_tables_are_complete_and_name_known_methods_and_metrics():
    tables, record = paper_tables.read_paper()
    assert [len(table.rows) for table in tables] == [4, 4, 2, 4]
    assert tables[0].groups == [*INAT.superclasses, "overall"]
    for table in tables:
        assert set(table.columns) <= scores.METRICS.keys()
        for row in table.rows:
            assert row.method in METHODS and list(row.paper) == table.groups
    # FineDiffusion has the best FID in 10 of 11 superclasses, as the paper's text says, and the best LPIPS in all
    methods = {row.method: row.paper for row in tables[0].rows}
    mine = methods.pop("finediffusion")
    assert [s for s in INAT.superclasses if mine[s]["fid"] > min(m[s]["fid"] for m in methods.values())] == ["Plants"]
    assert all(mine[s]["lpips"] >= max(m[s]["lpips"] for m in methods.values()) for s in INAT.superclasses)
    assert len({each["url"] for each in record["released"]}) == 3


def test_without_runs_the_paper_stands_alone(tables):
    lines = tables()
    assert sum(line.startswith("### Table") for line in lines) == 4
    assert "| FID | Full | BitFit | DiffFit | FineDiffusion |" in lines
    assert "| Reptiles | 37.828 | 41.845 | 42.657 | 25.266 |" in lines
    assert "| overall | 0.708 | 0.710 | 0.709 | 0.721 |" in lines
    assert "| FineDiffusion | 12.15 | 1.77 | 9.69 | 0.642 |" in lines
    assert "| FineDiffusion-512 | 9.490 | 0.723 |" in lines
    assert "| DiffFit | 15.068 | 0.653 |" in lines
    assert not any("ours" in line or "–" in line for line in lines)


def test_ours_stands_beside_the_paper(tables, runs):
    shape = {"hierarchy": INAT, **XL}
    entries = runs.write("ours", fids={9: 11.25}, speed=3.0, **shape), runs.write("full", "full", {9: 12.5}, **shape)
    files = runs.files["ours"] + runs.files["full"]
    change(files[0], overall={"lpips_pooled": 0.625})
    change(files[1], comparable=False, not_comparable=["random weights"])
    lines = tables("--runs", *entries, "--metrics", *files)
    assert sum(line.startswith("### ") for line in lines) == 4
    head = "| FID | Full, paper | Full, ours | BitFit, paper | BitFit, ours | DiffFit, paper | DiffFit, ours | "
    assert head + "FineDiffusion, paper | FineDiffusion, ours |" in lines
    assert "| Plants | 13.200 | 13.500 | 12.025 | – | 12.166 | – | 15.752 | 12.250 |" in lines
    assert "| Animalia | 50.038 | 23.500 | 51.904 | – | 52.059 | – | 47.353 | 22.250 |" in lines
    assert "| overall | 10.662 | 12.500 | 10.586 | – | 10.788 | – | 9.776 | 11.250 |" in lines
    # the paper's LPIPS is compared with the pooled one
    assert "| overall | 0.708 | – | 0.710 | – | 0.709 | – | 0.721 | 0.625 |" in lines
    assert "| FineDiffusion-256 | 9.776 | 11.250 | 0.721 | 0.625 |" in lines
    assert "|  | FID, paper | FID, ours | LPIPS, paper | LPIPS pooled, ours |" in lines
    assert "| Full | 685.20 | 685.20 | 100.00 | 99.94 | 15.11 | – | 1.000 | 1.000 |" in lines
    assert "| FineDiffusion | 12.15 | 12.15 | 1.77 | 1.77 | 9.69 | – | 0.642 | 0.667 |" in lines
    assert "| FineDiffusion | 12.382 | 0.667 |" in lines  # Table 4 has none of ours
    text = "\n".join(lines)
    assert "step 9, 100 against 90 images, superclass guidance 4.0, 250 ddpm steps" in text
    assert "null guidance 4.0, 250 ddpm steps" in text  # full fine-tuning has no superclass rows
    assert text.count("NOT COMPARABLE: random weights") == 2  # Tables 1 and 2


def test_another_data_set_or_setting_gets_a_table_of_its_own(tables, runs):
    same_counts = Hierarchy(INAT.classes, INAT.superclasses[::-1], INAT.parents, "turned")
    entries = [
        runs.write("pets"),
        runs.write("turned", fids={9: 1.0}, **XL, hierarchy=same_counts),
        runs.write("tiered", "bitfit", {9: 7.0}, hierarchy=INAT, embedder="tiered", **XL),
    ]
    lines = tables("--runs", *entries, "--metrics", *(file for files in runs.files.values() for file in files))
    own = [line for line in lines if line.startswith("### ") and "Table" not in line]
    assert own == ["### hierarchy at 8 pixels", "### turned at 256 pixels", "### inat2021 at 256 pixels"]
    assert "| FID | overall | x | y |" in lines
    assert "| pets, step 100 | 20.000 | 21.000 | 22.000 |" in lines
    assert "| pets, step 200 | 10.000 | 11.000 | 12.000 |" in lines
    assert "| LPIPS | overall | x | y |" in lines and "| pets, step 200 | 0.500 | – | – |" in lines
    assert any(line.startswith("| tiered, step 9 | 7.000 |") for line in lines)
    assert "| FID | Full | BitFit | DiffFit | FineDiffusion |" in lines  # nothing of ours beside the paper


def test_a_released_checkpoint_fills_a_row(tables, runs, tmp_path):
    entry, released = runs.write("ours", fids={9: 11.25}), tmp_path / "FineDiffusion.pt"
    released.write_bytes(b"weights")
    settings = {"ckpt_sha256": sha256(released), "hierarchy": INAT.digest(), "model": "DiT-XL/2", "image_size": 256}
    (file,) = runs.files["ours"]
    change(file, sampling=settings, real={"path": str(tmp_path / "absent")})
    lines = tables("--runs", entry, f"released={released}", "--metrics", file)
    assert "| overall | 10.662 | – | 10.586 | – | 10.788 | – | 9.776 | 11.250 |" in lines
    assert any("a checkpoint, 100 against 90 images, superclass guidance 4.0" in line for line in lines)
    change(file, sampling={"hierarchy": "0" * 64})
    with refusal("does not name its classes, expected those of inat2021 or .*absent", "restore the real images"):
        scores.match({"released": released}, [file])
