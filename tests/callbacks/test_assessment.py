# SPDX-License-Identifier: Apache-2.0
"""The verdict on overfitting is that of the planted illness, and leaves no trace."""

from __future__ import annotations

import copy
import gc
import re
from pathlib import Path

import pytest
import torch
from harm import assert_identical, everything_after
from identical import everything
from lightning.pytorch import Callback
from overfits import (
    CLASSES,
    DRIVEN,
    ELSEWHERE,
    FEATURES,
    NONE,
    STATISTICS,
    UNKNOWN,
    Overfits,
    ThroughAffine,
    loaders,
    net,
    run,
    sets,
    verdict,
)
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_bn import BatchNormMonitor, PreciseBatchNorm
from lightning_bn.callbacks import judgement
from lightning_bn.callbacks.training_batches import TrainingBatches

ILLNESSES = {
    "γ and β overfit": (ThroughAffine, {}, 25, [DRIVEN]),
    "all weights overfit": (Overfits, {}, 15, [ELSEWHERE]),
    "healthy": (lambda: Overfits(lr=0.001), {"size": 512, "noise": 0, "batch": 16}, 8, [NONE]),
    "stale statistics": (
        lambda: Overfits(net(momentum=0.001), lr=0.001),
        {"size": 512, "noise": 0, "batch": 16},
        8,
        [STATISTICS, NONE],
    ),
}


@pytest.mark.parametrize(("build", "data", "epochs", "expected"), ILLNESSES.values(), ids=ILLNESSES)
def test_the_verdict_is_the_planted_illness(make_trainer, build, data, epochs, expected):
    """Each of the four specimens gets its own verdict; stale statistics are told first, and are no overfitting."""
    monitor = BatchNormMonitor()
    run(make_trainer(monitor, max_epochs=epochs, logger=False), build, loaders(**data))
    assert verdict(monitor) == expected
    assert not monitor.off


def with_dropout(rate):
    """Three hidden layers, each with BatchNorm, and dropout behind it and so in front of the next."""
    layers = []
    for inputs in (FEATURES, 64, 64):
        layers += [nn.Linear(inputs, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(rate)]
    return nn.Sequential(*layers, nn.Linear(64, CLASSES))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rate", "said"), [(0.5, True), (0.0, False)])
def test_dropout_in_front_of_batchnorm_is_told_by_what_it_costs(make_trainer, rate, said, seed):
    """Dropout that shifts what BatchNorm sees is found, and called neither lag nor overfitting; its twin is silent."""
    monitor = BatchNormMonitor()
    data = loaders(size=512, noise=0, batch=16, seed=seed)
    run(make_trainer(monitor, max_epochs=10, logger=False), lambda: Overfits(with_dropout(rate), lr=0.001), data)
    assert verdict(monitor) == [NONE]
    found = [finding.data["dropout"] for finding in monitor.findings if finding.rule == "mismatched-statistics"]
    assert found == (["net.3"] if said else [])


COSTS = {  # passes over the kept validation batches, and over the training ones
    "γ and β overfit": (5, 4),  # four for who carries the rise, and one with the statistics as they are
    "all weights overfit": (5, 4),
    "healthy": (2, 1),
    "stale statistics": (3, 2),
}


@pytest.mark.parametrize("name", ILLNESSES)
def test_an_assessment_costs_about_four_passes_and_says_so(make_trainer, capfd, name):
    """Overfitting costs five validation passes and four re-estimations, a healthy end two and one; both are told."""
    build, data, epochs, _ = ILLNESSES[name]
    monitor = BatchNormMonitor()
    run(make_trainer(monitor, max_epochs=epochs, logger=False), build, loaders(**data))
    validations, estimations = COSTS[name]
    cost = next(finding.data["cost"] for finding in monitor.findings if "cost" in finding.data)
    assert (cost["validations"], cost["estimations"]) == (validations, estimations)
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "assessed in" in line)
    assert re.fullmatch(
        rf"lightning_bn: assessed in [0-9.]+ s: {validations} passes over 240 validation samples, "
        rf"{estimations} over {data.get('size', 48)} training samples",
        line,
    )


