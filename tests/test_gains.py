# SPDX-License-Identifier: Apache-2.0
"""Gains keep the signal's size, and the nonlinearity behind a layer is found where the order of modules tells it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_bn.demo import DigitsMLP, DigitsResNet
from lightning_bn.gains import NONLINEARITIES, follower_of, followers, gain


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("linear", 1.0, id="linear"),
        pytest.param("relu", math.sqrt(2), id="relu"),
        pytest.param("tanh", 5 / 3, id="tanh"),
        pytest.param("sigmoid", 1.0, id="sigmoid"),
        pytest.param("selu", 1.0, id="selu, of variance 1 / fan_in"),
    ],
)
def test_known_gains_are_those_of_the_literature(name, expected):
    """Torch's table, and 1 for SELU as in its paper."""
    assert gain(name) == pytest.approx(expected)


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_a_leaky_relu_has_the_gain_of_its_slope(slope):
    """√(2 / (1 + slope²)), which is ReLU's at 0 and none's at 1."""
    assert gain("leaky_relu", slope) == pytest.approx(math.sqrt(2 / (1 + slope**2)))


@pytest.mark.parametrize("name", ["gelu", "silu", "elu", "mish", "softplus", "hardswish"])
def test_measured_gains_keep_the_mean_square_of_a_wide_layer(name):
    """A million draws with that gain, through the nonlinearity, have mean square 1 / gain²."""
    z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    after = getattr(functional, name)(z).square().mean().item()
    assert gain(name) ** 2 * after == pytest.approx(1, rel=0.01)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    """Name, need and got."""
    with pytest.raises(ValueError, match=r"nonlinearity must be one of linear, .*, got 'swoosh'"):
        gain("swoosh")


def test_every_listed_name_has_a_gain():
    """All gains are finite and above 0."""
    assert all(0 < gain(name) < 3 for name in NONLINEARITIES)


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        pytest.param(nn.ReLU(), "relu", math.sqrt(2), id="ReLU"),
        pytest.param(nn.ReLU(inplace=True), "relu", math.sqrt(2), id="ReLU in place"),
        pytest.param(nn.LeakyReLU(0.5), "leaky_relu", math.sqrt(2 / 1.25), id="LeakyReLU"),
        pytest.param(nn.PReLU(init=0.5), "leaky_relu", math.sqrt(2 / 1.25), id="PReLU"),
        pytest.param(nn.Tanh(), "tanh", 5 / 3, id="Tanh"),
        pytest.param(nn.LogSoftmax(1), "softmax", 1.0, id="LogSoftmax"),
        pytest.param(nn.GELU(), "gelu", 1.5335, id="GELU"),
    ],
)
def test_an_activation_module_tells_its_gain(module, name, expected):
    """Slopes are read off the module."""
    found = follower_of(module)
    assert (found.nonlinearity, found.gain) == (name, pytest.approx(expected, abs=1e-4))


@pytest.mark.parametrize("module", [nn.GLU(), nn.Flatten(), nn.Linear(1, 1)], ids=lambda m: type(m).__name__)
def test_what_is_no_elementwise_activation_tells_nothing(module):
    """A gate that halves its input has no gain here, nor has any other module."""
    assert follower_of(module) is None


class Functional(nn.Module):
    """Its activations are not modules: nothing in the order of modules tells of them."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


class Basic(nn.Module):
    """A residual block in which one ReLU serves twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)


def shared_activation():
    act = nn.Tanh()
    return nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act, nn.Linear(2, 2))


MODELS = [
    pytest.param(shared_activation(), ["tanh", "tanh", None], id="a shared activation"),
    pytest.param(
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(), nn.SiLU(), nn.Linear(2, 2), nn.LogSoftmax(1)),
        ["silu", "softmax"],
        id="norm and dropout are passed over",
    ),
    pytest.param(
        nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 1)), nn.Sequential(nn.ReLU()), nn.Flatten(), nn.Linear(2, 2)),
        ["relu", None],
        id="nested sequences",
    ),
    pytest.param(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()), [None, "relu"], id="two in a row"),
    pytest.param(Functional(), [None, None, None], id="functional activations are unknown"),
    pytest.param(nn.Sequential(Basic(), nn.Flatten(), nn.Linear(2, 2)), ["relu", None, None], id="residual block"),
    pytest.param(nn.Linear(2, 2), [None], id="a lone layer"),
    pytest.param(nn.Sequential(nn.Embedding(3, 2), nn.LSTM(2, 2)), [None, None], id="embedding and LSTM"),
]


@pytest.mark.parametrize(("model", "expected"), MODELS)
def test_the_follower_is_found_where_the_order_tells_it(model, expected):
    """The activation module behind a layer counts; where a layer or the end comes first, nothing is claimed."""
    assert [found and found.nonlinearity for found in followers(model).values()] == expected


def test_the_inside_of_a_transformer_layer_is_known():
    """Its first linear layer has the activation that it was built with, its second none."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, activation="gelu"), 1, enable_nested_tensor=False)
    found = followers(model)
    assert {path.removeprefix("layers.0."): known.nonlinearity for path, known in found.items() if known} == {
        "linear1": "gelu",
        "linear2": "linear",
    }


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "gelu"])
def test_the_demos_layers_have_the_activation_they_were_built_with(activation):
    """Every hidden layer of the MLP, and every convolution of the ResNet's blocks, is followed by it."""
    for model in (DigitsMLP(activation=activation), DigitsResNet(activation=activation)):
        found = {path: known for path, known in followers(model).items() if not path.endswith("skip")}
        *hidden, head = found.values()
        assert {known.nonlinearity for known in hidden} == {activation}
        assert head is None


def test_unread_parameters_do_not_matter():
    """A lazy or meta PReLU counts with torch's default slope."""
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.PReLU(device="meta"))
    assert followers(model)["0"].gain == pytest.approx(math.sqrt(2 / (1 + 0.25**2)))
