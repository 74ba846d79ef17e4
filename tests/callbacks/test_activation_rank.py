# SPDX-License-Identifier: Apache-2.0
"""ActivationMonitor measures the effective rank of outputs on request."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from specimens import CLASSES, FEATURES, Healthy, NoHostRead, loader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_bn import ActivationMonitor


class Mixed(nn.Module):
    """A convolution, BatchNorm, activations, a linear layer on sequences, one on vectors, and layers without a rank."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act, self.drop = nn.Conv1d(1, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.1)
        self.line, self.tanh, self.head = nn.Linear(10, 5), nn.Tanh(), nn.Linear(30, CLASSES)
        self.bias = nn.Linear(3, 2)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x.unsqueeze(1))))
        self.bias(torch.ones(3))
        return self.head(self.tanh(self.line(self.drop(x))).flatten(1))


AXES = {"conv": 1, "act": 1, "line": -1, "tanh": -1, "head": -1}


def by_eigenvalues(x, axis):
    """(Σ λ)² / Σ λ² of the float64 covariance over all samples."""
    rows = np.moveaxis(x.double().numpy(), axis, -1).reshape(-1, x.shape[axis])
    values = np.linalg.eigvalsh(np.cov(rows, rowvar=False, bias=True))
    return values.sum() ** 2 / (values**2).sum()


def fit(make_trainer, model=None, **options):
    """The monitor, and what each layer put out last."""
    model, kept = model or Healthy(Mixed()), {}
    for name, module in model.net.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: kept.update({name: out.detach().clone()}))
    monitor = ActivationMonitor(every_n_steps=1, max_overhead=None, effective_rank=True)
    trainer = make_trainer(monitor, num_sanity_val_steps=0, **options)
    trainer.fit(model, loader(size=19))
    return monitor, kept, trainer


@pytest.mark.parametrize("accumulate", [1, 3], ids=["each batch", "accumulation"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_ranks_are_those_of_the_last_batch_of_each_layer_with_weights_and_activation(
    make_trainer, accumulate, precision
):
    """They agree with the eigenvalues of a float64 covariance over samples, places and steps of a sequence.

    BatchNorm, dropout, and outputs of one axis have none; of accumulated micro-batches the last one counts.
    """
    monitor, kept, _ = fit(make_trainer, accumulate_grad_batches=accumulate, precision=precision)
    assert monitor.ranks.keys() == {f"net.{name}" for name in AXES}
    assert len(kept["conv"]) == 3
    for name, axis in AXES.items():
        assert monitor.ranks[f"net.{name}"] == pytest.approx(by_eigenvalues(kept[name], axis), rel=1e-4), name


def test_ranks_are_in_the_overview_and_in_the_table(make_trainer):
    """``effective_rank`` as median, largest and smallest over the layers, and a column layer by layer."""
    monitor, _, trainer = fit(make_trainer)
    events = EventAccumulator(trainer.log_dir).Reload()
    ranks = sorted(monitor.ranks.values())
    for part, value in (("min", ranks[0]), ("median", ranks[2]), ("max", ranks[-1])):
        assert events.Scalars(f"bn_overview/effective_rank_{part}")[-1].value == pytest.approx(value)
    table = events.Tensors("bn_activations/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f"| {monitor.ranks['net.conv']:.3g} |" in table


def test_a_collapsed_layer_stands_out_and_one_that_is_dead_has_no_rank(make_trainer):
    """A linear layer with weights of one direction has rank 1, its healthy twin more; a dead ReLU has none."""
    sick = nn.Sequential(nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    with torch.no_grad():
        sick[0].weight.copy_(torch.ones(8, 1) * torch.randn(1, FEATURES))
        sick[2].inplace = True
        sick[1].bias.fill_(-1e3)
    monitor, *_ = fit(make_trainer, Healthy(sick, lr=0.0))
    healthy, *_ = fit(make_trainer, Healthy(nn.Sequential(nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)), lr=0.0))
    assert monitor.ranks["net.0"] == pytest.approx(1.0, abs=1e-4)
    assert math.isnan(monitor.ranks["net.2"])
    assert healthy.ranks["net.0"] > 1.3


def test_nothing_is_read_on_the_host_inside_the_training_step(make_trainer):
    """No operation of a due forward pass brings a value to the host."""

    class Strict(Healthy):
        def training_step(self, batch, batch_idx):
            with NoHostRead():
                return self.loss(self(batch[0]), batch[1])

    monitor, *_ = fit(make_trainer, Strict(Mixed()))
    assert not monitor.off
    assert len(monitor.ranks) == 5
