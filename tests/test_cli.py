# SPDX-License-Identifier: Apache-2.0
"""The command line, and the recipes in projects that know nothing of this package."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hosting import HOSTS

from lightning_bn import NaNGuard, NonFiniteError, read_findings

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of projects that are not ours


SICK = """
import torch
from lightning_bn.demo.models import Classifier

class Log(torch.nn.Module):
    def forward(self, x):
        return torch.log(x.flatten(1))

class Net(Classifier):
    def __init__(self):
        super().__init__(torch.nn.Sequential(torch.nn.Flatten(), Log(), torch.nn.Linear(64, 10)), 1e-3)
"""


def run(folder, *words, check=True):
    """Run a command in an empty folder; its output is plain text, as wide as it needs."""
    environment = {**os.environ, "COLUMNS": "200", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0 or not check, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def found(folder):
    """All findings below a folder."""
    return [finding for path in sorted(folder.rglob("findings.jsonl")) for finding in read_findings(path)]


def test_the_demo_ends_with_a_table_and_the_tensorboard_command(tmp_path):
    """``lightning-bn fit --config recipes/digits.yaml`` trains, tells what it found and how to look at it."""
    done = run(tmp_path, "-m", "lightning_bn", "fit", "--config", RECIPES / "digits.yaml", "--trainer.max_epochs", "2")
    assert "affine-drift" in done.stdout
    assert "what was seen, and what to do" in done.stdout
    assert "tensorboard --logdir lightning_logs" in done.stdout
    assert [finding.rule for finding in found(tmp_path)] == ["affine-drift", "no-overfitting"]


def test_a_fault_ends_with_the_table_and_a_short_error(tmp_path):
    """A run that the guard stops shows the finding in the table, exits with 1 and shows no traceback."""
    (tmp_path / "sick.py").write_text(SICK)
    done = run(
        tmp_path,
        *("-m", "lightning_bn", "fit", "--config", RECIPES / "digits.yaml", "--model", "sick.Net"),
        check=False,
    )
    assert done.returncode == 1
    assert "invalid-operation" in done.stdout
    assert "tensorboard --logdir" in done.stdout
    assert "NonFiniteError: lightning_bn error: invalid-operation net.1" in done.stderr
    assert "Traceback" not in done.stderr
    assert [finding.layer for finding in found(tmp_path)] == ["net.1"]


def test_a_saved_step_is_run_again_by_replay(tmp_path, host, capsys):
    """``lightning-bn replay FILE`` names operation and line, ends with 1, and trains and writes nothing."""
    (tmp_path / "broken.py").write_text(SICK)
    host.monkeypatch.syspath_prepend(tmp_path)
    model = (*("--config", "lbn://digits"), *("--model", "broken.Net"))
    guard = ("--trainer.callbacks", "lightning_bn.NaNGuard", "--trainer.callbacks.save_batch", "true")
    assert host.command("fit", *model, *guard) != 0
    (path,) = tmp_path.rglob("batch_validation_step0_rank0.pt")
    before = sorted(tmp_path.rglob("*"))
    done = run(tmp_path, "-m", "lightning_bn", "replay", path, *model, check=False)
    assert done.returncode == 1
    assert "invalid-operation" in done.stdout
    assert "broken.py:7 in forward" in done.stdout
    assert [entry for entry in sorted(tmp_path.rglob("*")) if "pycache" not in str(entry)] == [
        entry for entry in before if "pycache" not in str(entry)
    ]
    missing = str(host.command("replay", "nosuch.pt", *model)) + capsys.readouterr().err
    assert "path must be a saved step" in missing


@pytest.mark.parametrize(
    ("recipe", "project", "change"),
    [
        pytest.param("init_he", "train_lightning.py", ["exclude", "[body]"], id="he"),
        pytest.param("init_xavier", "train_pytorch_lightning.py", ["nonlinearity", "linear"], id="xavier"),
        pytest.param("init_naive", "train_lightning.py", ["scheme", "1000"], id="naive"),
    ],
)
def test_a_start_is_appended_to_any_project_with_the_change_of_its_header(tmp_path, host, recipe, project, change):
    """The recipe's start is in the report beside the findings, as changed by the override that its header shows."""
    argument, value = change
    words = ("fit", "--config", HOSTS / "base.yaml", "--config", f"lbn://{recipe}")
    host(project, *words, f"--trainer.callbacks.{argument}", value)
    (path,) = tmp_path.rglob("init.json")
    content = json.loads(path.read_text())
    schemes = {row["scheme"] for row in content["parameters"]}
    assert content["first_batch"]["signal"]
    assert {
        "init_he": "kept" in schemes and any("excluded" in row["why"] for row in content["parameters"]),
        "init_xavier": {row["gain"] for row in content["parameters"] if row["scheme"] == "xavier"} == {1.0},
        "init_naive": "normal(1000)" in schemes,
    }[recipe]


