# SPDX-License-Identifier: Apache-2.0
"""Projects that have never heard of this package: each way in works, or says why not."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import lightning.pytorch
import lightning.pytorch.cli
import pytest
import pytorch_lightning
import torch
from hosting import HOSTS

from lightning_bn import auto, diagnose, read_findings, recipe_files

OURS = ["PreflightAudit", "NaNGuard", "ActivationMonitor", "BatchNormMonitor"]
pytestmark = pytest.mark.filterwarnings("ignore")  # of projects that are not ours


def there(trainer):
    """Class names of a trainer's callbacks, in order, without those that Lightning adds by itself."""
    added = {"ModelCheckpoint", "SaveConfigCallback", "RichModelSummary", "RichProgressBar", "ModelSummary", "Witness"}
    names = (type(entry).__name__ for entry in trainer.callbacks)
    return [name for name in names if name not in added | {"TQDMProgressBar"}]


def said(folder="."):
    """How often each rule was said in a folder."""
    return Counter(entry.rule for path in Path(folder).rglob("findings.jsonl") for entry in read_findings(path))


CLIS = [
    pytest.param("train_lightning.py", ["fit", "--config", "base.yaml"], ["LearningRateMonitor"], id="list"),
    pytest.param("train_lightning.py", ["fit", "--config", "callbacks_null.yaml"], [], id="null"),
    pytest.param("train_lightning.py", ["fit", "--config", "callbacks_absent.yaml"], [], id="absent"),
    pytest.param(
        "train_lightning.py", ["fit", "--config", "callbacks_single.yaml"], ["LearningRateMonitor"], id="a single one"
    ),
    pytest.param("forced.py", ["fit", "--config", "base.yaml"], ["EarlyStopping", "LearningRateMonitor"], id="forced"),
    pytest.param(
        "defaults.py", ["fit", "--config", "base.yaml"], ["LearningRateMonitor", "Log"], id="trainer_defaults"
    ),
    pytest.param("parser_defaults.py", ["fit", "--config", "callbacks_absent.yaml"], ["Log"], id="parser defaults"),
    pytest.param(
        "train_pytorch_lightning.py",
        ["fit", "--config", "base.yaml"],
        ["LearningRateMonitor"],
        id="pytorch_lightning",
    ),
    pytest.param("without_run.py", ["--config", "base.yaml"], ["LearningRateMonitor"], id="run=False"),
    pytest.param(
        "own_trainer.py", ["fit", "--config", "base.yaml"], ["LearningRateMonitor"], id="a subclassed Trainer"
    ),
    pytest.param(
        "train_lightning.py",
        ["fit", "--config", "callbacks_absent.yaml", "--config", "base.yaml", "--trainer.max_epochs", "1"],
        ["LearningRateMonitor"],
        id="several configs",
    ),
]
SCRIPTS = [
    pytest.param("script_lightning.py", id="a script"),
    pytest.param("script_pytorch_lightning.py", id="a script on pytorch_lightning"),
]


def with_paths(words):
    return [HOSTS / word if word.endswith(".yaml") else word for word in words]


@pytest.mark.parametrize(("project", "words", "own"), CLIS)
def test_a_recipe_is_appended_by_name(host, project, words, own):
    """``--config lbn://diagnose`` behind the project's own words: all its callbacks and all of ours, and findings."""
    trainer = host(project, *with_paths(words), "--config", "lbn://diagnose")
    assert Counter(there(trainer)) == Counter([*own, *OURS])
    assert said()["few-values-per-channel"] == 1
    assert "lost-callbacks" not in said()


@pytest.mark.parametrize(("project", "words", "own"), CLIS)
def test_the_environment_attaches_a_recipe_to_a_command_line(host, monkeypatch, project, words, own):
    """``LIGHTNING_BN=diagnose`` and not a word on the command line: the same callbacks, and not in the saved config."""
    monkeypatch.setenv(auto.VARIABLE, "diagnose")
    trainer = host(project, *with_paths(words))
    assert Counter(there(trainer)) == Counter([*own, *OURS])
    assert said()["few-values-per-channel"] == 1
    assert all("lightning_bn" not in path.read_text() for path in Path().rglob("config.yaml"))


