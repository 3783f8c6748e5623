"""--help of every program: a text and the default of each flag, groups, and examples that parse."""

import argparse
import importlib
import os
import shlex
import subprocess
import sys
from unittest.mock import patch

import pytest
from helpers.tiny_models import ROOT

from runtime.cli import Parser

PROGRAMS = [
    "train",
    "sample",
    "sample_ddp",
    "evaluate",
    "tools.browse.__main__",
    "tools.check_data",
    "tools.class_embeddings",
    "tools.encode_latents",
    "tools.export",
    "tools.figures.__main__",
    "tools.filter_images",
    "tools.names",
    "tools.train_classifier",
    "benchmarks.gpu",
    "benchmarks.loading",
    "benchmarks.precision",
    "benchmarks.solvers",
    "benchmarks.speed",
    "examples.glyphs.draw",
    "examples.glyphs.read",
    "examples.glyphs.study",
    "examples.glyphs.train_autoencoder",
    "examples.glyphs.usefulness",
]


class Captured(Exception):
    """Raised with the parser that a program has made."""


def parsers_of(name):
    """Return the parser of a program, and those of its subcommands."""

    def capture(parser, *_):
        raise Captured(parser)

    module = importlib.import_module(name)
    with patch.object(Parser, "parse_args", capture), patch.object(sys, "argv", [module.__file__]):
        with pytest.raises(Captured) as caught:
            module.main()
    parser = caught.value.args[0]
    subcommands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(each for action in subcommands for each in action.choices.values())]


PARSERS = {parser.prog: (name, parser) for name in PROGRAMS for parser in parsers_of(name)}


def flags(parser):
    """The flags and positional arguments of a parser, except -h and the choice of a subcommand."""
    kinds = argparse._HelpAction, argparse._SubParsersAction
    return [action for action in parser._actions if not isinstance(action, kinds)]


def examples(parser):
    """The command lines at the end of --help, split into words."""
    _, _, tail = parser.format_help().partition("\nexamples:\n")
    return [shlex.split(line) for line in tail.strip().splitlines()]


def own_flags(words, name):
    """The words between the program and a redirection: python -m tools.export --ckpt A > B -> --ckpt A."""
    program = {f"{name}.py", name.removesuffix(".__main__")}  # sample.py, or tools.export after -m
    place = next((i for i, word in enumerate(words) if word in program), None)
    assert place is not None, f"{' '.join(words)} does not run {name}"
    end = words.index(">") if ">" in words else None
    return words[place + 1 : end]


@pytest.mark.parametrize("prog", PARSERS)
def test_each_flag_has_a_text_and_shows_its_default(prog):
    _, parser = PARSERS[prog]
    shown = " ".join(parser.format_help().split())
    for action in flags(parser):
        assert action.help, action.dest
        text = parser._get_formatter()._expand_help(action)
        assert " ".join(text.split()) in shown, text
        if not any(action.default is none for none in (None, False, argparse.SUPPRESS)):
            assert f"(default: {action.default})" in text, action.dest


@pytest.mark.parametrize("prog", PARSERS)
def test_many_flags_are_in_groups(prog):
    _, parser = PARSERS[prog]
    titled = [group for group in parser._action_groups[2:] if group._group_actions]  # after the two that argparse makes
    loose = [action.dest for action in flags(parser) if not any(action in group._group_actions for group in titled)]
    if len(flags(parser)) > 9:
        assert len(titled) > 1 and not loose


@pytest.mark.parametrize("prog", PARSERS)
def test_two_examples_parse(prog):
    name, parser = PARSERS[prog]
    top = next(parser for other, parser in PARSERS.values() if other == name)
    lines = examples(parser)
    assert len(lines) >= 2
    for words in lines:
        assert not any("..." in word for word in words)
        if words[0] != "make":  # the Makefile has that example's flags
            top.parse_args(own_flags(words, name))


RUN_EACH = """
import os, runpy, sys
import numpy  # the only slow import left, done once for all

folder, *programs = sys.argv[1:]
for program in programs:
    if os.fork() == 0:
        os.dup2(os.open(f"{folder}/{program}", os.O_CREAT | os.O_WRONLY), 1)
        sys.argv = [f"{program}.py", "--help"]
        path = f"{program}.py"
        if os.path.exists(path):
            sys.argv[0] = os.path.abspath(path)
            runpy.run_path(path, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    os.wait()
"""


def test_help_does_not_wait_for_torch(tmp_path, monkeypatch):
    """With a torch that cannot be imported, --help of every program is the same."""
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "torch.py").write_text("raise SystemExit(9)")
    (tmp_path / "out").mkdir()
    names = {name.removesuffix(".__main__"): name for name in PROGRAMS}
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", RUN_EACH, tmp_path / "out", *names]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    for program, name in names.items():
        parser = next(parser for other, parser in PARSERS.values() if other == name)
        assert (tmp_path / "out" / program).read_text() == parser.format_help(), program


def test_a_flag_that_is_unknown_is_one_sentence(command):
    for name in PROGRAMS:
        result = command(importlib.import_module(name).main, "--colour")
        assert result.code == 2 and result.err.endswith("(see --help).\n") and result.err.count("\n") == 1


def test_help_in_a_shell(command):
    for name in PROGRAMS:
        result = command(importlib.import_module(name).main, "--help")
        program = f"python -m {name.removesuffix('.__main__')}" if "." in name else f"{name}.py"
        assert result.code == 0 and result.out.startswith(f"usage: {program} ") and not result.err
        assert "\nexamples:\n" in result.out
