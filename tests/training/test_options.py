"""The flags of train.py: help for each, defaults, and learning rates that follow the method."""

import re

import pytest

from training.options import check_settings, parse_args, resolve_defaults

TITLES = ["data", "model", "method", "optimisation", "precision and memory", "output"]


@pytest.fixture
def parse(monkeypatch):
    """parse(*flags) -> checked settings."""

    def parse(*flags):
        monkeypatch.setattr("sys.argv", ["train.py", "--data-path", "images", *flags])
        args = parse_args("A command.")
        check_settings(args)
        resolve_defaults(args)
        return args

    return parse


def test_every_flag_has_a_help_text_in_a_group(parse, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")  # no line breaks within help texts
    names = vars(parse())
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    groups = dict(re.findall(r"^([a-z ]+):\n((?:  .*\n?)+)", text, re.M))
    assert list(groups)[-7:] == [*TITLES, "examples"] and text.count("train.py --") == 2
    flags = {}
    for title in TITLES:
        for entry in re.split(r"^  (?=--)", groups[title], flags=re.M)[1:]:
            flag, words = re.split(r"\s{2,}", entry, maxsplit=1)  # flag and metavar, then help
            flags[flag.split()[0].strip(",")] = words.strip()
    assert flags.keys() == {f"--{name.replace('_', '-')}" for name in names} and all(flags.values())
    for words in ("(default: 0)", "(default: 0.0)", "(default: 256)", "if not given, --lr"):
        assert words in text


def test_learning_rates_follow_the_method_and_each_other(parse):
    def rates(*flags):
        args = parse(*flags)
        return args.lr, args.table_lr, args.lora_lr

    assert rates() == (1e-4, 1e-4, 1e-4)
    assert rates("--method", "difffit-orig", "--table-lr", "0.5") == (1e-3, 0.5, 1e-3)
    assert rates("--lr", "0.2", "--lora-lr", "0.3") == (0.2, 0.2, 0.3)
