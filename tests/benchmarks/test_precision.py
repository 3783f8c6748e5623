"""The precision benchmark runs, and its table has a row per precision; measured values are not tested."""

from benchmarks import precision


def test_precision(command, tmp_path):
    flags = "--model DiT-Ti/2 --precisions no bf16 --steps 3 --warmup 1 --batch-size 2 --classes 22".split()
    result = command(precision.main, *flags, "--out", tmp_path / "table.md")
    assert result.code == 0, result.err
    table = [
        line.strip("| ").split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if line[:1] == "|"
    ]
    assert [row[0] for row in table[2:]] == ["no", "bf16"]
    for row in table[2:]:
        assert row[1:3] == ["3 of 3", "0"] and 0.5 < float(row[3]) < 2 and float(row[6]) > 0
    assert table[2][5] == "0.00%" and table[2][3] != table[2][4]
    result = command(precision.main, *flags, "--warmup", 3)
    assert result.code == 2 and "--warmup is 3, expected 0 to 2" in result.err
