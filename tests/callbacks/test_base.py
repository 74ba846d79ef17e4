# SPDX-License-Identifier: Apache-2.0
"""What every monitor does alike: one door to two packages, life-cycle, state, printing, its own errors."""

from __future__ import annotations

import copy
import io
import pickle
import re

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from specimens import Healthy, LogOfNegative, loader, with_module
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_bn import (
    ActivationMonitor,
    BatchNormMonitor,
    NaNGuard,
    PreciseBatchNorm,
    PreflightAudit,
    WeightInit,
    diagnose,
    read_findings,
)
from lightning_bn.callbacks.base import Monitor, shielded
from lightning_bn.callbacks.console import print_above_bar

EVERY = {
    "WeightInit": WeightInit,
    "NaNGuard": NaNGuard,
    "ActivationMonitor": ActivationMonitor,
    "BatchNormMonitor": BatchNormMonitor,
}

MONITORS = [NaNGuard, ActivationMonitor, BatchNormMonitor, PreciseBatchNorm, PreflightAudit, WeightInit]


class Pickles(Healthy):
    """Pickles and copies all monitors in the middle of each step."""

    def training_step(self, batch, batch_idx):
        for callback in self.trainer.callbacks:
            if isinstance(callback, Monitor):
                pickle.loads(pickle.dumps(callback))  # noqa: S301
                copy.deepcopy(callback)
        return super().training_step(batch, batch_idx)


class Breaks(ActivationMonitor):
    """Has an error of its own, in a place of choice."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    @shielded
    def _hear(self, *args):
        assert self.place != "forward hook", "a bug of ours"
        return super()._hear(*args)

    @shielded
    def _publish(self, ranks):
        assert self.place != "batch end", "a bug of ours"
        return super()._publish(ranks)


@pytest.mark.parametrize("monitor", EVERY.values(), ids=EVERY)
def test_a_monitor_is_a_callback_of_both_packages(monitor):
    """One class serves ``lightning.pytorch`` and ``pytorch_lightning``."""
    assert isinstance(monitor(), lightning.pytorch.Callback)
    assert isinstance(monitor(), pytorch_lightning.Callback)


@pytest.mark.slow
def test_the_trainer_of_pytorch_lightning_runs_them(tmp_path):
    """The four callbacks train a model of the other package, and write their findings."""

    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = with_module(LogOfNegative())

        def training_step(self, batch, batch_idx):
            return self.inner(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    logger = pytorch_lightning.loggers.TensorBoardLogger(str(tmp_path), name="run", version=0)
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=logger,
        max_epochs=1,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[WeightInit(), NaNGuard("warn"), ActivationMonitor(), BatchNormMonitor()],
    )
    trainer.fit(Other(), loader())
    assert {finding.rule for finding in read_findings(trainer.log_dir)} >= {"invalid-operation"}


@pytest.mark.parametrize("place", ["forward hook", "batch end"])
def test_an_internal_error_is_reported_once_and_switches_the_monitor_off(make_trainer, place):
    """Training ends as if nothing had been attached; one warning carries the traceback; other monitors go on."""
    broken, sound = Breaks(place), ActivationMonitor()
    trainer = make_trainer(broken, sound)
    model = Healthy()
    trainer.fit(model, loader())
    assert trainer.global_step == 4
    (finding,) = broken.findings
    assert (finding.rule, finding.severity.value, broken.off) == ("monitor-failed", "warning", True)
    assert "Traceback" in finding.data["traceback"]
    assert sound.statistics
    assert not any(module._forward_hooks for module in model.modules())


def test_a_monitor_that_failed_is_on_again_in_the_next_fit(make_trainer):
    """Off means off for one run."""
    broken = Breaks("batch end")
    make_trainer(broken).fit(Healthy(), loader())
    broken.place = "nowhere"
    make_trainer(broken).fit(Healthy(), loader())
    assert not broken.off
    assert broken.statistics


def test_a_findings_file_that_cannot_be_written_stops_nothing(make_trainer, tmp_path, capsys):
    """Where the directory is in the way the finding is printed and kept, and the guard still raises."""
    (tmp_path / "lightning_bn").write_text("in the way")
    guard = NaNGuard()
    with pytest.raises(RuntimeError, match="invalid-operation"):
        make_trainer(guard, logger=False).fit(Healthy(with_module(LogOfNegative())), loader())
    assert [finding.rule for finding in guard.findings] == ["invalid-operation"]
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("interruption", [ZeroDivisionError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_exception_in_the_middle_of_a_step(make_trainer, interruption):
    """An exception inside training_step, while hooks are open, leaves none behind."""

    class Interrupted(Healthy):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            assert any(module._forward_hooks for module in self.modules())
            raise interruption

    model = Interrupted()
    with pytest.raises((ZeroDivisionError, SystemExit)):
        make_trainer(*diagnose()).fit(model, loader())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_batch_that_the_module_breaks_off_leaves_no_hooks(make_trainer):
    """``on_train_batch_start`` returning -1 skips the batch's end; the epoch's end lets go."""

    class BreaksOff(Healthy):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

        def on_validation_start(self):
            assert not any(module._forward_hooks for module in self.modules())

    model = BreaksOff()
    make_trainer(ActivationMonitor()).fit(model, loader(), loader())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("monitor", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])  # noqa: S301
def test_a_copy_made_before_the_fit_works_and_its_findings_are_on_disk(make_trainer, monitor, clone):
    """Libraries train a copy of what they were given: it does the same, and the run's file has the findings."""
    original = monitor()
    twin = clone(original)
    trainer = make_trainer(twin)
    trainer.fit(Healthy(), loader(), loader())
    assert original.findings == []
    assert [finding.rule for finding in read_findings(trainer.log_dir)] == [finding.rule for finding in twin.findings]
    assert twin.stem == original.stem