class SumOverBatch(Overfits):
    """Its loss is no mean over samples, so that batches cannot be cut."""

    def validation_step(self, batch, batch_idx):
        return self.report(self.loss(self(batch[0]), batch[1]) * len(batch[0]))


@pytest.mark.parametrize("build", [Overfits, SumOverBatch])
@pytest.mark.parametrize("epochs", [2, 15])
def test_the_progress_ends_where_it_said(make_trainer, monkeypatch, build, epochs):
    """Each pass is one of as many as were foretold, also where passes come that nobody needed."""
    told = []
    monkeypatch.setattr(judgement, "_show", lambda bar, done, total: told.append((done, total)))
    monitor = BatchNormMonitor()
    run(make_trainer(monitor, max_epochs=epochs, logger=False), build, loaders(val_batch=40))
    cost = next(finding.data["cost"] for finding in monitor.findings if "cost" in finding.data)
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told][: cost["validations"]] == list(range(1, cost["validations"] + 1))


class KeepsWeights(Callback):
    """Keeps all weights after every validation."""

    def __init__(self):
        self.states, self.losses = [], []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.states.append(copy.deepcopy(pl_module.state_dict()))
            self.losses.append(float(trainer.callback_metrics["val_loss"]))


def loss_of(state, affine_from, data):
    """Validation loss of weights with γ and β of others, and statistics of the whole training set, by torch alone."""
    training, valid = data
    model = Overfits(net(momentum=1.0))  # after one forward pass the statistics are those of its batch
    state = {name: affine_from[name] if is_affine(name, model) else value for name, value in state.items()}
    model.load_state_dict(state)
    with torch.no_grad():
        model.train()(training.tensors[0])
        return float(model.loss(model.eval()(valid.tensors[0]), valid.tensors[1]))


def is_affine(name, model):
    path, _, what = name.rpartition(".")
    return isinstance(model.get_submodule(path), nn.BatchNorm1d) and what in {"weight", "bias"}


def test_losses_are_those_of_the_weights_put_together_by_hand(make_trainer):
    """All settings agree with networks that are loaded from saved weights and run by torch itself."""
    monitor, keeps = BatchNormMonitor(), KeepsWeights()
    run(make_trainer(monitor, keeps, max_epochs=15, logger=False), data=loaders(val_batch=100))
    now, best = keeps.states[-1], keeps.states[keeps.losses.index(min(keeps.losses))]
    data, found = sets(), monitor.losses
    settings = {"now": (now, now), "best": (best, best), "first": (best, now), "last": (now, best)}
    for name, (weights, affine) in settings.items():
        mean = sum(x * n for x, n in zip(getattr(found, name), found.sizes, strict=True)) / sum(found.sizes)
        assert mean == pytest.approx(loss_of(weights, affine, data), rel=1e-4), name
    stored = sum(x * n for x, n in zip(found.stored, found.sizes, strict=True)) / sum(found.sizes)
    assert stored == pytest.approx(keeps.losses[-1], rel=1e-5)


