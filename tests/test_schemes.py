# SPDX-License-Identifier: Apache-2.0
"""Weights are drawn with the spread of the papers, each from a stream of its own, and nothing else moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_bn.schemes import SCHEMES, fans, initialize, stream_seed, target_std

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


@pytest.mark.parametrize("module", [nn.BatchNorm1d(2), nn.ReLU(), nn.Embedding(2, 2)], ids=lambda m: type(m).__name__)
def test_other_layers_have_no_fans(module):
    """The error says what is needed and what was given."""
    with pytest.raises(TypeError, match=f"module must be Linear, Conv or ConvTranspose, got {type(module).__name__}"):
        fans(module)


@pytest.mark.parametrize(
    ("scheme", "fan_in", "fan_out", "variance"),
    [
        pytest.param("he", 50, 7, 2 / 50, id="He"),
        pytest.param("xavier", 30, 10, 2 / (30 + 10), id="Xavier"),
        pytest.param("naive", 50, 7, 0.01**2, id="naive"),
        pytest.param("he", 0, 0, 2, id="He without inputs"),
    ],
)
def test_the_target_is_that_of_the_paper(scheme, fan_in, fan_out, variance):
    """He draws with variance 2 / fan_in, Xavier with 2 / (fan_in + fan_out), naive with 0.01²."""
    assert target_std(scheme, fan_in, fan_out) ** 2 == pytest.approx(variance)


WIDE = [
    pytest.param(lambda: nn.Linear(200, 100), 200, 100, id="Linear"),
    pytest.param(lambda: nn.Conv1d(64, 96, 3), 192, 288, id="Conv1d"),
    pytest.param(lambda: nn.Conv2d(48, 64, 3), 432, 576, id="Conv2d"),
    pytest.param(lambda: nn.Conv3d(16, 24, 3), 432, 648, id="Conv3d"),
    pytest.param(lambda: nn.Conv2d(64, 128, 3, groups=4), 144, 288, id="groups"),
    pytest.param(lambda: nn.ConvTranspose2d(32, 64, 3), 288, 576, id="transposed"),
]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("make", "fan_in", "fan_out"), WIDE)
def test_weights_have_the_spread_of_the_formula(make, fan_in, fan_out, scheme):
    """Mean and standard deviation are those of the scheme within five standard errors, and biases are 0."""
    variance = {"he": 2 / fan_in, "xavier": 2 / (fan_in + fan_out), "naive": 1e-4}[scheme]
    layer = make()
    (weight, _) = initialize(layer, scheme).filled
    values, std = layer.weight.double(), math.sqrt(variance)
    assert values.std(correction=0).item() == pytest.approx(std, rel=5 / math.sqrt(2 * values.numel()))
    assert values.mean().item() == pytest.approx(0, abs=5 * std / math.sqrt(values.numel()))
    assert not layer.bias.any()
    assert (weight.fan_in, weight.fan_out, weight.target_std) == (fan_in, fan_out, pytest.approx(std))
    assert weight.actual_std == pytest.approx(values.std(correction=0).item(), rel=1e-5)


def small(depth=2):
    """``depth`` pairs of a linear layer and BatchNorm."""
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4))))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_the_report_has_every_parameter_in_order():
    """Each filled parameter is named, with its shape and what it was filled by; only weights have fans."""
    report = initialize(small(1), "xavier")
    assert [(row.name, row.shape, row.scheme, row.fan_in, row.fan_out) for row in report.filled] == [
        ("0.weight", (4, 4), "xavier", 4, 4),
        ("0.bias", (4,), "zeros", 0, 0),
        ("1.weight", (4,), "ones", 0, 0),
        ("1.bias", (4,), "zeros", 0, 0),
    ]
    assert report.skipped == {}


def test_the_same_seed_gives_the_same_weights():
    """Whatever a model held before, the same seed fills it with the same numbers."""
    one, two = small(), small()
    initialize(one, seed=3)
    initialize(two, seed=3)
    assert all(torch.equal(value, weights(two)[name]) for name, value in weights(one).items())


def test_different_seeds_and_names_give_different_weights():
    """Another seed, and another place in the model, is another stream."""
    one, two = small(), small()
    initialize(one, seed=3)
    initialize(two, seed=4)
    assert not torch.equal(one[0].weight, two[0].weight)
    assert not torch.equal(one[0].weight, one[2].weight)


def test_adding_a_layer_leaves_the_others_as_they_were():
    """Each parameter depends on the seed and on its own name alone."""
    short, long = small(1), small(3)
    initialize(short)
    initialize(long)
    assert all(torch.equal(value, weights(long)[name]) for name, value in weights(short).items())


def test_a_stream_seed_depends_on_seed_and_name():
    """Seeds are distinct for distinct names and seeds, also where both together read the same, and fit 63 bits."""
    seeds = [stream_seed(*pair) for pair in [(1, "a"), (2, "a"), (1, "b"), (11, "a"), (1, "1/a")]]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_global_random_state_is_not_touched(scheme):
    """What is drawn afterwards is what would have been drawn without, and the state before does not matter."""
    model, twin = small(), small()
    before = torch.get_rng_state()
    initialize(model, scheme)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        initialize(twin, scheme)
    assert torch.equal(model[0].weight, twin[0].weight)


def test_batchnorm_starts_afresh():
    """γ is 1, β is 0, and mean, variance and counter are those of a new layer."""
    norm, new = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    for tensor in (*norm.parameters(), *norm.buffers()):
        tensor.data.fill_(7)
    initialize(norm)
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in norm.state_dict().items())


def test_batchnorm_without_parameters_keeps_its_statistics():
    """Without γ nothing tells a layer of a frozen backbone from another."""
    norm = nn.BatchNorm1d(2, affine=False)
    norm.running_mean.fill_(7)
    assert initialize(norm).filled == ()
    assert norm.running_mean.tolist() == [7, 7]


def test_a_tied_parameter_is_filled_once():
    """A weight that two layers share is listed and filled under its first name."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    alone = nn.Sequential(nn.Linear(4, 4))
    report = initialize(net)
    initialize(alone)
    assert [row.name for row in report.filled] == ["0.weight", "0.bias", "1.bias"]
    assert torch.equal(net[1].weight, alone[0].weight)


