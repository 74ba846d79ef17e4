# SPDX-License-Identifier: Apache-2.0
"""``locate_nonfinite`` names the culprit without Lightning, and leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from sick import Attention, Convolutions, Recurrent, line_of
from specimens import CLASSES, FEATURES, LogOfNegative, network, variance_overflow, with_module
from torch import nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from lightning_bn import locate_nonfinite

X = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % CLASSES


def loss_fn(logits):
    return F.cross_entropy(logits, Y)


@pytest.mark.parametrize("owner", [Attention, Convolutions, Recurrent])
def test_operation_and_line_are_named(owner):
    """The same verdict as that of the callback."""
    found = locate_nonfinite(owner().net, X, loss_fn=loss_fn)
    assert (found.rule, found.data["line"]) == ("invalid-operation", line_of(owner.Net))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("build", [network, lambda: network(norm=False), lambda: Attention(pad=3).net])
def test_a_healthy_model_gives_none(build, mode):
    """With and without a loss, in training and in eval mode."""
    model = getattr(build(), mode)()
    assert locate_nonfinite(model, X) is None
    assert locate_nonfinite(model, X, loss_fn=loss_fn) is None


def test_without_a_loss_the_outputs_are_looked_at():
    """A dictionary of outputs is searched; a loss is not needed."""

    class Two(nn.Module):
        def forward(self, x, *, scale):
            return {"good": x, "bad": [torch.log(-x.abs() * scale)]}

    assert locate_nonfinite(Two(), X, scale=2.0).data["operation"] == "log"


def test_arguments_are_named_by_their_place():
    """A bad argument is named as the caller wrote it."""
    bad = X.clone()
    bad[3, 1] = float("nan")
    assert locate_nonfinite(network(), bad).evidence.startswith("args[0], sample 3")

    class Named(nn.Module):
        def forward(self, *, image):
            return image * 2

    assert locate_nonfinite(Named(), image=bad).data["path"] == "kwargs['image']"


def test_backward_is_looked_at_with_a_loss():
    """The slope of a root at 0 is found, with the first parameter that it spoils."""
    found = locate_nonfinite(network(), X, loss_fn=lambda y: y.sum() + torch.sqrt(y - y.detach()).sum())
    assert found.rule == "invalid-gradient"
    assert found.data["parameter"] == "6.bias"


def test_statistics_that_overflow_are_found_although_the_loss_is_finite():
    """The layer whose channels are dead is named."""
    found = locate_nonfinite(variance_overflow(), X, loss_fn=loss_fn)
    assert (found.rule, found.layer) == ("overflowed-running-statistics", "1")


@pytest.mark.parametrize("build", [network, lambda: with_module(LogOfNegative())])
def test_nothing_of_the_model_changes(build):
    """Weights, buffers, gradients, modes and random streams are what they were."""
    model = build()
    before = copy.deepcopy(model.state_dict())
    stream = torch.get_rng_state()
    locate_nonfinite(model, X, loss_fn=loss_fn)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x.grad is None for x in model.parameters())
    assert torch.equal(stream, torch.get_rng_state())


def test_wrong_arguments_are_refused():
    """A model that is none, a loss that is no tensor, arguments that the model does not take."""
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        locate_nonfinite(3, X)
    with pytest.raises(RuntimeError, match="loss_fn must return a tensor, got float"):
        locate_nonfinite(network(), X, loss_fn=lambda y: float(y.detach().sum()))
    with pytest.raises(RuntimeError, match="model must run on these arguments"):
        locate_nonfinite(network(), X[:, :3])
