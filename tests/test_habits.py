# SPDX-License-Identifier: Apache-2.0
"""House rules that a machine can hold: sizes, docstrings, arguments that are documented."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import lightning.pytorch.callbacks
import pytest

import lightning_bn
from lightning_bn.callbacks.base import Monitor

ROOT = Path(__file__).parent.parent
PACKAGE = Path(lightning_bn.__file__).parent
CALLBACKS = [
    *("ActivationMonitor", "BatchNormMonitor", "NaNGuard", "PreciseBatchNorm", "PreflightAudit", "SwapBatchNorm"),
    "WeightInit",
]


def functions(path):
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_and_functions_stay_small(path):
    """A file has at most 300 lines, a function body at most 40."""
    assert len(path.read_text().splitlines()) <= 300
    for node in functions(path):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        assert not body or body[-1].end_lineno - body[0].lineno + 1 <= 40, node.name


def test_every_test_says_what_it_claims():
    """Each test has a docstring of one sentence."""
    silent = [
        f"{path.name}::{node.name}"
        for path in sorted(ROOT.joinpath("tests").rglob("test_*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if not (ast.get_docstring(node) or "").endswith(".")
    ]
    assert silent == []


@pytest.mark.parametrize("name", CALLBACKS)
def test_the_docstring_documents_exactly_the_constructors_arguments(name):
    """``Args:`` of a callback lists its constructor's arguments, in order: LightningCLI's help is made from it."""
    callback = getattr(lightning_bn, name)
    section = re.search(r"Args:\n(.*?)\n\n", inspect.getdoc(callback), re.DOTALL).group(1)
    documented = re.findall(r"^    (\w+): ", section, re.MULTILINE)
    assert documented == list(inspect.signature(callback).parameters)


@pytest.mark.parametrize("name", CALLBACKS)
def test_arguments_are_few_keyword_only_and_never_carried_over(name):
    """At most eight of its own, keyword-only after the first, none with a name that LightningCLI carries over."""
    parameters = list(inspect.signature(getattr(lightning_bn, name)).parameters.values())
    assert len([parameter for parameter in parameters if parameter.name != "ignore"]) <= 8  # which all of them have
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[1:])
    others = [getattr(lightning.pytorch.callbacks, other) for other in lightning.pytorch.callbacks.__all__]
    taken = {argument for other in others for argument in inspect.signature(other).parameters}
    assert {"mode", "monitor", "verbose", "patience", "every_n_epochs"} <= taken
    assert not {parameter.name for parameter in parameters} & taken


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_argument_is_kept_under_its_name(name):
    """Two instances made alike have equal arguments, from which a recipe that was read twice is known."""
    callback = getattr(lightning_bn, name)
    assert list(callback().arguments()) == list(inspect.signature(callback).parameters)
    assert callback().arguments() == callback().arguments()
    assert callback().arguments() != callback(ignore=["monitor-failed"]).arguments()


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_hook_is_shielded_or_says_why_not(name):
    """A hook that Lightning calls either is shielded or calls nothing but shielded methods and collectives."""
    unshielded = {
        "WeightInit": {"setup", "on_train_start", "on_train_batch_start", "on_exception"},
        "NaNGuard": {
            "setup",
            "on_before_backward",
            "on_after_backward",
            "on_before_optimizer_step",
            "on_train_batch_end",
            "on_train_epoch_end",
            "on_validation_start",
            "on_validation_batch_start",
            "on_validation_batch_end",
            "on_validation_end",
            "on_test_batch_start",
            "on_test_batch_end",
            "on_test_end",
            "on_exception",
        },
        "ActivationMonitor": {"setup", "on_train_start", "on_train_batch_start", "on_train_batch_end", "on_exception"},
        "BatchNormMonitor": {
            "setup",
            "on_train_start",
            "on_train_batch_start",
            "on_before_backward",
            "on_train_batch_end",
            "on_before_optimizer_step",
            "on_validation_end",
            "on_train_end",
            "on_exception",
        },
        "PreflightAudit": {"setup", "on_train_batch_start", "on_exception"},
        "SwapBatchNorm": {"setup", "on_exception"},
        "PreciseBatchNorm": {"on_train_start", "on_validation_epoch_start", "on_train_end", "on_exception"},
    }
    callback = getattr(lightning_bn, name)
    own = [base for base in callback.__mro__ if issubclass(base, Monitor) and base is not Monitor]
    hooks = {key: vars(base)[key] for base in reversed(own) for key in vars(base)}
    hooks = {key: hook for key, hook in hooks.items() if key.startswith("on_") or key == "setup"}
    assert {key for key, hook in hooks.items() if not hasattr(hook, "__wrapped__")} == unshielded[name]


def test_monitors_share_one_base_class():
    """Every callback is a Monitor, whose hooks open and close what belongs to a fit."""
    assert all(issubclass(getattr(lightning_bn, name), Monitor) for name in CALLBACKS)