@pytest.mark.parametrize("project", SCRIPTS)
def test_the_environment_attaches_a_recipe_to_a_script(host, monkeypatch, project):
    """``LIGHTNING_BN=diagnose python train.py``, in a project without any command line of Lightning's."""
    monkeypatch.setenv(auto.VARIABLE, "diagnose")
    assert there(host(project)) == ["Log", *OURS]
    assert said()["few-values-per-channel"] == 1


@pytest.mark.parametrize("project", SCRIPTS)
def test_callbacks_of_the_code_work_in_a_script(host, monkeypatch, project):
    """``Trainer(callbacks=[*diagnose()])`` watches in both packages."""
    for package in (lightning.pytorch, pytorch_lightning):
        monkeypatch.setattr(package.Trainer, "__init__", with_diagnosis(package.Trainer.__init__))
    assert there(host(project)) == ["Log", *OURS]
    assert said()["few-values-per-channel"] == 1


def with_diagnosis(init):
    """The constructor of a Trainer, as if the project's code had ``diagnose()`` in its list."""

    def made(self, *args, callbacks=None, **kwargs):
        init(self, *args, callbacks=[callbacks, *diagnose()], **kwargs)

    return made


def test_a_trainer_without_callbacks_says_why_not_and_leaves_the_environment(host, monkeypatch, capsys):
    """A function that takes no callbacks: LightningCLI names the option that is missing; the other way in works."""
    with pytest.raises(SystemExit):
        host("function_trainer.py", "fit", "--config", "lbn://diagnose")
    assert "does not accept option 'trainer.callbacks+'" in capsys.readouterr().err
    monkeypatch.setenv(auto.VARIABLE, "diagnose")
    monkeypatch.delattr(lightning.pytorch.cli, "build_class")  # jsonargparse's mark, of which a process has one
    assert there(host("function_trainer.py", "fit")) == ["Log", *OURS]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--config", "lbn://diagnose", "--config", "base.yaml"], id="by name"),
        pytest.param(["--config=lbn://diagnose.yaml", "--config=base.yaml"], id="with equals signs"),
        pytest.param(["--trainer.callbacks+=lightning_bn.NaNGuard", "--config", "base.yaml"], id="a class alone"),
        pytest.param(["--config", "copy.yaml", "--config", "base.yaml"], id="a copy"),
    ],
)
def test_a_recipe_in_front_of_the_projects_own_list_is_told(host, capsys, words):
    """The list that is read later replaces ours: a warning says which callbacks are lost, and the order that works."""
    Path("copy.yaml").write_text(recipe_files.catalogue.text("why_nan"))
    places = {"base.yaml": str(HOSTS / "base.yaml"), "--config=base.yaml": f"--config={HOSTS / 'base.yaml'}"}
    trainer = host("train_lightning.py", "fit", *(places.get(word, word) for word in words))
    assert there(trainer) == ["LearningRateMonitor"]
    assert said() == {"lost-callbacks": 1}
    text = capsys.readouterr().err
    assert "a later list of callbacks replaced them" in text
    assert "--config your.yaml" in text


def test_a_list_that_is_plainly_meant_to_replace_is_no_loss(host):
    """``--trainer.callbacks`` on the command line takes the place of every list, and nothing is said."""
    words = ["--config", HOSTS / "callbacks_null.yaml", "--config", "lbn://diagnose"]
    trainer = host("train_lightning.py", "fit", *words, "--trainer.callbacks", "LearningRateMonitor")
    assert there(trainer) == ["LearningRateMonitor"]
    assert not said()


def test_a_recipe_given_twice_watches_once(host):
    """The second of each rests and says so; nothing else is said twice."""
    twice = ["--config", "lbn://diagnose", "--config", "lbn://diagnose"]
    trainer = host("train_lightning.py", "fit", "--config", HOSTS / "base.yaml", *twice)
    assert there(trainer).count("NaNGuard") == 2
    assert said().pop("attached-twice") == len(OURS)
    assert set(said().values()) == {1, len(OURS)}
    resting = [entry for entry in trainer.callbacks if type(entry).__name__ in OURS][len(OURS) :]
    assert all(entry.off for entry in resting)


def test_a_saved_config_with_the_recipe_on_top_watches_once(host):
    """A saved ``config.yaml`` contains the recipe already."""
    host("train_lightning.py", "fit", "--config", HOSTS / "base.yaml", "--config", "lbn://why_nan")
    (saved,) = Path().rglob("config.yaml")
    host("train_lightning.py", "fit", "--config", saved, "--config", "lbn://why_nan")
    assert said()["attached-twice"] == 1


