# SPDX-License-Identifier: Apache-2.0
"""BatchNormMonitor measures γ and β drift from the start and from the best validation, and claims no more."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from specimens import Healthy, loader, network
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_bn import BatchNormMonitor, Severity
from lightning_bn.callbacks import drift


class Planned(Healthy):
    """Sets γ, β and the logged validation loss by plan: one entry for each epoch."""

    def __init__(self, losses, gammas, net=None):
        super().__init__(net, lr=0.0)
        self.losses, self.gammas = losses, gammas

    def on_train_batch_end(self, *args):
        nn.init.constant_(self.net[1].weight, self.gammas[self.current_epoch])
        nn.init.constant_(self.net[1].bias, self.gammas[self.current_epoch] - 1)

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.log("val_loss", torch.tensor(self.losses[self.current_epoch]))


def last(trainer, tag):
    return EventAccumulator(trainer.log_dir).Reload().Scalars(tag)[-1].value


def test_drift_is_measured_from_the_start_and_from_the_best_validation(make_trainer):
    """γ 1 → 1.1 (best) → 1.5: a drift of 0.5 from the start and 0.4/1.1 from the best, β in the unit of γ."""
    monitor = BatchNormMonitor(assess=False)
    model = Planned([0.5, 0.7], [1.1, 1.5], network(depth=1))
    make_trainer(monitor, max_epochs=2).fit(model, loader(), loader(seed=1))
    (finding,) = monitor.findings
    assert finding.data["since_start"]["net.1"] == pytest.approx([0.5, 0.5])
    assert finding.data["since_best"]["net.1"] == pytest.approx([0.4 / 1.1, 0.4 / 1.1])
    assert finding.data["watched"] == pytest.approx({"name": "val_loss", "best": 0.5, "best_epoch": 0, "last": 0.7})


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        pytest.param([0.5, 0.7], "while val_loss rose by 0.2 (+40%)", id="rose"),
        pytest.param([0.7, 0.5], "val_loss is at its best (0.5, epoch 1)", id="fell"),
        pytest.param([0.5, float("nan")], "val_loss ended as nan", id="NaN at the end"),
    ],
)
def test_the_finding_says_whether_validation_loss_rose_and_claims_no_more(make_trainer, losses, words):
    """An info with both movements side by side, no advice, and no word of a cause."""
    monitor = BatchNormMonitor(assess=False)
    make_trainer(monitor, max_epochs=2).fit(Planned(losses, [1.1, 1.5]), loader(), loader(seed=1))
    (finding,) = monitor.findings
    assert (finding.rule, finding.severity, finding.advice) == ("affine-drift", Severity.INFO, "")
    assert words in finding.evidence
    assert finding.evidence.endswith("Movement alone is not a fault")


def test_drift_is_logged_on_due_steps_only(make_trainer):
    """The overview stands at the due steps and ends with the planned value."""
    monitor = BatchNormMonitor(every_n_steps=4)
    trainer = make_trainer(monitor, max_epochs=2)
    trainer.fit(Planned([0.5, 0.7], [1.1, 1.5], network(depth=1)), loader(), loader(seed=1))
    events = EventAccumulator(trainer.log_dir).Reload()
    assert [event.step for event in events.Scalars("bn_overview/gamma_drift_max")] == [3, 7]
    # Callbacks run before the module's own hook, which sets γ in this specimen.
    assert last(trainer, "bn_overview/gamma_drift_max") == pytest.approx(0.5)
    assert last(trainer, "bn_overview/gamma_drift_since_best_max") == pytest.approx(0.4 / 1.1)


@pytest.mark.parametrize(
    ("every", "batches", "epochs", "window"), [(1, 4, 2, 1), (3, 4, 5, 1), (7, 4, 8, 2), (25, 4, 20, 1), (5, 3, 9, 2)]
)
def test_no_due_step_is_slept_through(make_trainer, every, batches, epochs, window):
    """In epochs of few batches, and where an optimizer step takes several: each step that is due is logged, once."""
    options = {"max_epochs": epochs, "limit_train_batches": batches, "accumulate_grad_batches": window}
    trainer = make_trainer(BatchNormMonitor(every_n_steps=every, assess=False), limit_val_batches=0, **options)
    trainer.fit(Healthy(network(depth=1)), loader())
    assert trainer.num_training_batches == batches
    events = EventAccumulator(trainer.log_dir).Reload().Scalars("bn_overview/gamma_drift_max")
    steps = epochs * -(-batches // window)  # the last window of an epoch may be shorter
    assert [event.step for event in events] == list(range(every - 1, steps, every))


def test_a_zero_gamma_that_closes_a_residual_block_is_measured_against_sqrt_c(make_trainer):
    """γ₀ = 0 is a deliberate start: its drift is in units of √C and finite."""
    net = network(depth=1)
    nn.init.zeros_(net[1].weight)
    monitor = BatchNormMonitor(assess=False)
    make_trainer(monitor).fit(Planned([0.5], [0.25], net), loader(), loader(seed=1))
    assert monitor.findings[0].data["since_start"]["net.1"] == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize(
    ("build", "watch", "words"),
    [
        pytest.param(lambda: Healthy(network(norm=False)), "val_loss", "no BatchNorm layer", id="no BatchNorm"),
        pytest.param(Healthy, "val_los", "watch='val_los' was never logged", id="misspelt metric"),
    ],
)
def test_what_cannot_be_assessed_is_said(make_trainer, build, watch, words):
    """A missing layer or metric is an info that names it, not silence."""
    monitor = BatchNormMonitor(watch, assess=False)
    make_trainer(monitor).fit(build(), loader(), loader(seed=1))
    assert [finding.severity for finding in monitor.findings if words in finding.evidence] == [Severity.INFO]


def test_a_model_without_batchnorm_is_searched_once_and_not_on_every_step(make_trainer, monkeypatch):
    """What the model does not have is not looked for again: steps that are not due cost nothing."""
    searches = []
    monkeypatch.setattr(drift, "affine_of", lambda model: searches.append(model) or {})
    make_trainer(BatchNormMonitor(every_n_steps=50)).fit(Healthy(network(norm=False)), loader())
    assert len(searches) == 1


def test_a_misspelt_metric_gets_the_nearest_names(make_trainer):
    """The advice offers what was logged."""
    monitor = BatchNormMonitor("val_los", assess=False)
    make_trainer(monitor).fit(Healthy(), loader(), loader(seed=1))
    assert "val_loss" in monitor.findings[0].advice


class SeesModules(pickle.Pickler):
    """Notes every module that hangs on what is pickled."""

    def __init__(self):
        super().__init__(io.BytesIO())
        self.seen = []

    def persistent_id(self, found):
        if isinstance(found, nn.Module):
            self.seen.append(type(found).__name__)


def test_no_layer_hangs_on_a_monitor_that_is_pickled(make_trainer):
    """Copies of γ and β go with it, and none of the layers that it follows, in the midst of a fit and behind it."""
    monitor, pickler = BatchNormMonitor(every_n_steps=1), SeesModules()

    class Pickles(Callback):
        def on_train_batch_end(self, *_):
            pickler.dump(monitor)

    make_trainer(monitor, Pickles(), max_epochs=2).fit(Healthy(network()), loader(), loader(seed=1))
    pickler.dump(monitor)
    assert pickler.seen == []
    pickler.dump([network()])
    assert "BatchNorm1d" in pickler.seen


def test_without_validation_the_drift_is_still_told(make_trainer):
    """A run without a validation loop ends with the drift and says that the rest was not assessed."""
    monitor = BatchNormMonitor(assess=False)
    make_trainer(monitor).fit(Healthy(), loader())
    assert "was not assessed" in monitor.findings[-1].evidence


def test_the_sanity_check_is_no_validation(make_trainer):
    """Values of the sanity check, before the first step, are no best validation."""

    class SanityIsBest(Healthy):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.tensor(0.1 if self.trainer.sanity_checking else 0.9))

    monitor = BatchNormMonitor(assess=False)
    make_trainer(monitor, num_sanity_val_steps=1).fit(SanityIsBest(), loader(), loader(seed=1))
    assert monitor.findings[0].data["watched"]["best"] == pytest.approx(0.9)


def test_lazy_batchnorm_is_followed_from_its_first_values(make_trainer):
    """Layers that get their parameters in the first batch are measured as the others."""
    net = nn.Sequential(nn.LazyLinear(16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(4))
    monitor = BatchNormMonitor(assess=False)

    class Lazy(Healthy):
        def configure_optimizers(self):
            self(torch.zeros(2, 12))
            return super().configure_optimizers()

    make_trainer(monitor).fit(Lazy(net), loader())
    assert monitor.findings[-1].data["since_start"]["net.1"][0] > 0


def test_a_resumed_run_keeps_reference_best_values_and_history(make_trainer, tmp_path):
    """Start and best validation of the first run are those that the resumed run measures from."""
    path = tmp_path / "first.ckpt"
    trainer = make_trainer(BatchNormMonitor(assess=False), max_epochs=1)
    trainer.fit(Planned([0.5, 0.7], [1.1, 1.5], network(depth=1)), loader(), loader(seed=1))
    trainer.save_checkpoint(path)
    resumed = BatchNormMonitor(every_n_steps=2, assess=False)  # an argument changed between the runs
    model = Planned([0.5, 0.7], [1.1, 1.5], network(depth=1))
    make_trainer(resumed, max_epochs=2).fit(model, loader(), loader(seed=1), ckpt_path=path, weights_only=True)
    data = resumed.findings[-1].data
    assert data["since_start"]["net.1"] == pytest.approx([0.5, 0.5])
    assert data["since_best"]["net.1"] == pytest.approx([0.4 / 1.1, 0.4 / 1.1])
    assert data["watched"]["best_epoch"] == 0


def test_ctrl_c_still_ends_with_the_finding(make_trainer):
    """A run that the user ends by hand is summed up as well."""

    class Interrupted(Healthy):
        def on_train_epoch_end(self):
            raise KeyboardInterrupt

    monitor = BatchNormMonitor(assess=False)
    with pytest.raises(SystemExit):
        make_trainer(monitor).fit(Interrupted(), loader(), loader(seed=1))
    assert [finding.rule for finding in monitor.findings] == ["affine-drift"]


def test_ctrl_c_in_an_assessment_does_not_repeat_what_was_said(make_trainer, monkeypatch):
    """What was summed up before the assessment began is said once."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_bn.callbacks.batchnorm_monitor.conclude", interrupted)
    monitor = BatchNormMonitor()
    with pytest.raises(SystemExit):
        make_trainer(monitor).fit(Healthy(), loader(), loader(seed=1))
    assert [finding.rule for finding in monitor.findings] == ["affine-drift"]


@pytest.mark.parametrize(
    ("watch", "refused"),
    [("val_acc", True), ("val/f1", True), ("Accuracy", True), ("val_loss", False), ("backmap_loss", False)],
)
def test_a_metric_that_rises_while_a_network_learns_is_not_taken_for_a_loss(make_trainer, watch, refused):
    """Of an accuracy there is no verdict, and the reason names the argument; of a loss there is no such reason."""

    class Logs(Healthy):
        def validation_step(self, batch, batch_idx):
            self.log(watch, 0.1 * (1.0 + self.current_epoch))

    monitor = BatchNormMonitor(watch)
    make_trainer(monitor, max_epochs=2).fit(Logs(), loader(), loader(seed=1))
    said = [f.evidence for f in monitor.findings if f.rule == "not-assessed"]
    assert any(f"of watch={watch!r} larger values are better" in words for words in said) is refused


@pytest.mark.parametrize("value", ["", None, 3])
def test_a_wrong_watch_is_refused_with_name_need_and_got(value):
    """The error names the argument, what it needs and what it got."""
    with pytest.raises(ValueError, match=f"watch must be the name of a logged metric, got {value!r}"):
        BatchNormMonitor(value)
