# SPDX-License-Identifier: Apache-2.0
"""The networks of the demo."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bn.demo import DigitsMLP


def test_dropout_stands_behind_each_activation():
    """A hidden layer is linear, norm, activation, dropout; nothing stands behind the head."""
    layers = [type(layer) for layer in DigitsMLP("batch", depth=2, dropout=0.5).net]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    assert layers == [nn.Flatten, *hidden, *hidden, nn.Linear]


def test_dropout_drops_the_share_that_was_asked_for():
    """Of hidden units that are all on, the share is zero in training and none in evaluation."""
    *hidden, head = DigitsMLP("none", depth=1, width=4096, dropout=0.3).net
    hidden[1].weight.data.zero_()
    hidden[1].bias.data.fill_(1.0)
    units = nn.Sequential(*hidden)
    assert (units(torch.zeros(1, 1, 8, 8)) == 0).float().mean() == pytest.approx(0.3, abs=0.03)
    assert (units.eval()(torch.zeros(1, 1, 8, 8)) == 1).all()
    assert head.in_features == 4096


def test_without_dropout_the_network_has_no_dropout_layer():
    """The default network has the same modules as ever, so that their names and weights fit old checkpoints."""
    assert not [layer for layer in DigitsMLP().modules() if isinstance(layer, nn.Dropout)]
    assert [name for name, _ in DigitsMLP(depth=1).net.named_children()] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_dropout_out_of_its_range_is_an_error(value):
    """Less than none and all of the units are refused, with what is needed and what was given."""
    with pytest.raises(ValueError, match=f"dropout must be from 0 to below 1, got {value}"):
        DigitsMLP(dropout=value)
