# SPDX-License-Identifier: Apache-2.0
"""Fans and the parameters of each kind of layer are what can be counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bn.layers import Role, fans, holds_weights, slots

LAYERS = [
    pytest.param(nn.Linear(5, 7), (5,), id="Linear"),
    pytest.param(nn.Conv1d(4, 6, 3), (4, 9), id="Conv1d"),
    pytest.param(nn.Conv2d(4, 6, 3), (4, 9, 9), id="Conv2d"),
    pytest.param(nn.Conv3d(2, 3, 3), (2, 7, 7, 7), id="Conv3d"),
    pytest.param(nn.Conv2d(4, 6, (2, 3)), (4, 9, 9), id="oblong kernel"),
    pytest.param(nn.Conv2d(4, 6, 3, groups=2), (4, 9, 9), id="two groups"),
    pytest.param(nn.Conv2d(4, 8, 3, groups=4), (4, 9, 9), id="depthwise"),
    pytest.param(nn.Conv2d(4, 6, 3, dilation=2), (4, 13, 13), id="dilated"),
    pytest.param(nn.ConvTranspose1d(4, 6, 3), (4, 9), id="ConvTranspose1d"),
    pytest.param(nn.ConvTranspose2d(4, 6, 3), (4, 9, 9), id="ConvTranspose2d"),
    pytest.param(nn.ConvTranspose3d(2, 3, 3), (2, 7, 7, 7), id="ConvTranspose3d"),
    pytest.param(nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 9, 9), id="two groups, transposed"),
    pytest.param(nn.ConvTranspose2d(4, 6, (2, 3), dilation=2), (4, 13, 13), id="dilated, transposed"),
]


def middle(shape):
    """Index of the first channel's central element."""
    return (0, 0, *(size // 2 for size in shape[2:]))


def counted_fans(layer, shape):
    """With all weights 1, a central output of ones counts its inputs, and a central gradient its outputs."""
    x = torch.ones(1, *shape, requires_grad=True)
    tensors = {"weight": torch.ones_like(layer.weight), "bias": torch.zeros_like(layer.bias)}
    y = torch.func.functional_call(layer, tensors, (x,))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return round(y[middle(y.shape)].item()), round(gradient[middle(gradient.shape)].item())


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_fans_are_what_can_be_counted(layer, shape):
    """Fan-in is the number of inputs of one output, fan-out the number of outputs of one input."""
    assert fans(layer) == counted_fans(layer, shape)


@pytest.mark.parametrize("layer", [nn.Embedding(9, 4), nn.EmbeddingBag(9, 4, mode="sum")], ids=["one", "bag"])
def test_an_embedding_has_one_input_for_each_output(layer):
    """The output of one looked-up row is that row itself: fan-in is 1, and fan-out the length of a row."""
    nn.init.ones_(layer.weight)
    looked_up = layer(torch.tensor([[3]]))
    assert fans(layer) == (round(looked_up.max().item()), looked_up.numel()) == (1, 4)


@pytest.mark.parametrize("module", [nn.BatchNorm1d(2), nn.ReLU(), nn.PReLU()], ids=lambda m: type(m).__name__)
def test_other_layers_have_no_fans(module):
    """The error says what is needed and what was given."""
    with pytest.raises(
        TypeError, match=f"must be Linear, Conv, ConvTranspose or Embedding, got {type(module).__name__}"
    ):
        fans(module)


def seen(module):
    return [(slot.name, slot.role, slot.fan_in, slot.fan_out, slot.blocks) for slot in slots(module)]


def test_attention_projects_queries_keys_and_values_by_three_matrices():
    """The packed matrix is three of embed_dim inputs each; unpacked ones have the inputs that they take."""
    packed = [("in_proj_weight", Role.WEIGHT, 8, 8, 3), ("in_proj_bias", Role.BIAS, 0, 0, 1)]
    assert seen(nn.MultiheadAttention(8, 2)) == packed
    assert seen(nn.MultiheadAttention(8, 2, kdim=5, vdim=6, bias=False)) == [
        ("q_proj_weight", Role.WEIGHT, 8, 8, 1),
        ("k_proj_weight", Role.WEIGHT, 5, 8, 1),
        ("v_proj_weight", Role.WEIGHT, 6, 8, 1),
    ]


RECURRENT = [
    pytest.param(nn.LSTM(3, 5, bias=False), [("weight_ih_l0", 3, 5, 4), ("weight_hh_l0", 5, 5, 4)], id="LSTM"),
    pytest.param(nn.GRU(3, 5, bias=False), [("weight_ih_l0", 3, 5, 3), ("weight_hh_l0", 5, 5, 3)], id="GRU"),
    pytest.param(nn.RNN(3, 5, bias=False), [("weight_ih_l0", 3, 5, 1), ("weight_hh_l0", 5, 5, 1)], id="RNN"),
    pytest.param(nn.LSTMCell(3, 5, bias=False), [("weight_ih", 3, 5, 4), ("weight_hh", 5, 5, 4)], id="LSTMCell"),
    pytest.param(nn.GRUCell(3, 5, bias=False), [("weight_ih", 3, 5, 3), ("weight_hh", 5, 5, 3)], id="GRUCell"),
    pytest.param(nn.RNNCell(3, 5, bias=False), [("weight_ih", 3, 5, 1), ("weight_hh", 5, 5, 1)], id="RNNCell"),
    pytest.param(
        nn.LSTM(3, 5, bias=False, proj_size=2),
        [("weight_ih_l0", 3, 5, 4), ("weight_hh_l0", 2, 5, 4), ("weight_hr_l0", 5, 2, 1)],
        id="projected LSTM",
    ),
    pytest.param(
        nn.GRU(3, 5, bias=False, bidirectional=True, num_layers=2),
        [
            *[
                (f"weight_{kind}_l0{way}", fan, 5, 3)
                for way in ("", "_reverse")
                for kind, fan in (("ih", 3), ("hh", 5))
            ],
            *[
                (f"weight_{kind}_l1{way}", fan, 5, 3)
                for way in ("", "_reverse")
                for kind, fan in (("ih", 10), ("hh", 5))
            ],
        ],
        id="two layers, both ways",
    ),
]


@pytest.mark.parametrize(("layer", "expected"), RECURRENT)
def test_recurrent_layers_hold_a_matrix_for_each_gate(layer, expected):
    """Fan-in is the number of columns, fan-out that of one gate's rows."""
    assert [(name, fan_in, fan_out, blocks) for name, _, fan_in, fan_out, blocks in seen(layer)] == expected


def test_recurrent_weights_and_the_forget_bias_are_told_apart():
    """What multiplies the hidden state is recurrent; of two biases that add up, one has the forget gate."""
    roles = {slot.name: slot.role for slot in slots(nn.LSTM(3, 5))}
    assert roles == {
        "weight_ih_l0": Role.WEIGHT,
        "weight_hh_l0": Role.RECURRENT,
        "bias_ih_l0": Role.LSTM_BIAS,
        "bias_hh_l0": Role.BIAS,
    }
    assert Role.LSTM_BIAS not in {slot.role for slot in slots(nn.GRU(3, 5))}


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(2), nn.InstanceNorm1d(2, affine=True), nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.SyncBatchNorm(2)],
    ids=lambda m: type(m).__name__,
)
def test_norms_hold_gamma_and_beta(layer):
    """Every normalisation layer of torch has the two, and is no layer with weights."""
    assert [slot.role for slot in slots(layer)] == [Role.GAMMA, Role.BETA]
    assert not holds_weights(layer)


@pytest.mark.parametrize(
    "layer", [nn.ReLU(), nn.PReLU(), nn.Sequential(nn.Linear(1, 1))], ids=lambda m: type(m).__name__
)
def test_other_modules_hold_nothing_of_their_own(layer):
    """Activations and containers have no slots."""
    assert slots(layer) == []
    assert not holds_weights(layer)


def test_parameters_that_are_switched_off_are_no_slots():
    """A layer without bias, and a norm without γ and β, list what they have."""
    assert [slot.name for slot in slots(nn.Linear(1, 1, bias=False))] == ["weight"]
    assert slots(nn.BatchNorm1d(1, affine=False)) == []
