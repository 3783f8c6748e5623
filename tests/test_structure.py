"""The house: imports go down from room to room, nobody imports a command, there are no circles, and files stay short."""

import ast

import pytest
from helpers.tiny_models import ROOT, SOURCES

COMMANDS = {"train", "sample", "sample_ddp", "evaluate"}
FLOORS = [  # a room is a folder or a file of the root; it may import from itself and from the floors below it
    COMMANDS | {"tools", "benchmarks", "examples"},
    {"training", "sampling", "evaluation"},
    {"checkpoint", "dataset"},
    {"models", "finetune", "guidance", "autoencoder"},
    {"tiered_embedder", "hierarchy", "diffusion"},
    {"runtime"},
]
ROOT_FILES = COMMANDS | {"tiered_embedder", "models", "finetune", "guidance", "autoencoder"}
MOST_LINES = 400


def module_of(path):
    """hierarchy/layouts.py -> hierarchy.layouts; diffusion/__init__.py -> diffusion"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def room(module):
    return module.split(".")[0]


def floor(module):
    return next((i for i, rooms in enumerate(FLOORS) if room(module) in rooms), None)


def imported(module):
    """The project's own modules that a module imports, anywhere in it."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = ".".join(filter(None, (package if node.level else "", node.module)))
            inner = {f"{source}.{alias.name}" for alias in node.names} & MODULES.keys()  # from diffusion import respace
            found |= inner or {source}
    return {name for name in found if room(name) in {room(known) for known in MODULES}}


def test_the_modules_are_found():
    assert {"train", "models", "diffusion", "diffusion.respace", "tools.encode_latents"} <= MODULES.keys()
    assert "tools.diffusers_pipeline.pipeline_finediffusion" in MODULES  # packages within packages, too
    assert imported("models") == {"tiered_embedder"}
    assert {"diffusion.respace", "diffusion.schedule"} <= imported("diffusion")
    assert {"training.step", "training.setup"} <= imported("train") <= MODULES.keys()


def test_the_root_holds_the_commands_and_the_paper():
    assert {path.stem for path in ROOT.glob("*.py")} == ROOT_FILES


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    assert floor(module) is not None, f"{room(module)} has no floor: give it one in FLOORS"
    for other in imported(module):
        assert other in MODULES, f"{module} imports {other}, which is not there"
        assert other not in COMMANDS, f"{module} imports the command {other}"
        if room(other) != room(module) and not (floor(module) == 0 == floor(other)):  # what runs may share code
            assert floor(other) > floor(module), f"{module} imports {other}, which is not below it"


@pytest.mark.parametrize("module", MODULES)
def test_no_circle_of_imports(module):
    """What the floors leave open: between the modules of a room."""
    seen, waiting = set(), imported(module)
    while waiting:
        other = waiting.pop()
        assert other != module
        waiting |= imported(other) - seen if other not in seen else set()
        seen.add(other)


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module):
    assert len(MODULES[module].read_text().splitlines()) <= MOST_LINES
