# SPDX-License-Identifier: Apache-2.0
"""Imports point down: a module imports from a strictly lower layer or from its own folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lightning_bn

PACKAGE = Path(lightning_bn.__file__).parent
LAYERS = {
    "findings": 0,
    "stats": 0,
    "taps": 0,
    "norms": 0,
    "first_signal": 0,
    "gains": 0,
    "init_plan": 0,
    "initialization": 0,
    "layers": 0,
    "lsuv": 0,
    "scope": 0,
    "channels": 0,
    "filling": 0,
    "init_report": 0,
    "figures": 0,
    "heatmaps": 0,
    "verdict_figures": 0,
    "outlook": 0,
    "precise": 0,
    "quarantine": 0,
    "residual": 0,
    "tracing": 0,
    "schemes": 0,
    "swap": 0,
    "first_pass": 0,
    "overview": 0,
    "parameter_groups": 0,
    "preflight": 0,
    "surroundings": 0,
    "source": 0,
    "operations": 0,
    "lineage": 0,
    "writes": 0,
    "replay": 0,
    "rules": 1,
    "sinks": 1,
    "callbacks": 2,
    "locate": 2,
    "demo": 2,
    "recipe_files": 0,
    "catalogue": 0,
    "promises": 0,
    "run_report": 2,
    "auto": 3,
    "studies": 3,
    "training_cli": 4,
    "cli": 5,
    "__main__": 6,
    "__init__": 7,
}
DOORS = {"callbacks/base.py", "training_cli.py", "demo/data.py", "demo/models.py", "studies/fitting.py"}


def imported_modules(source, *, runtime_only=False):
    """Absolute names of all imports of a source text, those under TYPE_CHECKING included unless told otherwise."""
    tree = ast.parse(source)
    if runtime_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(relative, source):
    """Imports of a file of the package that do not point down."""
    unit = Path(relative).parts[0].removesuffix(".py")
    folder = len(Path(relative).parts) > 1
    for name in imported_modules(source):
        parts = name.split(".")
        if parts[0] != "lightning_bn" or len(parts) == 1:
            continue
        target = parts[1] if parts[1] in LAYERS else "__init__"
        own_folder = target == unit if folder else (PACKAGE / f"{target}.py").exists()
        if LAYERS[target] > LAYERS[unit] or (LAYERS[target] == LAYERS[unit] and not own_folder and target != "stats"):
            yield f"{relative} imports {name}"


SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("relative", [name for name in SOURCES if name != "__init__.py"])
def test_imports_point_down(relative):
    """A module imports from a strictly lower layer, from its own folder, or from the arithmetic in stats."""
    assert list(violations(relative, (PACKAGE / relative).read_text())) == []


@pytest.mark.parametrize(
    ("relative", "planted"),
    [
        pytest.param("stats/moments.py", "from lightning_bn.callbacks.base import Monitor", id="from"),
        pytest.param("rules/affine_drift.py", "import lightning_bn.cli", id="import"),
        pytest.param("taps.py", "def f():\n    from lightning_bn.rules import dead_units", id="inside a function"),
        pytest.param("sinks.py", "from lightning_bn.rules.not_watched import not_watched", id="sideways"),
        pytest.param("findings.py", "from lightning_bn import NaNGuard", id="through the package"),
    ],
)
def test_a_planted_upward_import_is_caught(relative, planted):
    """The check above sees an import that points up or sideways, in any form."""
    assert list(violations(relative, planted)) != []


def test_every_unit_has_a_layer():
    """A new file or folder at the top of the package has to be given a layer."""
    units = {Path(name).parts[0].removesuffix(".py") for name in SOURCES}
    assert units == set(LAYERS)


def test_only_the_doors_import_lightning_at_run_time():
    """Lightning is imported by the callbacks' base class, the command line and the demo alone."""
    found = {
        name
        for name in SOURCES
        for module in imported_modules((PACKAGE / name).read_text(), runtime_only=True)
        if module.split(".")[0] in {"lightning", "pytorch_lightning"}
    }
    assert found <= DOORS
