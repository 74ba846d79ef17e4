# SPDX-License-Identifier: Apache-2.0
"""What a verdict is made from is collected at a few operations, and is what it says."""

from __future__ import annotations

import pytest
import torch
from specimens import NoHostRead
from torch import nn

from lightning_bn.callbacks.evidence import QUEUE, Evidence, MeanLoss


@pytest.mark.parametrize("count", [1, QUEUE - 1, QUEUE, 3 * QUEUE + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_mean_loss_is_that_of_all_steps(count, dtype):
    """Few losses or many, of any precision and of either shape, are averaged as Python would do it."""
    losses = (1 + torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    mean = MeanLoss()
    with NoHostRead():
        for place in range(count):
            mean.add(losses[place] if place % 2 else losses[place : place + 1])
    assert mean.steps == count
    assert mean.mean() == pytest.approx(sum(losses.tolist()) / count, rel=1e-5)
    assert mean.mean() == mean.mean()  # asking changes nothing


def test_a_loss_is_kept_without_its_graph():
    """What waits to be added holds no activations."""
    mean, weight = MeanLoss(), torch.ones((), requires_grad=True)
    mean.add(weight * 2)
    assert not mean._queue[0].requires_grad
    assert mean.mean() == 2


def test_modes_are_those_of_the_present_epoch():
    """Also of an epoch whose batches are not kept, and where a layer is frozen in the first batch of it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    evidence = Evidence(16, 1.0, 0, {})
    batch = torch.ones(4, 2)
    for epoch in range(3):
        evidence.begin_epoch()
        for number in range(3):
            evidence.train_batch(model, batch, number)
            if epoch == 1:
                model[1].eval()
        assert evidence._modes[model[1]] is (epoch == 0)