@pytest.mark.parametrize("monitor", EVERY.values(), ids=EVERY)
def test_a_callback_can_be_pickled_in_the_middle_of_a_step(make_trainer, monitor):
    """Libraries pickle callbacks with the model: no hook, file or trainer hangs on them."""
    instance = monitor()
    make_trainer(instance).fit(Pickles(), loader(), loader())
    assert not instance.off


@pytest.mark.parametrize("monitor", EVERY.values(), ids=EVERY)
def test_state_is_plain_and_survives_the_round_trip(make_trainer, tmp_path, monitor):
    """A checkpoint with the states loads with ``weights_only=True``, and loading then saving changes nothing."""
    instance, keeper = monitor(), ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    make_trainer(instance, keeper, enable_checkpointing=True).fit(Healthy(), loader(), loader())
    state = torch.load(keeper.last_model_path, weights_only=True)["callbacks"][instance.state_key]
    fresh = monitor()
    fresh.load_state_dict(copy.deepcopy(state))
    again = fresh.state_dict()
    assert again.keys() == state.keys()
    assert str(again) == str(state)


@pytest.mark.parametrize("monitor", [NaNGuard, ActivationMonitor, BatchNormMonitor])
def test_two_instances_live_side_by_side(make_trainer, tmp_path, monitor):
    """Instances that watch the same have keys of their own and do not disturb each other."""
    one, other = monitor(), monitor(ignore=["monitor-failed"])
    keeper = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    make_trainer(one, other, keeper, enable_checkpointing=True).fit(Healthy(), loader(), loader())
    keys = torch.load(keeper.last_model_path, weights_only=True)["callbacks"]
    assert {one.state_key, other.state_key} <= set(keys)
    assert one.state_key != other.state_key
    assert [finding.evidence for finding in one.findings] == [finding.evidence for finding in other.findings]


@pytest.mark.parametrize("monitor", MONITORS)
def test_the_second_of_two_equal_instances_rests_and_says_so(make_trainer, monitor):
    """One that is there twice, as by a recipe that was read twice, works once, in every fit anew."""
    one, other = monitor(), monitor()
    trainer = make_trainer(one, other)
    for fits in (1, 2):
        trainer.fit(Healthy(), loader(), loader())
        assert [finding.rule for finding in other.findings] == ["attached-twice"] * fits
        assert (one.off, other.off) == (False, True)
    assert "attached-twice" not in {finding.rule for finding in one.findings}


@pytest.mark.parametrize("monitor", MONITORS)
def test_what_was_added_rests_beside_the_users_own(make_trainer, monitor):
    """Whatever the order and the arguments; alone it works."""
    own, added = monitor(ignore=["monitor-failed"]), monitor()
    added.added_by = "LIGHTNING_BN=all"
    make_trainer(added, own).fit(Healthy(), loader(), loader())
    assert (own.off, added.off) == (False, True)
    assert "LIGHTNING_BN=all" in added.findings[0].evidence
    make_trainer(added).fit(Healthy(), loader(), loader())
    assert not added.off


