"""The documentation: its commands parse, its adapters exist, its parameter counts and hours are right."""

import functools
import importlib
import itertools
import json
import re
import shlex
import sys

import pytest
from helpers.commands import call
from helpers.stand_ins import run, write_world
from helpers.tiny_models import ROOT

import train
from benchmarks import harness
from runtime.cli import Parser

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = {"python", "torchrun", "accelerate"}
SCRIPTS = {f"{name}.py": name for name in ("train", "sample", "sample_ddp", "evaluate")}
PLACEHOLDER = "..."


# ---- commands of a page --------------------------------------------------------------------------


def shell_lines(page):
    """Yield the commands of the bash blocks of a page, one per line, with `for` loops written out."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        text = block.replace("\\\n", " ")

        def write_out(match):
            name, values, body = match.groups()
            return "".join(body.replace(f"${name}", value) for value in values.split())

        yield from re.sub(r"for (\w+) in ([^;]*); do\n(.*?)done\n", write_out, text, flags=re.DOTALL).splitlines()


def commands(page):
    """Return [(module, flags)] of the project's commands in a page; a line with "..." is no complete command."""
    found = []
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)
        words = list(itertools.takewhile(lambda word: word not in ("&", "|", "||", "&&", ";"), words))
        if not LAUNCHERS & set(words) or PLACEHOLDER in words:
            continue
        for i, word in enumerate(words):
            if word in SCRIPTS:
                found.append((SCRIPTS[word], words[i + 1 :]))
                break
            if word.startswith(("tools.", "benchmarks.", "examples.")) and words[i - 1] == "-m":
                found.append((word, words[i + 1 :]))
                break
    return found


COMMANDS = [(page.name, module, flags) for page in PAGES for module, flags in commands(page)]


class Parsed(Exception):
    """Stops a command after its flags are parsed; the argument is the namespace."""


def parse(monkeypatch, module, flags):
    """Parse flags with the parser of a command, which does nothing else."""

    def parse_args(parser, argv=None):
        raise Parsed(super(Parser, parser).parse_args(argv))

    name = f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module
    main = importlib.import_module(name).main
    monkeypatch.setattr(Parser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *flags])
    with pytest.raises(Parsed) as stop:
        main()
    monkeypatch.undo()
    return stop.value.args[0]


def ids(case):
    return " ".join([case[0], case[1], *case[2][:4]])


# ---- tests ---------------------------------------------------------------------------------------


def test_the_commands_are_found():
    counts = {page.name: len(commands(page)) for page in PAGES}
    assert counts["README.md"] >= 7 and counts["paper.md"] == 37 and counts["figures.md"] >= 5
    assert {module for _, module, _ in COMMANDS} >= {*SCRIPTS.values(), "tools.export", "tools.figures"}


@pytest.mark.parametrize("case", COMMANDS, ids=ids)
def test_a_documented_command_has_known_flags(case, monkeypatch):
    _, module, flags = case
    parse(monkeypatch, module, flags)


def test_an_unknown_flag_is_found(monkeypatch):
    with pytest.raises(ValueError, match="--max-stps"):
        parse(monkeypatch, "train", ["--latents", "x", "--max-stps", "3"])
    with pytest.raises(ValueError, match="--metrc"):
        parse(monkeypatch, "tools.figures", ["tables", "--metrc", "fid"])


@pytest.mark.parametrize("name", ["README.md", "paper.md"])
def test_a_page_uses_adapters_that_its_training_commands_write(name, monkeypatch):
    written, used = set(), set()
    for page, module, flags in COMMANDS:
        if page != name:
            continue
        if module == "train" and "--max-steps" in flags:
            args = parse(monkeypatch, module, flags)
            steps = {*range(args.ckpt_every, args.max_steps, args.ckpt_every), args.max_steps}
            written |= {f"{args.results_dir}/{args.experiment}/adapters/{step:07d}.safetensors" for step in steps}
        used |= {flag for flag in flags if "/adapters/" in flag}
    assert used and used <= written