def test_what_the_environment_adds_rests_beside_the_projects_own(host, monkeypatch):
    """The callback of the config does the work, whatever its arguments; the one that was added says that it rests."""
    monkeypatch.setenv(auto.VARIABLE, "diagnose")
    words = ["--config", HOSTS / "base.yaml", "--config", "lbn://why_nan"]
    trainer = host("train_lightning.py", "fit", *words)
    guards = [entry for entry in trainer.callbacks if type(entry).__name__ == "NaNGuard"]
    assert [(entry.save_batch, entry.off) for entry in guards] == [(True, False), (False, True)]
    assert said()["attached-twice"] == 1
    assert said()["few-values-per-channel"] == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        pytest.param(["fit", "--trainer", "section.yaml"], "the whole trainer section", id="--trainer"),
        pytest.param(
            ["--config", "own.yaml", "--config", "nested.yaml", "fit"], "in front of the subcommand", id="nested"
        ),
        pytest.param(["fit", "--config", "both.yaml"], "callbacks+ alone", id="both"),
    ],
)
def test_callbacks_of_the_project_that_ours_replaced_are_told(host, words, reason):
    """Three ways in which ``callbacks+`` replaces instead of appending: a warning says why and what works."""
    appended = "callbacks+: [{class_path: lightning_bn.NaNGuard}]"  # in whatever section
    own = "{accelerator: cpu, max_epochs: 1, enable_progress_bar: false, callbacks: [{class_path: LearningRateMonitor}]"
    Path("section.yaml").write_text(f"accelerator: cpu\nmax_epochs: 1\n{appended}\n")
    Path("own.yaml").write_text(f"fit: {{trainer: {own}}}}}\n")
    Path("nested.yaml").write_text(f"fit: {{trainer: {{{appended}}}}}\n")
    Path("both.yaml").write_text(f"trainer: {own}, {appended}}}\n")
    trainer = host("train_lightning.py", *words)
    assert there(trainer) == ["NaNGuard"]
    assert said()["lost-callbacks"] == 1
    assert reason in next(entry for path in Path().rglob("findings.jsonl") for entry in read_findings(path)).evidence


def test_a_checkpoint_saved_with_the_callbacks_loads_without_them(host, monkeypatch):
    """Remove the callbacks later: the run goes on from the checkpoint, with the weights that it has."""
    monkeypatch.setenv(auto.VARIABLE, "diagnose")
    first = host("train_lightning.py", "fit", "--config", HOSTS / "base.yaml")
    monkeypatch.delenv(auto.VARIABLE)
    resumed_is_a_plain_run(host, first)


def test_a_checkpoint_saved_without_the_callbacks_loads_with_them(host, monkeypatch):
    """Add the callbacks later: the run goes on from the checkpoint, and is watched."""
    first = host("train_lightning.py", "fit", "--config", HOSTS / "base.yaml")
    monkeypatch.setenv(auto.VARIABLE, "diagnose")
    resumed_is_a_plain_run(host, first)
    assert said()["few-values-per-channel"] == 1


def resumed_is_a_plain_run(host, first):
    """Two epochs more give the weights of four epochs at once, to the bit."""
    before = os.environ.pop(auto.VARIABLE, None)
    whole = host("train_lightning.py", "fit", "--config", HOSTS / "base.yaml", "--trainer.max_epochs", "4")
    if before:
        os.environ[auto.VARIABLE] = before
    path = first.checkpoint_callback.best_model_path
    words = ["--config", HOSTS / "base.yaml", "--trainer.max_epochs", "4", "--ckpt_path", path]
    resumed = host("train_lightning.py", "fit", *words)
    assert resumed.current_epoch == whole.current_epoch == 4
    expected = whole.lightning_module.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in resumed.lightning_module.state_dict().items())


def test_a_start_beside_another_start_is_told(host):
    """Two recipes for the start: the first has the weights, and the second says who has them and what to take out."""
    starts = ["--config", "lbn://init_he", "--config", "lbn://init_naive"]
    host("train_lightning.py", "fit", "--config", HOSTS / "base.yaml", *starts)
    (path,) = Path().rglob("findings.jsonl")
    (finding,) = [entry for entry in read_findings(path) if entry.rule == "not-initialised"]
    assert "by another WeightInit of this trainer (he)" in finding.evidence
    assert "take the other one out" in finding.advice
