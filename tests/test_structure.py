"""The house: imports go from a higher floor to a lower one, nobody imports a script, and files stay short."""

import ast

import pytest
from tiny import ROOT, SOURCES

FLOORS = [
    # scripts, and all of tools/: tools alone may use one another
    {"train", "sample", "sample_ddp", "evaluate"},
    # joins
    {"runs", "training_options", "sampling_options"},
    {"checkpoint", "sampling", "watching", "evaluation.image_sets"},
    {"steps", "evaluation.npz_sets", "evaluation.measure", "evaluation.comparison"},
    # parts
    {"models", "data", "autoencoder", "finetune", "memory", "guidance"},
    {"metrics", "evaluation.features", "evaluation.reports", "pictures", "sample_store", "evaluation"},
    {"tiered_embedder", "hierarchy", "latents", "diffusion"},
    {"diffusion.respace"},
    {"diffusion.gaussian_diffusion", "folders", "pickles"},
    {"diffusion.likelihood", "diffusion.schedule", "packing", "runtime"},
]
MOST_LINES = 400


def module_of(path):
    """folders.py -> folders; diffusion/respace.py -> diffusion.respace; diffusion/__init__.py -> diffusion"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def is_tool(module):
    return module.split(".")[0] == "tools"


def floor(module):
    if is_tool(module):
        return 0
    return next((i for i, modules in enumerate(FLOORS) if module in modules), None)


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
    return {name for name in found if name.split(".")[0] in {known.split(".")[0] for known in MODULES}}


def test_the_modules_are_found():
    assert {"train", "models", "diffusion", "diffusion.respace", "tools.encode_latents"} <= MODULES.keys()
    assert "tools.diffusers_pipeline.pipeline_finediffusion" in MODULES  # packages within packages, too
    assert imported("models") == {"tiered_embedder"}
    assert {"diffusion.respace", "diffusion.schedule"} <= imported("diffusion")
    assert {"checkpoint", "finetune", "steps"} <= imported("train") <= MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    assert floor(module) is not None, f"{module} has no floor: give it one in FLOORS"
    for other in imported(module):
        assert other in MODULES, f"{module} imports {other}, which is not there"
        if is_tool(module) and is_tool(other):
            continue
        assert floor(other) > 0, f"{module} imports the script {other}"
        assert floor(other) > floor(module), f"{module} imports {other}, which is not below it"


@pytest.mark.parametrize("module", MODULES)
def test_no_circle_of_imports(module):
    """What the floors leave open: among the modules of tools/."""
    seen, waiting = set(), imported(module)
    while waiting:
        other = waiting.pop()
        assert other != module
        waiting |= imported(other) - seen if other not in seen else set()
        seen.add(other)


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module):
    assert len(MODULES[module].read_text().splitlines()) <= MOST_LINES
