# SPDX-License-Identifier: Apache-2.0
"""The batch statistics of layers that no hook reaches follow from one update of their running statistics."""

from __future__ import annotations

import pytest
import torch
from specimens import NoHostRead
from torch import nn

from lightning_bn.callbacks.hidden_batches import HiddenBatches


def read(layer, *batches):
    """What is told of a layer that is called with these batches in one step."""
    hidden = HiddenBatches({"norm": layer})
    hidden.begin()
    for x in batches:
        layer(x)
    return {name: saved.batch() for name, saved in hidden.end().items()}


@pytest.mark.parametrize("momentum", [0.1, 0.01, 1.0])
def test_mean_and_variance_are_those_of_the_batch(momentum):
    """They equal a direct computation in float64, the variance unbiased, also late in a run."""
    layer = nn.BatchNorm2d(5, momentum=momentum)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        layer(3 + 2 * torch.randn(4, 5, 3, 3, generator=generator))
    x = 3 + 2 * torch.randn(4, 5, 3, 3, generator=generator)
    batch = read(layer, x)["norm"]
    values = x.double().transpose(0, 1).flatten(1)
    assert torch.allclose(batch.mean.double(), values.mean(1), rtol=1e-4)
    assert torch.allclose(batch.var.double(), values.var(1), rtol=1e-4)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_layer_that_was_not_called_exactly_once_says_nothing(calls):
    """Its variance is 0 throughout, as that of channels which do not count."""
    batch = read(nn.BatchNorm1d(3), *torch.randn(calls, 8, 3))["norm"]
    assert not batch.var.any()


def test_a_constant_channel_says_nothing():
    """Its variance is 0, and that of its neighbour is not."""
    x = torch.stack([torch.ones(8), torch.arange(8.0)], 1)
    assert read(nn.BatchNorm1d(2), x)["norm"].var.tolist() == [0.0, pytest.approx(6.0)]


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(nn.BatchNorm1d(3).eval(), id="eval mode"),
        pytest.param(nn.BatchNorm1d(3, momentum=None), id="a plain mean of all batches"),
        pytest.param(nn.BatchNorm1d(3, momentum=0.0), id="momentum 0"),
        pytest.param(nn.BatchNorm1d(3, track_running_stats=False), id="no running statistics"),
    ],
)
def test_layers_without_an_update_to_read_are_left_out(layer):
    """Nothing is told of them."""
    assert read(layer, torch.randn(8, 3)) == {}


def test_a_lazy_layer_is_left_out_until_it_has_a_shape():
    """Its first batch makes its statistics, and the second one tells."""
    layer = nn.LazyBatchNorm1d()
    assert read(layer, torch.randn(8, 3)) == {}
    assert read(layer, torch.randn(8, 3))["norm"].var.all()


def test_nothing_is_read_on_the_host():
    """Neither when a batch begins nor when it is over."""
    layer = nn.BatchNorm1d(3)
    hidden = HiddenBatches({"norm": layer})
    with NoHostRead():
        hidden.begin()
    layer(torch.randn(8, 3))
    with NoHostRead():
        hidden.end()
