# SPDX-License-Identifier: Apache-2.0
"""BatchNormMonitor tells how fast γ and β move from step to step, and their share of the gradient."""

from __future__ import annotations

import math

import pytest
import torch
from harm import Manual
from lightning.pytorch.plugins.precision import MixedPrecision
from overfits import run as fit
from specimens import Healthy, NoHostRead, loader, network
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_bn import BatchNormMonitor, find_batchnorm
from lightning_bn.callbacks.drift import References
from lightning_bn.callbacks.speed import Speed, norms_of, share_of


def affine_ids(model):
    return {id(x) for layer in find_batchnorm(model).values() for x in layer.parameters(recurse=False)}


class Recorded:
    """Keeps by a route of its own, in float64, what each optimizer step was given and did."""

    squares, speeds = None, None

    def on_before_optimizer_step(self, optimizer):
        self.squares = self.squares or {}
        mine, rows = (
            affine_ids(self),
            self.squares.setdefault(self.trainer.fit_loop.epoch_loop._batches_that_stepped, []),
        )
        for group in optimizer.param_groups:
            rows += [(id(x) in mine, float(x.grad.double().square().sum())) for x in group["params"]]
        if len(self.trainer.optimizers) == 1 or not self.__dict__.get("gammas"):
            self.gammas = {name: x.weight.detach().double().clone() for name, x in find_batchnorm(self).items()}

    def on_train_batch_end(self, *args):
        if not self.__dict__.get("gammas"):
            return
        moved = [
            float((layer.weight.detach().double() - self.gammas[name]).norm() / self.gammas[name].norm())
            for name, layer in find_batchnorm(self).items()
        ]
        self.speeds = {**(self.speeds or {}), self.trainer.fit_loop.epoch_loop._batches_that_stepped: max(moved)}
        self.gammas = None

    def share(self, step):
        return sum(square for mine, square in self.squares[step] if mine) / sum(x for _, x in self.squares[step])


class RecordedHealthy(Recorded, Healthy):
    pass


class RecordedManual(Recorded, Manual):
    pass


def in_fp16():
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}


@pytest.mark.parametrize(
    ("build", "options", "steps", "exact"),
    [
        pytest.param(RecordedHealthy, {}, [3, 7, 11], 1e-4, id="plain"),
        pytest.param(RecordedHealthy, {"accumulate_grad_batches": 2}, [3], 1e-4, id="accumulation"),
        pytest.param(RecordedManual, {}, [3, 7, 11], 1e-4, id="two optimizers by hand"),
        pytest.param(RecordedHealthy, in_fp16(), [3, 7, 11], 1e-3, id="scaled gradients"),
    ],
)
def test_speed_and_share_are_those_of_a_float64_loop_on_due_steps_only(make_trainer, build, options, steps, exact):
    """The largest ‖Δγ‖/‖γ‖ and the share of γ and β agree with what the model itself saw of its steps."""
    model, monitor = build(), BatchNormMonitor(every_n_steps=4, assess=False)
    trainer = make_trainer(monitor, max_epochs=3, **options)
    trainer.fit(model, loader())
    events = EventAccumulator(trainer.log_dir).Reload()
    speeds, shares = (
        {event.step: event.value for event in events.Scalars(f"bn_overview/{tag}")}
        for tag in ("gamma_speed_log10_max", "affine_gradient_share")
    )
    assert list(speeds) == list(shares) == steps
    for step in steps:
        assert speeds[step] == pytest.approx(math.log10(model.speeds[step]), abs=1e-3)
        assert shares[step] == pytest.approx(model.share(step), rel=exact)
    finding = monitor.findings[-1]
    assert finding.data["gradient_share"]["mean"] == pytest.approx(sum(shares.values()) / len(steps), rel=1e-5)
    assert max(gamma for gamma, _ in finding.data["speed"].values()) == pytest.approx(10 ** speeds[steps[-1]], rel=1e-5)
    assert "of the squared gradient norm fell on γ and β" in finding.evidence


def test_a_fit_without_a_due_step_ends_without_speed(make_trainer):
    """What was not measured is not told."""
    monitor = BatchNormMonitor(every_n_steps=50, assess=False)
    make_trainer(monitor).fit(Healthy(), loader())
    assert monitor.findings[-1].data["speed"] is monitor.findings[-1].data["gradient_share"] is None
    assert "measured step" not in monitor.findings[-1].evidence


def test_a_step_is_looked_at_without_a_read_on_the_host():
    """Copies and norms stay on the device until the batch is over, and then one transfer brings them."""
    net, speed, references = network(), Speed(), References()
    references.begin_from(net)
    net(torch.randn(8, 12)).square().sum().backward()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with NoHostRead():
        speed.before(net, optimizer)
    optimizer.step()
    speed.after(net, references)
    assert speed._copies == {}
    assert speed._norms == []


def test_a_gradient_that_is_not_finite_has_no_share():
    """Infinity and NaN are left out, and a scale that all gradients share cancels."""
    assert math.isnan(share_of([math.inf, 1.0], [True, False]))
    assert math.isnan(share_of([0.0, math.nan], [True, False]))
    assert math.isnan(share_of([0.0, 0.0], [True, False]))
    assert math.isnan(share_of([], []))
    assert share_of([2.0**17, 3.0**0.5 * 2**17], [False, True]) == pytest.approx(0.75)


def test_a_sparse_gradient_leaves_the_share_unknown():
    """Its norm is not that of its values where an index comes twice."""
    table, norm = nn.Embedding(4, 2, sparse=True), nn.BatchNorm1d(2)
    norm(table(torch.tensor([0, 0, 1, 2]))).square().sum().backward()
    assert norms_of([*table.parameters(), *norm.parameters()], affine_ids(norm)) is None
    values, on_affine = norms_of(norm.parameters(), affine_ids(norm))
    torch.testing.assert_close(values, torch.stack([norm.weight.grad.norm(), norm.bias.grad.norm()]))
    assert share_of(values.tolist(), on_affine) == 1


def test_the_verdict_carries_speed_and_share(make_trainer):
    """The numbers of who carries a rise stand beside those of how γ and β moved."""
    monitor = BatchNormMonitor(every_n_steps=5)
    fit(make_trainer(monitor, max_epochs=13))
    (finding,) = (entry for entry in monitor.findings if "overfitting" in entry.rule)
    assert 0 < finding.data["affine_gradient_share"] < 1
    assert all(0 < value < 1 for value in finding.data["affine_speed"])
