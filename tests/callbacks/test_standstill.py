# SPDX-License-Identifier: Apache-2.0
"""BatchNorm layers that stop updating their running statistics are told, and those frozen on purpose are not."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning
from specimens import Healthy, NoHostRead, loader, network
from torch import nn

from lightning_bn import BatchNormMonitor, Severity, find_batchnorm
from lightning_bn.callbacks.statistics_watch import StatisticsWatch

RULE = "statistics-stopped"


class At(Callback):
    """Does something to the model when a step is over, and something else later."""

    def __init__(self, step, change, until=None, back=None):
        self.plan = {step: change, until: back}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        change = self.plan.get(trainer.global_step)
        if change:
            change(pl_module)


def of_norms(change):
    def apply(model):
        for layer in find_batchnorm(model).values():
            change(layer)

    return apply


def frozen(layer):
    layer.requires_grad_(False)
    layer.eval()


def as_lightning_freezes(layer):
    layer.requires_grad_(False)
    layer.track_running_stats = False


def frozen_all(model):
    model.net.eval()
    model.net[:6].requires_grad_(False)


def said(make_trainer, *callbacks, model=None, epochs=1, **options):
    monitor = BatchNormMonitor(assess=False)
    trainer = make_trainer(monitor, *callbacks, max_epochs=epochs, logger=False, **options)
    trainer.fit(model or Healthy(lr=1e-3), loader(size=480), loader(seed=1))
    assert not monitor.off
    return [finding for finding in monitor.findings if finding.rule == RULE]


def by_eval(model):
    model.eval()


MOMENTUM, UNTRACKED = {"momentum": 0.0}, {"track_running_stats": False}


@pytest.mark.parametrize("step", [1, 5, 15])
@pytest.mark.parametrize(
    ("change", "severity", "words"),
    [
        pytest.param(by_eval, Severity.WARNING, "together with the modules around them", id="the whole model"),
        pytest.param(lambda model: model.net.eval(), Severity.WARNING, "together with", id="a part that learns"),
        pytest.param(
            of_norms(lambda norm: vars(norm).update(MOMENTUM)), Severity.WARNING, "by the batch", id="momentum 0"
        ),
        pytest.param(
            of_norms(lambda norm: vars(norm).update(UNTRACKED)), Severity.WARNING, "by the batch", id="untracked"
        ),
        pytest.param(of_norms(nn.Module.eval), Severity.INFO, "while the modules around", id="BatchNorm alone"),
        pytest.param(
            of_norms(as_lightning_freezes), Severity.INFO, "although γ and β are frozen", id="frozen by batch"
        ),
    ],
)
def test_layers_that_stop_updating_are_told_once_with_what_stopped_them(make_trainer, change, severity, words, step):
    """Also where that happens right behind the first step; what may be meant so is an info."""
    (finding,) = said(make_trainer, At(step, change))
    assert finding.severity is severity
    assert words in finding.evidence
    assert set(finding.data["layers"]) == {"net.1", "net.4"}
    assert all(step <= seen < step + 10 for seen in finding.data["layers"].values())


class Twice(Healthy):
    """A second pass of each step leaves the statistics alone, as sharpness-aware minimisation does."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        of_norms(lambda norm: vars(norm).update(momentum=0.0))(self)
        again = self(batch[0]).square().mean()
        of_norms(lambda norm: vars(norm).update(momentum=0.1))(self)
        return loss + 1e-3 * again


class Bypassed(Healthy):
    """Training calls its BatchNorm layers no longer."""

    def training_step(self, batch, batch_idx):
        if self.global_step < 15:
            return super().training_step(batch, batch_idx)
        by_eval(self.net)
        return self.loss(self.net[-1](self.net[0](batch[0])), batch[1])


class Backbone(Healthy):
    """A body that Lightning's callback keeps frozen at first."""

    def __init__(self):
        super().__init__(network())
        self.backbone = self.net[:6]

    def configure_optimizers(self):
        return torch.optim.SGD([x for x in self.parameters() if x.requires_grad], 1e-3)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")  # Lightning's own, of BatchNorm
@pytest.mark.parametrize(
    ("build", "callbacks", "epochs"),
    [
        pytest.param(Healthy, [], 1, id="healthy"),
        pytest.param(Healthy, [At(15, of_norms(frozen))], 1, id="frozen on purpose"),
        pytest.param(Healthy, [At(15, frozen_all)], 1, id="a frozen part"),
        pytest.param(Healthy, [At(15, by_eval, 20, nn.Module.train)], 1, id="for a while"),
        pytest.param(Twice, [], 1, id="one of two calls"),
        pytest.param(Bypassed, [], 1, id="not called"),
        pytest.param(Backbone, [BackboneFinetuning(1, verbose=False)], 2, id="BackboneFinetuning"),
        pytest.param(
            Backbone, [BackboneFinetuning(1, verbose=False, train_bn=False)], 2, id="BackboneFinetuning, BN too"
        ),
    ],
)
def test_what_goes_on_updating_or_is_frozen_on_purpose_is_silent(make_trainer, build, callbacks, epochs):
    """No cry of wolf."""
    assert said(make_trainer, *map(copy.deepcopy, callbacks), model=build(), epochs=epochs) == []


def test_holding_gamma_and_beta_as_on_overfitting_does_stops_no_statistics(make_trainer):
    """Our own freeze takes gradients away and leaves modes alone."""

    class Holds(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.callbacks[0]._response.frozen = True

    model = Healthy(lr=1e-3)
    assert said(make_trainer, Holds(), model=model) == []
    assert torch.equal(model.net[1].weight, torch.ones(16))
    assert int(model.net[1].num_batches_tracked) == 60


def test_a_stop_is_told_at_the_next_validation_and_not_again(make_trainer):
    """The run need not end to know."""
    (finding,) = said(make_trainer, At(15, by_eval), epochs=3)
    assert finding.epoch == 0


def test_what_is_heard_is_kept_without_a_read_on_the_host():
    """Also where a layer has just stopped; the comparison at the end is the one that reads."""
    net = network()
    watch = StatisticsWatch(net)

    def batches(count):
        for step in range(count):
            watch.begin_batch()
            net(x)
            watch.end_batch(step)

    x = torch.randn(8, 12)
    batches(1)
    net.eval()
    with NoHostRead():
        batches(60)
    (finding,) = watch.stopped()
    assert finding.rule == RULE
    net[1].running_mean.add_(1)  # whoever updates it, it stands still no longer
    assert watch.stopped()[0].layer == "4"
