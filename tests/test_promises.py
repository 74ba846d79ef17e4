# SPDX-License-Identifier: Apache-2.0
"""What the command line of a LightningCLI asks for, and what it is sure to lose."""

from __future__ import annotations

import pytest

from lightning_bn import recipe_files
from lightning_bn.promises import Promise, promises

GUARD = "callbacks+: [{class_path: lightning_bn.NaNGuard, init_args: {action: warn}}]"


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    monkeypatch.setattr(recipe_files, "OPENED", [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ours.yaml").write_text(f"trainer: {{{GUARD}}}\n")
    (tmp_path / "flat.yaml").write_text(f"trainer.{GUARD}\n")
    (tmp_path / "nested.yaml").write_text(f"fit: {{trainer: {{{GUARD}}}}}\n")
    (tmp_path / "section.yaml").write_text(f"{GUARD}\n")
    (tmp_path / "both.yaml").write_text(f"trainer: {{callbacks: [LearningRateMonitor], {GUARD}}}\n")
    (tmp_path / "saved.yaml").write_text(
        "trainer: {callbacks: [{class_path: lightning_bn.callbacks.nan_guard.NaNGuard}]}"
    )
    (tmp_path / "base.yaml").write_text("trainer: {callbacks: [LearningRateMonitor]}\n")
    (tmp_path / "torn.yaml").write_text("trainer: {callbacks+: [lightning_bn.NaNGuard")
    (tmp_path / "model.yaml").write_text("model: {class_path: lightning_bn.demo.DigitsMLP}\ntrainer: {max_epochs: 1}\n")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--config", "ours.yaml"], id="file"),
        pytest.param(["--config=ours.yaml"], id="equals sign"),
        pytest.param(["-c", "ours.yaml", "--config", "base.yaml"], id="short"),
        pytest.param(["--config", "flat.yaml"], id="flat keys"),
        pytest.param(["--config", f"trainer: {{{GUARD}}}\n"], id="text"),
        pytest.param(["fit", "--config", "nested.yaml"], id="section of a subcommand"),
        pytest.param(["--config", "nested.yaml", "fit"], id="the only one in front of the subcommand"),
        pytest.param(["--config", "saved.yaml"], id="a saved config, by its long path"),
        pytest.param(["--trainer.callbacks+=lightning_bn.NaNGuard"], id="class"),
        pytest.param(["--trainer.callbacks+", "lightning_bn.NaNGuard"], id="class as a word of its own"),
        pytest.param(["--trainer.callbacks+=[{class_path: lightning_bn.NaNGuard}]"], id="list"),
    ],
)
def test_a_source_that_names_our_callback_promises_it(words):
    """Whatever way LightningCLI takes configs, and no loss is sure."""
    (found,) = promises(words, {})
    assert found.callbacks == ("NaNGuard",)
    assert found.replaces is None


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="nothing"),
        pytest.param(["--config", "base.yaml"], id="others"),
        pytest.param(["--config", "nosuch.yaml"], id="no such file"),
        pytest.param(["--config"], id="no value"),
        pytest.param(["--config", "torn.yaml"], id="no YAML"),
        pytest.param(["--config", "model.yaml"], id="our demo without our callbacks"),
        pytest.param(["--config", "x" * 5000], id="a name too long for a file"),
        pytest.param(["--recipe", "ours.yaml"], id="another option"),
        pytest.param(["--config", "ours.yaml", "--trainer.callbacks=LearningRateMonitor"], id="plainly replaced"),
        pytest.param(["--trainer.callbacks.help", "lightning_bn.NaNGuard"], id="help"),
    ],
)
def test_what_names_none_of_ours_promises_nothing(words):
    """Other options, other callbacks, what is no config, and what the command line itself replaces."""
    assert promises(words, {}) == []


def test_the_names_of_a_recipe_are_those_of_its_callbacks():
    """``lbn://`` names are read without a file; one that was opened without a word on the command line counts too."""
    expected = ("PreflightAudit", "NaNGuard", "ActivationMonitor", "BatchNormMonitor")
    assert promises(["--config", "lbn://diagnose"], {}) == [Promise("lbn://diagnose", expected)]
    recipe_files.OPENED.extend(["diagnose", "diagnose"])
    assert promises([], {}) == [Promise("lbn://diagnose", expected)]
    assert promises(["--config", "lbn://diagnose"], {}) == [Promise("lbn://diagnose", expected)]


def test_the_environment_of_lightningcli_is_read():
    """``PL_FIT__CONFIG`` and ``PL_FIT__TRAINER__CALLBACKS`` are sources; other variables are not."""
    given = {
        "PL_FIT__CONFIG": "ours.yaml",
        "PL_FIT__TRAINER__CALLBACKS": "[lightning_bn.WeightInit]",
        "CONFIG": "ours.yaml",
    }
    assert [entry.callbacks for entry in promises([], given)] == [("NaNGuard",), ("WeightInit",)]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        pytest.param(["fit", "--trainer", "section.yaml"], "whole trainer section", id="--trainer"),
        pytest.param(["--config", "base.yaml", "--config", "nested.yaml", "fit"], "front of", id="nested"),
        pytest.param(["fit", "--config", "both.yaml"], "callbacks and callbacks+", id="both"),
    ],
)
def test_a_sure_loss_of_the_projects_callbacks_has_a_reason(words, reason):
    """Where ``callbacks+`` is known to replace, the promise says why."""
    (found,) = promises(words, {})
    assert reason in found.replaces
