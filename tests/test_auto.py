# SPDX-License-Identifier: Apache-2.0
"""``LIGHTNING_BN=NAME``: attaches what it should, costs nothing without it, and never breaks a Trainer."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from lightning.pytorch import Trainer
from specimens import FEATURES, Healthy, loader
from torch.utils.data import DataLoader

from lightning_bn import auto, catalogue, diagnose
from lightning_bn.callbacks.witness import Witness
from lightning_bn.promises import Promise


@pytest.fixture(autouse=True)
def _unset(monkeypatch, tmp_path):
    monkeypatch.delenv(auto.VARIABLE, raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(auto, "_witnessed", [])
    monkeypatch.chdir(tmp_path)


def names(callbacks):
    return [type(callback).__name__ for callback in callbacks]


@pytest.mark.parametrize("group", ["lightning.pytorch.callbacks_factory", "pytorch_lightning.callbacks_factory"])
def test_both_packages_of_lightning_find_the_factory(group):
    """The installed package has an entry point in the group of each."""
    (entry,) = [entry for entry in entry_points(group=group) if entry.name == "lightning_bn"]
    assert entry.load() is auto.factory


@pytest.mark.parametrize("value", [None, "", " ", "0"])
def test_nothing_is_attached_unless_the_variable_is_set(monkeypatch, value):
    """Unset, empty or 0: an empty list."""
    if value is not None:
        monkeypatch.setenv(auto.VARIABLE, value)
    assert auto.factory() == []


def test_without_the_variable_neither_torch_nor_yaml_is_imported():
    """The factory of an unset variable imports nothing that takes time."""
    code = "import sys; from lightning_bn.auto import factory; factory(); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "'lightning_bn.auto'" in done.stdout
    assert not any(
        f"'{name}'" in done.stdout for name in ("torch", "lightning", "yaml", "fsspec", "lightning_bn.promises")
    )


def test_the_recipe_diagnose_is_diagnose():
    """Classes and arguments of ``LIGHTNING_BN=diagnose`` are those of ``diagnose()``."""
    attached = auto.attach("diagnose")
    assert names(attached) == names(diagnose())
    assert [entry.arguments() for entry in attached] == [entry.arguments() for entry in diagnose()]
    assert {entry.added_by for entry in attached} == {"LIGHTNING_BN=diagnose"}


@pytest.mark.parametrize("name", [name for name in catalogue.names() if name != "digits"])
def test_every_recipe_can_be_attached(name):
    """What a recipe names is made with its arguments, and a Trainer takes it."""
    attached = auto.attach(name)
    assert attached
    trainer = Trainer(callbacks=attached, logger=False, accelerator="cpu", enable_progress_bar=False)
    assert set(names(attached)) <= set(names(trainer.callbacks))


def test_several_recipes_attach_each_class_once():
    """The first recipe that names a class says its arguments."""
    attached = auto.attach("why_nan, diagnose")
    assert names(attached) == ["NaNGuard", "PreflightAudit", "ActivationMonitor", "BatchNormMonitor"]
    assert attached[0].save_batch


def test_a_copy_can_be_changed(tmp_path):
    """A path of a YAML file in the form of a recipe does what it says; numbers are converted as LightningCLI does."""
    path = catalogue.copy("why_nan", str(tmp_path))
    text = path.read_text().replace("save_batch: true", "action: skip\n        max_skips: 3")
    path.write_text(text)
    (guard,) = auto.attach(str(path))
    assert (guard.action, guard.max_skips, guard.save_batch) == ("skip", 3, False)
    path.write_text("trainer: {callbacks+: [lightning_bn.PreflightAudit]}")
    assert names(auto.attach(str(path))) == ["PreflightAudit"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(None, ["NAME must be one of", "why_nan", "'mine.yaml'"], id="no such file"),
        pytest.param("trainer: {callbacks: []}", ["mine.yaml needs a list under trainer: callbacks+:"], id="no list"),
        pytest.param("- 1", ["mine.yaml needs a list under trainer: callbacks+:"], id="no mapping"),
        pytest.param("{", ["expected"], id="no YAML"),
        pytest.param("trainer: {callbacks+: [LearningRateMonitor]}", ["of lightning_bn, got Learning"], id="other"),
        pytest.param("trainer: {callbacks+: [lightning_bn.Nope]}", ["has no attribute 'Nope'"], id="no class"),
        pytest.param(
            "trainer: {callbacks+: [{class_path: lightning_bn.NaNGuard, init_args: {action: halt}}]}",
            ["lightning_bn.NaNGuard", "action", "halt"],
            id="bad argument",
        ),
        pytest.param(
            "trainer: {callbacks+: [{class_path: lightning_bn.WeightInit, init_args: {seed: -1}}]}",
            ["seed must be a whole number of at least 0", "-1"],
            id="argument out of range",
        ),
    ],
)
def test_what_is_wrong_is_said_and_no_trainer_breaks(monkeypatch, tmp_path, capsys, content, words):
    """A message on stderr names the variable and the fault; the Trainer is made without us."""
    if content is not None:
        (tmp_path / "mine.yaml").write_text(content)
    monkeypatch.setenv(auto.VARIABLE, "mine.yaml")
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    text = capsys.readouterr().err
    assert text.startswith("lightning_bn: LIGHTNING_BN=mine.yaml attaches nothing: ")
    assert all(word in text for word in words)
    assert not any(type(entry).__module__.startswith("lightning_bn") for entry in trainer.callbacks)


def test_a_trainer_of_a_broken_installation_is_still_made(monkeypatch, capsys):
    """Whatever goes wrong inside is printed, not raised."""
    monkeypatch.setenv(auto.VARIABLE, "diagnose")
    monkeypatch.setattr(auto, "attach", lambda words: 1 / 0)
    assert auto.factory() == []
    assert "division by zero" in capsys.readouterr().err


def test_one_trainer_of_a_process_has_the_witness(monkeypatch, tmp_path):
    """Where the command line names callbacks of ours, the first Trainer is compared with it, and no other."""
    (tmp_path / "mine.yaml").write_text(catalogue.text("why_nan"))
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", "mine.yaml"])
    assert names(auto.factory()) == ["Witness"]
    assert auto.factory() == []


def test_a_wrong_name_does_not_take_the_witness_away(monkeypatch, tmp_path, capsys):
    """What the variable asks for and what the command line names are looked at apart from each other."""
    (tmp_path / "mine.yaml").write_text(catalogue.text("why_nan"))
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", "mine.yaml"])
    monkeypatch.setenv(auto.VARIABLE, "nosuch")
    assert names(auto.factory()) == ["Witness"]
    assert "LIGHTNING_BN=nosuch attaches nothing" in capsys.readouterr().err


def test_predictions_lose_nothing(make_trainer, capsys):
    """The witness compares when something that ours would watch begins, and is silent in ``predict``."""
    witness = Witness([Promise("mine.yaml", ("NaNGuard",))])
    trainer = make_trainer(witness)
    trainer.predict(Healthy(), DataLoader(torch.randn(4, FEATURES)))
    assert "lightning_bn" not in capsys.readouterr().err
    trainer.validate(Healthy(), loader(), verbose=False)
    assert [finding.rule for finding in witness.findings] == ["lost-callbacks"]
