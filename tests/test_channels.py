# SPDX-License-Identifier: Apache-2.0
"""The order of the modules tells which axis counts channels, and what ends a network."""

from __future__ import annotations

from torch import nn

from lightning_bn.channels import channel_axes, inner_modules


class Pair(nn.Module):
    """A generator that ends in tanh, and a classifier that ends in sigmoid."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh())
        self.classifier = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())


class Flat(nn.Module):
    """Layers that are the model's own children."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second, self.end = nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh()


def test_what_ends_a_network_is_not_inside_it():
    """Of several networks in a model each one's last activation is an end, though others come behind it."""
    assert inner_modules(Pair()) >= {"generator.1"}
    assert not inner_modules(Pair()) & {"generator.3", "classifier.1"}


def test_layers_without_a_network_around_them_are_judged_by_the_model():
    """An activation between two layers is inside, the last one is not."""
    assert "act" in inner_modules(Flat())
    assert "end" not in inner_modules(Flat())


def test_channels_lie_where_the_layer_in_front_puts_them():
    """Behind convolutions and their norms channels are axis 1, behind linear layers and LayerNorm the last one."""
    conv = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.BatchNorm1d(2), nn.ReLU(), nn.PReLU(), nn.ReLU())
    line = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.LayerNorm(2), nn.ReLU(), nn.PReLU(), nn.ReLU())
    for net, axis in ((conv, 1), (line, -1)):
        axes = channel_axes(net)
        assert [axes[module] for module in net if isinstance(module, nn.ReLU)] == [axis] * 3