class Traced(Overfits):
    """Uses what a trace could be left in: random streams, metrics, dropout, lists, a buffer and the logger."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Dropout(0.1), net()))
        self.mean, self.seen, self.generator = MeanMetric(), [], torch.Generator().manual_seed(0)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.net[1][0].weight.register_hook(lambda grad: grad)

    def training_step(self, batch, batch_idx):
        self.calls += 1
        noise = torch.rand(1) + torch.rand(1, generator=self.generator)
        loss = super().training_step(batch, batch_idx) + 0 * noise.sum()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self.loss(self(batch[0] + 1e-3 * torch.randn_like(batch[0])), batch[1])
        self.calls += 1
        self.seen.append(loss)
        self.mean(loss)
        self.log("val_loss", self.mean)
        for logger in self.loggers:
            logger.log_metrics({"from the step": 1.0}, step=int(self.calls))


class Around(Callback):
    """Takes a picture of all there is before and after the assessment, by its place among the callbacks."""

    def __init__(self, place):
        self.place = place

    def on_train_end(self, trainer, pl_module):
        self.place.append(
            [
                everything(pl_module),
                copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers]),
                [str(trainer.state.stage), trainer.global_step, trainer.current_epoch, *map(id, trainer.loggers)],
                {name: value.clone() for name, value in trainer.callback_metrics.items()},
                [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pl_module.modules()],
            ]
        )


@pytest.mark.slow
def test_an_assessment_leaves_no_trace(make_trainer):
    """Weights, buffers, gradients, modes, metrics, random streams, optimizers, trainer and hooks are as before."""
    pictures, monitor = [], BatchNormMonitor()
    run(make_trainer(Around(pictures), monitor, Around(pictures), max_epochs=15), Traced)
    assert verdict(monitor) == [ELSEWHERE]
    assert monitor.losses.last is not None  # all settings were run
    before, after = pictures
    assert_identical(before, after)


def test_nothing_that_the_steps_log_reaches_a_logger(make_trainer):
    """All that is written in the assessment is the monitor's own."""
    trainer, written, monitor = make_trainer(BatchNormMonitor(), max_epochs=15), [], None
    monitor = trainer.callbacks[0]
    real = trainer.logger.log_metrics
    trainer.logger.log_metrics = lambda metrics, step=None: (written.extend(metrics), real(metrics, step))

    class Marks(Callback):
        def on_train_end(self, trainer, pl_module):
            written.append("the end of training")

    trainer.callbacks.insert(0, Marks())
    run(trainer, Traced)
    at_end = written[written.index("the end of training") + 1 :]
    assert verdict(monitor) == [ELSEWHERE]
    assert "from the step" in written
    assert [name for name in at_end if not name.startswith("bn_")] == []