# ---- the commands, run on stand-ins --------------------------------------------------------------

RUN = {  # page -> words of the commands that are not run, as others like them are
    "README.md": (),
    "your-own-images.md": (),
    "paper.md": ("inat", "-full", "-bitfit", "-difffit"),
}


@pytest.mark.parametrize("name", RUN)
def test_the_commands_of_a_page_run_one_after_the_other(name, tmp_path, monkeypatch):
    """Each finds what the commands before it have written; only data and published weights are there at the start."""
    write_world(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    for page, module, flags in COMMANDS:
        if page == name and not any(word in " ".join(flags) for word in RUN[name]):
            run(module, flags)


def test_a_command_that_names_a_file_which_nothing_writes_fails(tmp_path, monkeypatch):
    write_world(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="no file results/birds/adapters/0002000.safetensors"):
        run("sample", "--ckpt results/birds/adapters/0002000.safetensors --classes all".split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_pip_and_conda_commands_name_what_exists(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        for flag in ("-r", "-f"):
            if words[:1] in (["pip"], ["conda"]) and flag in words:
                assert (ROOT / words[words.index(flag) + 1]).is_file(), line


# ---- the page on the paper -----------------------------------------------------------------------

PAPER = ROOT / "docs/paper.md"
TRAININGS = [flags for module, flags in commands(PAPER) if module == "train"]
EXPERIMENTS = [flags[flags.index("--experiment") + 1] for flags in TRAININGS]
GPUS = 8
THROUGHPUT = 40e12, 110e12, 250e12  # FLOP/s assumed of V100, A100, H100
count_flops = functools.cache(harness.count_flops)  # slow


def row(title):
    """Return the cells of the row of the page's tables that starts with `title`."""
    (line,) = [line for line in PAPER.read_text().splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def hours(flop):
    return [f"{flop / (GPUS * rate * 3600):.1f}" for rate in THROUGHPUT]


def test_every_trained_row_of_the_paper_has_a_training():
    methods = "full", "bitfit", "difffit", "finediffusion"
    expected = [f"{data}-{method}" for data in ("inat", "vegfru") for method in methods]
    assert sorted(EXPERIMENTS) == sorted([*expected, "inat-512-finediffusion"])


@pytest.mark.parametrize("flags", TRAININGS, ids=EXPERIMENTS)
def test_a_training_command_trains_the_parameters_in_the_page(flags, monkeypatch):
    args = parse(monkeypatch, "train", flags)
    data = args.experiment.split("-")[0]
    assert args.max_steps == {"inat": 200_000, "vegfru": 100_000}[data]
    assert args.image_size == (512 if "-512-" in args.experiment else 256)
    assert args.experiment.endswith(f"-{args.method}")
    hierarchy = {"inat": "inat2021", "vegfru": "vegfru"}[data]
    assert flags[0] == "--latents"  # which are not here: the hierarchy takes their place
    result = call(train.main, *flags[2:], "--dry-run", "--hierarchy", hierarchy)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    trained = f"{found['trainable_params']:,}", f"{found['trainable_percent']:.2f}%"
    size = args.image_size // 8
    # DiffFit's factors need no matrix products
    flop = count_flops("DiT-XL/2", size, "full" if args.method == "full" else "bitfit")
    assert row(f"`{args.experiment}`") == [*trained, *hours(flop * args.max_steps * args.global_batch_size)]


@pytest.mark.parametrize("count, pixels", [(100_000, 256), (100_000, 512), (14_600, 256)])
def test_the_hours_of_sampling_follow_from_the_counted_flop(count, pixels):
    flop = count_flops("DiT-XL/2", pixels // 8) * 2 * 250 * count
    assert row(f"{count:,} at {pixels} pixels") == hours(flop)


def test_the_counted_flop_are_in_the_page():
    text, giga = PAPER.read_text(), 1e9
    for size, method in ((32, "bitfit"), (32, "full"), (64, "bitfit"), (32, None), (64, None)):
        assert f"{count_flops('DiT-XL/2', size, method) / giga:,.0f}" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), target