@pytest.mark.parametrize("project", ["train_lightning.py", "train_pytorch_lightning.py"])
def test_the_recipe_finds_a_planted_fault_in_any_project(tmp_path, host, project):
    """The same project with a NaN inside ends with a report that names the first bad module."""
    words = ("fit", "--config", HOSTS / "base.yaml", "--config", "lbn://diagnose", "--model.scale", ".nan")
    with pytest.raises(NonFiniteError, match="body"):
        host(project, *words)
    assert "error" in {finding.severity.value for finding in found(tmp_path)}


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_says_how_to_run_it_and_names_full_class_paths(recipe):
    """Each recipe opens with question, command, one change, limits and what one sees."""
    text = recipe.read_text()
    assert all(f"# {word}:" in text for word in ("Run", "Change", "Limits", "You see"))
    assert text.splitlines()[0].endswith("?")
    content = yaml.safe_load(text)
    if recipe.stem != "digits":
        assert list(content) == ["trainer"]
        assert list(content["trainer"]) == ["callbacks+"]
        assert all(entry["class_path"].startswith("lightning_bn.") for entry in content["trainer"]["callbacks+"])


def test_the_recipes_change_line_works(tmp_path, host):
    """The override that the recipe's header shows addresses the last callback."""
    words = ("fit", "--config", HOSTS / "base.yaml", "--config", "lbn://diagnose")
    host("train_lightning.py", *words, "--trainer.callbacks.watch", "my_validation_loss")
    assert any("my_validation_loss" in finding.evidence for finding in found(tmp_path))


def test_the_change_line_of_the_nan_recipe_works(tmp_path, host):
    """Bad steps can be dropped by the override that its header shows."""
    words = ("fit", "--config", HOSTS / "base.yaml", "--config", "lbn://why_nan")
    trainer = host("train_lightning.py", *words, "--trainer.callbacks.action", "skip")
    assert "--trainer.callbacks.action skip" in (RECIPES / "why_nan.yaml").read_text()
    assert [guard.action for guard in trainer.callbacks if isinstance(guard, NaNGuard)] == ["skip"]
    assert not found(tmp_path)


@pytest.mark.parametrize("project", ["train_lightning.py", "train_pytorch_lightning.py"])
def test_the_recipe_for_small_batches_measures_and_its_change_line_swaps_the_layers(tmp_path, host, project):
    """On batches of 8 the noise is told before and after training; with the override there is no BatchNorm left."""
    fit = ("fit", "--config", HOSTS / "base.yaml", "--config", "lbn://small_batch")
    change = ("--trainer.callbacks+", "lightning_bn.SwapBatchNorm", "--trainer.callbacks.to", "group")
    assert " ".join(change) in (RECIPES / "small_batch.yaml").read_text()
    host(project, *fit, "--trainer.max_epochs", "24")
    layers = {finding.rule: finding.layer for finding in found(tmp_path)}
    assert layers["few-values-per-channel"] == layers["noisy-batch-statistics"] == "body.layers.1"
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    host.monkeypatch.chdir(swapped)
    host(project, *fit, *change)
    findings = found(swapped)
    assert {finding.rule for finding in findings} == {"swapped-batchnorm", "not-watched", "not-re-estimated"}
    (told,) = (finding.evidence for finding in findings if finding.rule == "swapped-batchnorm")
    assert told == "1 BatchNorm layer replaced: 1 by GroupNorm with 1 group (body.layers.1)"


