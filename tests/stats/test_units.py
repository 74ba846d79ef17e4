# SPDX-License-Identifier: Apache-2.0
"""Which values of an activation pass gradient is what autograd says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bn.stats.units import active_counts, kind_of

SQUASHING = [nn.Tanh(), nn.Sigmoid(), nn.Hardsigmoid(), nn.Hardtanh(), nn.Hardtanh(-2.0, 3.0), nn.Softsign()]
RECTIFYING = [nn.ReLU(), nn.ReLU6()]
SHARE = {"tanh": 0.02, "sigmoid": 0.04, "softsign": 0.011}
"""Largest gradient, as a part of the largest there is, that a saturated value passes."""


@pytest.mark.parametrize("module", [*SQUASHING, *RECTIFYING], ids=str)
def test_values_are_told_apart_by_the_gradient_that_they_pass(module):
    """A value counts as active if and only if autograd lets more than a few per cent of the gradient through."""
    x = torch.linspace(-12, 12, 4001, requires_grad=True)
    y = module(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    kind = kind_of(module)
    passes = kind.passes(y.detach()).bool()
    few = gradient <= SHARE.get(kind.name, 0.0) * gradient.max()
    close = (gradient / gradient.max() - SHARE.get(kind.name, 0.0)).abs() < 2e-3
    assert torch.equal(passes[~close], ~few[~close])
    assert passes.any()
    assert not passes.all()


@pytest.mark.parametrize("module", [nn.GELU(), nn.SiLU(), nn.LeakyReLU(), nn.Linear(2, 2), nn.Softmax(1)], ids=str)
def test_where_the_output_does_not_tell_the_gradient_there_is_no_kind(module):
    """Smooth and leaky activations, and other modules, have no units to count."""
    assert kind_of(module) is None


@pytest.mark.parametrize(
    ("shape", "axis", "units"),
    [
        pytest.param((6, 3), 1, 3, id="linear"),
        pytest.param((6, 3, 4, 5), 1, 3, id="convolution"),
        pytest.param((6, 4, 3), -1, 3, id="tokens"),
        pytest.param((6, 3, 4), 1, 3, id="sequence of a convolution"),
        pytest.param((5,), 1, 5, id="one sample without a batch axis"),
    ],
)
def test_active_values_are_counted_unit_by_unit(shape, axis, units):
    """The counts are those of a plain loop over the units."""
    y = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    found = active_counts(y, kind_of(nn.ReLU()), axis)
    rows = y.reshape(1, -1) if y.dim() == 1 else y.movedim(axis, -1).reshape(-1, units)
    assert found.tolist() == [sum(value > 0 for value in column) for column in rows.T.tolist()]


def test_nan_passes_no_gradient():
    """NaN is not active."""
    y = torch.tensor([[float("nan"), 1.0], [2.0, 0.0]])
    assert active_counts(y, kind_of(nn.ReLU()), 1).tolist() == [1.0, 1.0]
