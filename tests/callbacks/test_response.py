# SPDX-License-Identifier: Apache-2.0
"""What BatchNormMonitor does about overfitting, where it was asked to."""

from __future__ import annotations

import pytest
import torch
from specimens import Healthy, loader, network
from torch import nn

from lightning_bn import BatchNormMonitor, find_batchnorm
from lightning_bn.callbacks import batchnorm_monitor
from lightning_bn.callbacks.judgement import Outcome
from lightning_bn.callbacks.response import Response
from lightning_bn.rules.affine_drift import Watched


class Collected:
    def __init__(self, since_best):
        self.since_best = since_best


def watched(last, best=1.0):
    return Watched("val_loss", best, 0, last)


@pytest.mark.parametrize(
    ("action", "last", "since_best", "expected"),
    [
        pytest.param("stop", 1.2, 3, True, id="risen, three validations later"),
        pytest.param("stop", 1.2, 2, False, id="too early"),
        pytest.param("stop", 1.05, 9, False, id="hardly risen"),
        pytest.param("report", 1.2, 3, False, id="only to report"),
        pytest.param("freeze", float("nan"), 9, False, id="NaN is another matter"),
    ],
)
def test_the_gate_opens_when_the_loss_has_risen_for_a_while(action, last, since_best, expected):
    """A tenth above the best, three validations or more after it, and only where something is to be done."""
    assert Response(action).is_time(watched(last), Collected(since_best)) is expected


def test_after_a_look_three_validations_pass_before_the_next():
    """A look costs passes over the data, so that not every validation has one."""
    response = Response("stop")
    assert [response.is_time(watched(1.5), Collected(9)) for _ in range(7)] == [True, False, False] * 2 + [True]


class Rising(Healthy):
    """Logs a validation loss that is best in epoch 1, and notes its own γ in each step."""

    def __init__(self):
        super().__init__(network(depth=1), lr=0.1)
        self.gammas, self.weights = [], []

    def on_train_batch_end(self, *args):
        self.gammas.append(self.net[1].weight.detach().clone())
        self.weights.append(self.net[0].weight.detach().clone())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor(1.0 + abs(self.current_epoch - 1) * 0.2))


def fit(make_trainer, monkeypatch, action, said):
    """Eight epochs of four steps; the verdict is given, and asked for in epoch 4 first."""
    outcome, asked = Outcome(None, {said}, "as planned"), []
    monkeypatch.setattr(
        batchnorm_monitor, "conclude", lambda trainer, *_: asked.append(trainer.current_epoch) or outcome
    )
    model, monitor = Rising(), BatchNormMonitor(on_overfitting=action)
    trainer = make_trainer(monitor, max_epochs=8, num_sanity_val_steps=0)
    trainer.fit(model, loader(), loader(seed=1))
    return model, monitor, trainer, asked


@pytest.mark.parametrize(
    ("said", "epochs"),
    [("affine-driven-overfitting", 5), ("overfitting-elsewhere", 5), ("no-overfitting", 8), ("not-assessed", 8)],
)
def test_stop_ends_the_fit_where_it_overfits(make_trainer, monkeypatch, said, epochs):
    """Whoever carries the overfitting, the fit ends with the epoch in which it was found; else it goes on."""
    _, _, trainer, asked = fit(make_trainer, monkeypatch, "stop", said)
    assert trainer.current_epoch == epochs
    assert asked[0] == 4


def moves(gammas, first, last):
    return any(not torch.equal(a, b) for a, b in zip(gammas[first:last], gammas[first + 1 : last + 1], strict=True))


def test_freeze_holds_gamma_and_beta_and_lets_the_other_weights_go_on(make_trainer, monkeypatch):
    """From the epoch behind the verdict on γ does not move, and the weights in front of it do."""
    model, monitor, _, asked = fit(make_trainer, monkeypatch, "freeze", "shared-overfitting")
    assert moves(model.gammas, 0, 19)
    assert not moves(model.gammas, 20, 31)
    assert moves(model.weights, 30, 31)
    assert monitor.state_dict()["frozen"]
    assert asked == [4, 8]  # once more when the fit ends


def test_freeze_leaves_alone_what_lies_elsewhere(make_trainer, monkeypatch):
    """Where γ and β have no part in it they are not touched."""
    model, *_ = fit(make_trainer, monkeypatch, "freeze", "overfitting-elsewhere")
    assert moves(model.gammas, 20, 31)


def test_rewind_puts_gamma_and_beta_back_to_the_best_validation_first(make_trainer, monkeypatch):
    """After the verdict γ is what it was at the end of epoch 1, and stays so."""
    model, *_ = fit(make_trainer, monkeypatch, "rewind", "affine-driven-overfitting")
    assert torch.equal(model.gammas[20], model.gammas[7])
    assert not moves(model.gammas, 20, 31)


def test_report_asks_once_and_touches_nothing(make_trainer, monkeypatch):
    """By default the verdict is looked for when the fit ends."""
    model, _, _, asked = fit(make_trainer, monkeypatch, "report", "affine-driven-overfitting")
    assert asked == [8]
    assert moves(model.gammas, 20, 31)


def test_a_resumed_run_stays_frozen(make_trainer, monkeypatch, tmp_path):
    """What was decided before the checkpoint holds behind it."""
    _, _, trainer, _ = fit(make_trainer, monkeypatch, "freeze", "shared-overfitting")
    trainer.save_checkpoint(tmp_path / "frozen.ckpt")
    model = Rising()
    make_trainer(BatchNormMonitor(on_overfitting="freeze"), max_epochs=9, num_sanity_val_steps=0).fit(
        model, loader(), loader(seed=1), ckpt_path=tmp_path / "frozen.ckpt"
    )
    assert not moves(model.gammas, 0, len(model.gammas) - 1)


def test_gradients_of_all_batchnorm_layers_are_taken_away():
    """``requires_grad`` stays, as distributed training counts on every gradient."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
    response = Response("freeze")
    response.frozen = True
    net(torch.randn(8, 4)).sum().backward()
    response.hold(net)
    assert all(x.grad is None and x.requires_grad for layer in find_batchnorm(net).values() for x in layer.parameters())
    assert net[0].weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"on_overfitting": "thaw"}, "on_overfitting must be"),
        ({"on_overfitting": "stop", "assess": False}, "assess must be True for on_overfitting='stop', got False"),
    ],
)
def test_wrong_actions_are_refused_with_name_need_and_got(arguments, words):
    """The error names the argument, what it needs and what it got."""
    with pytest.raises(ValueError, match=words):
        BatchNormMonitor(**arguments)