def after(make_trainer, monitors, again, path, **options):
    """What is left of a fit, and of a second one that goes on from it."""
    trainer = make_trainer(*monitors, max_epochs=15, **options)
    model = run(trainer, Traced)
    first = everything_after(trainer, model)
    if again == "the same trainer":
        trainer.fit_loop.max_epochs = 18
        trainer.fit(model, *loaders())
    else:
        trainer.save_checkpoint(path)
        trainer = make_trainer(*monitors, max_epochs=18, **options)
        torch.manual_seed(5)
        model = Traced()
        trainer.fit(model, *loaders(), ckpt_path=path, weights_only=True)
    return first, everything_after(trainer, model), trainer.callback_metrics["val_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("again", ["the same trainer", "a checkpoint"])
def test_a_fit_that_was_assessed_and_goes_on_is_bit_identical_to_one_without(make_trainer, again, tmp_path):
    """The first fit and the next are those of plain training; only a checkpoint brings back the best of both."""
    monitors = [BatchNormMonitor()]
    plain = after(make_trainer, [], again, tmp_path / "plain.ckpt")
    watched = after(make_trainer, monitors, again, tmp_path / "watched.ckpt")
    assert_identical(plain, watched)
    assert verdict(monitors[0]) == [ELSEWHERE, ELSEWHERE if again == "a checkpoint" else NONE]


OPTIONS = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "validation inside the epoch": {"val_check_interval": 0.5, "num_sanity_val_steps": 2},
    "clipping": {"gradient_clip_val": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_assessments_in_the_midst_of_a_fit_leave_it_bit_identical(make_trainer, options):
    """Whoever wants γ and β frozen when they overfit, and they do not, gets the same training to the last bit."""
    options = {"max_epochs": 15, "logger": False, **options}
    looks = []

    class Looks(BatchNormMonitor):
        def _assess(self, trainer, pl_module):
            looks.append(trainer.current_epoch)
            return super()._assess(trainer, pl_module)

    def left(*callbacks):
        trainer = make_trainer(*callbacks, **options)
        return everything_after(trainer, run(trainer, Traced))

    monitor = Looks(on_overfitting="freeze")
    assert_identical(left(), left(monitor))
    assert len(looks) > 2
    assert verdict(monitor)[-1] == ELSEWHERE
    assert not monitor._response.frozen


class Saves(Callback):
    """Writes a checkpoint after the tenth validation."""

    def __init__(self, path):
        self.path = path

    def on_validation_end(self, trainer, pl_module):
        if trainer.current_epoch == 9:
            trainer.save_checkpoint(self.path)


def test_a_resumed_fit_keeps_the_best_weights_and_gets_the_verdict(make_trainer, tmp_path):
    """The best validation lies before the break, and its weights come out of the checkpoint."""
    path = tmp_path / "middle.ckpt"
    whole, resumed, nothing_left = BatchNormMonitor(), BatchNormMonitor(), BatchNormMonitor()
    run(make_trainer(whole, Saves(path), max_epochs=15, logger=False))
    run(make_trainer(resumed, max_epochs=15, logger=False), ckpt_path=path, weights_only=True)
    assert verdict(resumed) == verdict(whole) == [ELSEWHERE]
    rises = [monitor.findings[-1].data["rise"] for monitor in (whole, resumed)]
    assert rises[0]["before"] == pytest.approx(rises[1]["before"], rel=1e-3)
    run(make_trainer(nothing_left, max_epochs=10, logger=False), ckpt_path=path, weights_only=True)
    assert "was not assessed" in nothing_left.findings[-1].evidence


def test_the_same_callback_assesses_every_fit_anew(make_trainer):
    """What was best in the first fit is forgotten in the second, of another model."""
    monitor = BatchNormMonitor()
    run(make_trainer(monitor, max_epochs=25, logger=False), ThroughAffine)
    run(make_trainer(monitor, max_epochs=15, logger=False), Overfits)
    assert verdict(monitor) == [DRIVEN, ELSEWHERE]


def test_a_rise_that_no_validation_saw_is_not_called_healthy(make_trainer):
    """The only validation is the best one, and the network overfits behind it."""
    monitor = BatchNormMonitor()
    run(make_trainer(monitor, max_epochs=15, check_val_every_n_epoch=8, logger=False))
    assert verdict(monitor) == [UNKNOWN]
    assert "and only 0 validations came after the best one" in monitor.findings[-1].evidence


def test_a_rise_since_few_validations_is_not_called_overfitting(make_trainer):
    """It has to last."""
    monitor = BatchNormMonitor()
    run(make_trainer(monitor, max_epochs=14, check_val_every_n_epoch=7, logger=False))
    assert verdict(monitor) == [UNKNOWN]
    assert "and only 1 validations came after the best one" in monitor.findings[-1].evidence


@pytest.mark.slow
def test_precise_statistics_do_not_hide_overfitting_and_are_not_called_wrong(make_trainer):
    """Beside PreciseBatchNorm, on either side, the verdict is the same."""
    for first in (True, False):
        for when in ("validation", "end"):
            monitor, precise = BatchNormMonitor(), PreciseBatchNorm(when=when)
            callbacks = [precise, monitor] if first else [monitor, precise]
            run(make_trainer(*callbacks, max_epochs=15, logger=False))
            assert verdict(monitor) == [ELSEWHERE], (first, when)


def test_the_findings_are_on_disk_and_the_batches_are_let_go(make_trainer):
    """The verdict is a line of the file; after the fit no batch is held, by the callback or by a copy of it."""
    monitor = BatchNormMonitor()
    trainer = make_trainer(monitor, max_epochs=15)
    run(trainer)
    assert ELSEWHERE in (Path(trainer.log_dir) / "lightning_bn" / "findings.jsonl").read_text()
    assert copy.deepcopy(monitor)._evidence is None
    held = [x for x in gc.get_objects() if type(x) is TrainingBatches and x.kept]
    assert held == []
    assert monitor.state_dict()["evidence"]["best"]  # the weights of the best validation stay, for a checkpoint


def test_unequal_batches_count_by_their_samples(make_trainer):
    """The mean over batches of 50 and one of 40 is that over samples."""
    monitor = BatchNormMonitor()
    training, _ = loaders()
    run(make_trainer(monitor, max_epochs=15, logger=False), data=(training, DataLoader(sets()[1], 50)))
    assert verdict(monitor) == [ELSEWHERE]
    assert sum(monitor.losses.sizes) == 240
    assert len(set(monitor.losses.sizes)) > 1