@pytest.mark.parametrize(
    ("callback", "argument", "value", "words"),
    [
        pytest.param("ActivationMonitor", "every_n_steps", 0, "every_n_steps must be a whole number", id="interval"),
        pytest.param("WeightInit", "scheme", "hee", "he, xavier_uniform, naive", id="scheme"),
        pytest.param("NaNGuard", "action", 3, "raise, stop, warn", id="action"),
        pytest.param("NaNGuard", "actoin", "raise", "actoin", id="misspelt argument"),
    ],
)
def test_bad_arguments_are_refused_through_the_command_line(tmp_path, host, capsys, callback, argument, value, words):
    """The error names the argument, what it needs and what it got."""
    config = {"trainer": {"callbacks+": [{"class_path": f"lightning_bn.{callback}", "init_args": {argument: value}}]}}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises((SystemExit, ValueError)) as ended:
        host("train_lightning.py", "fit", "--config", HOSTS / "base.yaml", "--config", "bad.yaml")
    message = f"{capsys.readouterr().err} {ended.value}".replace("'", "")
    assert argument in message
    assert str(value) in message
    assert all(word in message for word in words.replace(",", "").split())


def test_a_glob_that_matches_nothing_warns_through_the_command_line(host, capsys):
    """The run goes on; the console names argument, need, got and the nearest names."""
    words = ("--trainer.callbacks+", "lightning_bn.ActivationMonitor", "--trainer.callbacks.layers", "[bodi.*]")
    host("train_lightning.py", "fit", "--config", HOSTS / "base.yaml", *words)
    text = capsys.readouterr().err
    assert "layers needs patterns that match a module name, got 'bodi.*'" in text
    assert "the nearest names are: body" in text


@pytest.mark.parametrize(
    "callback",
    [
        *("WeightInit", "NaNGuard", "ActivationMonitor", "BatchNormMonitor", "PreciseBatchNorm", "PreflightAudit"),
        "SwapBatchNorm",
    ],
)
def test_help_tells_a_stranger_what_every_argument_does(host, capsys, callback):
    """``--trainer.callbacks.help`` prints the purpose and, for each argument, meaning, choices and default."""
    host.monkeypatch.setenv("COLUMNS", "200")
    assert host.command("fit", "--trainer.callbacks.help", f"lightning_bn.{callback}") == 0
    printed = capsys.readouterr().out
    assert "--trainer.callbacks.ignore" in printed
    assert "slugs of findings that are" in printed
    expected = {
        "WeightInit": ["Initialise the model before training", "xavier_uniform", "N(0, 0.01²)", "residual branch"],
        "NaNGuard": [
            "Watch for NaN and infinity",
            "{raise,stop,warn,skip}",
            "whose message is the report",
            "max_skips",
        ],
        "ActivationMonitor": ["share of zeros", "shell patterns on module names"],
        "BatchNormMonitor": ["whether the network overfits through them", "smaller is better"],
        "PreciseBatchNorm": ["{validation,end}", "most memory for the kept batches"],
        "PreflightAudit": ["before the first step", "model, loader and optimizer"],
        "SwapBatchNorm": ["{group,layer,instance,frozen}", "that does not look at the batch", "most groups of"],
    }
    text = " ".join(printed.split())
    assert all(" ".join(words.split()) in text for words in expected[callback])


def test_a_run_that_is_killed_leaves_a_readable_findings_file(tmp_path):
    """``kill -9`` in the middle of training: what was found until then is on disk and readable."""
    words = [
        *(sys.executable, str(HOSTS / "train_lightning.py"), "fit", "--config", str(HOSTS / "base.yaml")),
        *("--trainer.max_epochs", "100000", "--trainer.callbacks+", "lightning_bn.ActivationMonitor"),
        *("--trainer.callbacks.layers", "[nothing.*]"),
    ]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not found(tmp_path) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1.0)  # in the middle of training by now
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [finding.rule for finding in found(tmp_path)] == ["unmatched-layers"]