def test_a_resumed_run_does_not_repeat_what_was_said(make_trainer, tmp_path):
    """A fault that was reported before the checkpoint is not reported again after it."""
    model, path = Healthy(with_module(LogOfNegative())), tmp_path / "first.ckpt"
    trainer = make_trainer(NaNGuard("warn"))
    trainer.fit(model, loader())
    for parameter in model.parameters():
        nn.init.zeros_(parameter)  # the step made them NaN, which would be a new fault
    trainer.save_checkpoint(path)
    guard = NaNGuard("warn")
    make_trainer(guard, max_epochs=2).fit(model, loader(), ckpt_path=path, weights_only=True)
    assert guard.findings == []


@pytest.mark.parametrize("ignore", ["dead-unitz", ["non-finite-output", 3], 3])
def test_an_unknown_rule_to_ignore_is_refused(ignore):
    """A misspelt rule would silence nothing: the error says what it needs and got."""
    with pytest.raises(ValueError, match=r"ignore must"):
        NaNGuard(ignore=ignore)


BARS = {
    "tqdm": (TQDMProgressBar, {"enable_progress_bar": True}),
    "rich": (RichProgressBar, {"enable_progress_bar": True}),
    "none": (None, {"enable_progress_bar": False}),
}


@pytest.mark.parametrize(("bar", "options"), BARS.values(), ids=BARS)
def test_the_console_shows_every_finding_whole_under_every_bar(make_trainer, capsys, bar, options):
    """Findings from inside an epoch and from the end of the fit are printed on lines of their own."""
    monitors = [NaNGuard("warn"), *(monitor for monitor in diagnose() if not isinstance(monitor, NaNGuard))]
    callbacks = [*monitors, *([bar()] if bar else [])]
    make_trainer(*callbacks, **options).fit(Healthy(with_module(LogOfNegative())), loader(), loader())
    shown = capsys.readouterr()
    lines = [line.strip() for line in re.split(r"[\r\n]", shown.out + shown.err)]
    assert sum(line.startswith("lightning_bn error: invalid-operation net.2 (epoch 0, step 0)") for line in lines) == 1
    assert sum(line.startswith("lightning_bn info: not-watched") for line in lines) >= 1
    assert sum(line.startswith("lightning_bn: 1 error") for line in lines) == 1


def test_square_brackets_in_layer_names_survive_rich(make_trainer):
    """Rich would swallow ``[net]`` as markup; the console gets the text as it is."""

    class Bar(RichProgressBar):
        pass

    bar = Bar()
    trainer = make_trainer(bar, enable_progress_bar=True)
    bar._console = Console(file=io.StringIO(), width=40)
    print_above_bar(trainer, "lightning_bn error: [net] a[0] is a long line that a narrow console must not break")
    assert (
        bar._console.file.getvalue().strip().endswith("[net] a[0] is a long line that a narrow console must not break")
    )


@pytest.mark.parametrize("logger", [False, "csv"])
def test_any_logger_or_none_will_do(make_trainer, tmp_path, logger):
    """Without TensorBoard the overview goes to what there is, and the findings file to its directory."""
    chosen = CSVLogger(str(tmp_path), name="csv", version=0) if logger == "csv" else False
    trainer = make_trainer(*diagnose(), logger=chosen)
    trainer.fit(Healthy(), loader(), loader())
    assert "affine-drift" in {finding.rule for finding in read_findings(trainer.log_dir)}
    if chosen:
        assert "bn_overview/std_log10_median" in (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()


def test_fast_dev_run_works(make_trainer):
    """A one-batch run with dummy loggers ends without an error."""
    monitors = diagnose()
    make_trainer(*monitors, fast_dev_run=True).fit(Healthy(), loader(), loader())
    assert not any(monitor.off for monitor in monitors)


def test_step_axis_is_that_of_self_log_with_two_optimizers(make_trainer):
    """``global_step`` counts every optimizer; findings and charts count batches, as self.log does."""

    class Two(Healthy):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.step()
            self.log("train_loss", float(batch_idx))

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.0), torch.optim.SGD(self.parameters(), 0.0)]

    class Calls(Two):
        def training_step(self, batch, batch_idx):
            self(batch[0])
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(ActivationMonitor(), log_every_n_steps=2)
    trainer.fit(Calls(), loader())
    events = EventAccumulator(trainer.log_dir).Reload()
    ours = [event.step for event in events.Scalars("bn_overview/std_log10_max")]
    assert ours == [event.step for event in events.Scalars("train_loss")] == [1, 3]