def test_frozen_parameters_keep_their_values():
    """Parameters without gradients are skipped with a reason, and so are the statistics of their BatchNorm."""
    net = small(1)
    net[1].running_mean.fill_(7)
    before = {name: value.clone() for name, value in net.requires_grad_(False).state_dict().items()}
    report = initialize(net)
    assert report.filled == ()
    assert list(report.skipped) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert set(report.skipped.values()) == {"frozen (requires_grad=False)"}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def parametrized():
    layer = nn.Linear(4, 4, bias=False)
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer


@pytest.mark.parametrize(
    ("layer", "names", "reason"),
    [
        pytest.param(parametrized(), ["0.weight"], "parametrization", id="parametrized"),
        pytest.param(nn.LazyLinear(4), ["0.weight", "0.bias"], "lazy", id="lazy"),
        pytest.param(nn.LazyBatchNorm1d(), ["0.weight", "0.bias"], "lazy", id="lazy BatchNorm"),
        pytest.param(nn.Linear(2, 2, device="meta"), ["0.weight", "0.bias"], "meta device", id="meta"),
        pytest.param(nn.Linear(2, 2, dtype=torch.complex64), ["0.weight", "0.bias"], "complex64", id="complex"),
    ],
)
def test_what_cannot_be_filled_is_skipped_with_a_reason(layer, names, reason):
    """Parameters without values of their own are listed, and the next layer is filled all the same."""
    report = initialize(nn.Sequential(layer, nn.Linear(2, 2)))
    assert list(report.skipped) == names
    assert all(reason in why for why in report.skipped.values())
    assert [row.name for row in report.filled] == ["1.weight", "1.bias"]


@pytest.mark.parametrize(
    "layer", [nn.Embedding(3, 2), nn.LayerNorm(2), nn.PReLU(), nn.GRUCell(2, 2)], ids=lambda m: type(m).__name__
)
def test_other_layers_are_left_as_they_are(layer):
    """A layer that the schemes do not cover is neither filled nor listed."""
    before = weights(layer)
    report = initialize(layer)
    assert (report.filled, report.skipped) == ((), {})
    assert all(torch.equal(value, before[name]) for name, value in weights(layer).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_precision_gets_the_same_numbers(dtype):
    """A model of another precision holds the float32 numbers, rounded."""
    model, twin = small().to(dtype), small()
    initialize(model)
    initialize(twin)
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight, twin[0].weight.to(dtype))


def test_gradients_flow_as_before():
    """Filled parameters are still leaves that require gradients."""
    model = small()
    initialize(model)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


@pytest.mark.parametrize("scheme", ["kaiming", "He", ""])
def test_an_unknown_scheme_is_an_error(scheme):
    """The error lists the schemes and shows what was given, and no parameter has moved."""
    model = small()
    before = weights(model)
    with pytest.raises(ValueError, match=f"scheme must be one of he, xavier, naive, got '{scheme}'"):
        initialize(model, scheme)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
