# SPDX-License-Identifier: Apache-2.0
"""A model is filled as the formulas say over all kinds of layers, and nothing else moves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_bn.initialization import initialize
from lightning_bn.schemes import SCHEMES

# Each weight by name, with the fan-in and fan-out that can be counted, and the gains of He and of Xavier: where nothing
# says what follows, that of ReLU and none; else what the layer itself says.
RELU = math.sqrt(2)
OPEN, LINEAR, BOTH = (RELU, 1.0), (1.0, 1.0), (RELU, RELU)
KINDS = [
    pytest.param(lambda: nn.Linear(200, 100), {"weight": (200, 100, OPEN)}, id="Linear"),
    pytest.param(lambda: nn.Conv1d(64, 96, 3), {"weight": (192, 288, OPEN)}, id="Conv1d"),
    pytest.param(lambda: nn.Conv2d(48, 64, 3), {"weight": (432, 576, OPEN)}, id="Conv2d"),
    pytest.param(lambda: nn.Conv3d(16, 24, 3), {"weight": (432, 648, OPEN)}, id="Conv3d"),
    pytest.param(lambda: nn.Conv2d(64, 128, 3, groups=4), {"weight": (144, 288, OPEN)}, id="groups"),
    pytest.param(lambda: nn.Conv2d(512, 512, 5, groups=512), {"weight": (25, 25, OPEN)}, id="depthwise"),
    pytest.param(lambda: nn.ConvTranspose1d(64, 96, 3), {"weight": (192, 288, OPEN)}, id="ConvTranspose1d"),
    pytest.param(lambda: nn.ConvTranspose2d(32, 64, 3), {"weight": (288, 576, OPEN)}, id="ConvTranspose2d"),
    pytest.param(lambda: nn.ConvTranspose3d(16, 24, 3), {"weight": (432, 648, OPEN)}, id="ConvTranspose3d"),
    pytest.param(
        lambda: nn.ConvTranspose2d(64, 128, 3, groups=4), {"weight": (144, 288, OPEN)}, id="transposed, groups"
    ),
    pytest.param(lambda: nn.Embedding(500, 64), {"weight": (1, 64, LINEAR)}, id="Embedding"),
    pytest.param(lambda: nn.EmbeddingBag(500, 64), {"weight": (1, 64, LINEAR)}, id="EmbeddingBag"),
    pytest.param(
        lambda: nn.MultiheadAttention(96, 4),
        {"in_proj_weight": (96, 96, LINEAR), "out_proj.weight": (96, 96, LINEAR)},
        id="attention, packed",
    ),
    pytest.param(
        lambda: nn.MultiheadAttention(96, 4, kdim=64, vdim=80),
        {"q_proj_weight": (96, 96, LINEAR), "k_proj_weight": (64, 96, LINEAR), "v_proj_weight": (80, 96, LINEAR)},
        id="attention, separate",
    ),
    pytest.param(lambda: nn.LSTM(80, 60), {"weight_ih_l0": (80, 60, LINEAR)}, id="LSTM"),
    pytest.param(lambda: nn.GRU(80, 60), {"weight_ih_l0": (80, 60, LINEAR)}, id="GRU"),
    pytest.param(lambda: nn.RNN(80, 60), {"weight_ih_l0": (80, 60, LINEAR)}, id="RNN"),
    pytest.param(lambda: nn.RNN(80, 60, nonlinearity="relu"), {"weight_ih_l0": (80, 60, BOTH)}, id="RNN, relu"),
    pytest.param(lambda: nn.LSTM(80, 60, proj_size=40), {"weight_hr_l0": (60, 40, LINEAR)}, id="LSTM, projected"),
    pytest.param(lambda: nn.LSTMCell(80, 60), {"weight_ih": (80, 60, LINEAR)}, id="LSTMCell"),
]
VARIANCES = {
    "he": lambda fan_in, fan_out, gains: gains[0] ** 2 / fan_in,
    "he_uniform": lambda fan_in, fan_out, gains: gains[0] ** 2 / fan_in,
    "he_fan_out": lambda fan_in, fan_out, gains: gains[0] ** 2 / fan_out,
    "he_fan_out_uniform": lambda fan_in, fan_out, gains: gains[0] ** 2 / fan_out,
    "xavier": lambda fan_in, fan_out, gains: gains[1] ** 2 * 2 / (fan_in + fan_out),
    "xavier_uniform": lambda fan_in, fan_out, gains: gains[1] ** 2 * 2 / (fan_in + fan_out),
    "naive": lambda *_: 1e-4,
    "uniform": lambda *_: 0.1**2 / 12,
    0.3: lambda *_: 0.09,
    1000: lambda *_: 1e6,
}


@pytest.mark.parametrize("scheme", VARIANCES, ids=str)
@pytest.mark.parametrize(("make", "weights"), KINDS)
def test_weights_have_the_spread_of_the_formula(make, weights, scheme):
    """Mean and standard deviation are those of the scheme within five standard errors, and so says the report."""
    layer = make()
    rows = {row.name: row for row in initialize(layer, scheme).filled}
    parameters = dict(layer.named_parameters())
    for name, (fan_in, fan_out, gains) in weights.items():
        std = math.sqrt(VARIANCES[scheme](fan_in, fan_out, gains))
        values = parameters[name].double()
        assert values.std(correction=0).item() == pytest.approx(std, rel=5 / math.sqrt(2 * values.numel()))
        assert values.mean().item() == pytest.approx(0, abs=5 * std / math.sqrt(values.numel()))
        assert (rows[name].fan_in, rows[name].fan_out) == (fan_in, fan_out)
        assert rows[name].target_std == pytest.approx(std)
        assert rows[name].actual_std == pytest.approx(values.std(correction=0).item(), rel=1e-5)
    assert not any(value.any() for name, value in parameters.items() if "bias" in name)


@pytest.mark.parametrize("scheme", ["orthogonal", "he", "xavier"])
@pytest.mark.parametrize("make", [lambda: nn.LSTM(8, 24), lambda: nn.GRU(8, 24), lambda: nn.RNN(8, 24)])
def test_recurrent_weights_keep_the_length_of_the_state(make, scheme):
    """Each gate's recurrent matrix is orthogonal: it neither lengthens nor shortens any hidden state."""
    layer = make()
    initialize(layer, scheme)
    for gate in layer.weight_hh_l0.detach().double().split(24):
        assert torch.allclose(gate @ gate.T, torch.eye(24, dtype=torch.float64), atol=1e-5)


def test_an_orthogonal_convolution_keeps_the_size_of_the_signal():
    """With the gain of ReLU the mean square behind ten layers is within a factor of two of the input's."""
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(10) for layer in (nn.Linear(256, 256), nn.ReLU())))
    initialize(net, "orthogonal")
    x = torch.randn(64, 256)
    assert 0.5 < (2 * net(x).square().mean() / x.square().mean()).item() < 2


def small(depth=2):
    """``depth`` pairs of a linear layer and BatchNorm."""
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.BatchNorm1d(4))))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_the_report_has_every_parameter_in_order():
    """Each parameter is named, with its shape and what it was filled by; only weights have fans."""
    report = initialize(nn.Sequential(*small(1), nn.PReLU()), "xavier")
    assert [(row.name, row.shape, row.scheme, row.fan_in, row.fan_out) for row in report.rows] == [
        ("0.weight", (4, 4), "xavier", 4, 4),
        ("0.bias", (4,), "zeros", 0, 0),
        ("1.weight", (4,), "ones", 0, 0),
        ("1.bias", (4,), "zeros", 0, 0),
        ("2.weight", (1,), "kept", 0, 0),
    ]
    assert report.skipped == {"2.weight": "no rule for PReLU"}


def test_the_report_is_plain_json():
    """Nothing in it is a tensor, NaN or a tuple."""
    import json  # noqa: PLC0415

    report = initialize(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2)), 0.5)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()


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


@pytest.mark.parametrize("scheme", [*SCHEMES, 0.1], ids=str)
def test_the_global_random_state_is_not_touched(scheme):
    """What is drawn afterwards is what would have been drawn without, and the state before does not matter."""
    model, twin = small(), small()
    twin.load_state_dict(model.state_dict())
    before, batch = torch.get_rng_state(), torch.ones(8, 4).cumsum(0)
    initialize(model, scheme, batch=batch)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        initialize(twin, scheme, batch=batch)
    assert torch.equal(model[0].weight, twin[0].weight)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, affine=True, track_running_stats=True)])
@pytest.mark.filterwarnings("ignore:.*look loaded or trained")  # that is what is done to them here
def test_normalisation_starts_afresh(norm):
    """γ is 1, β is 0, and mean, variance and counter are those of a new layer."""
    new = {name: value.clone() for name, value in norm.state_dict().items()}
    for tensor in (*norm.parameters(), *norm.buffers()):
        tensor.data.fill_(7)
    initialize(norm)
    assert all(torch.equal(value, new[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4)], ids=["layer", "group"])
def test_every_norm_gets_ones_and_zeros(norm):
    """LayerNorm and GroupNorm start like BatchNorm."""
    nn.init.constant_(norm.weight, 3)
    nn.init.constant_(norm.bias, 3)
    initialize(norm)
    assert (norm.weight.tolist(), norm.bias.tolist()) == ([1] * 4, [0] * 4)


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


def test_an_embedding_that_a_linear_layer_shares_is_filled_as_its_weight():
    """The head multiplies by it, so that its fan-in decides; the padding row stays 0."""
    net = nn.Sequential(nn.Embedding(300, 100, padding_idx=7), nn.Linear(100, 300, bias=False))
    net[1].weight = net[0].weight
    (row,) = initialize(net, "he", nonlinearity="linear").rows
    assert (row.name, row.fan_in, row.target_std) == ("0.weight", 100, pytest.approx(0.1))
    assert not net[0].weight[7].any()
    assert net[0].weight[8].any()


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
        pytest.param(
            parametrized(), ["0.weight", "0.parametrizations.weight.original"], "arametriz", id="parametrized"
        ),
        pytest.param(nn.LazyLinear(4), ["0.weight", "0.bias"], "lazy", id="lazy"),
        pytest.param(nn.LazyBatchNorm1d(), ["0.weight", "0.bias"], "lazy", id="lazy BatchNorm"),
        pytest.param(nn.Linear(2, 2, device="meta"), ["0.weight", "0.bias"], "meta device", id="meta"),
        pytest.param(nn.Linear(2, 2, dtype=torch.complex64), ["0.weight", "0.bias"], "complex64", id="complex"),
        pytest.param(nn.PReLU(), ["0.weight"], "no rule for PReLU", id="PReLU"),
        pytest.param(nn.Bilinear(2, 2, 2), ["0.weight", "0.bias"], "no rule for Bilinear", id="Bilinear"),
    ],
)
def test_what_cannot_be_filled_is_skipped_with_a_reason(layer, names, reason):
    """Parameters without values of their own, or of unknown layers, are listed, and the next layer is filled."""
    report = initialize(nn.Sequential(layer, nn.Linear(2, 2)))
    assert list(report.skipped) == names
    assert all(reason in why for why in report.skipped.values())
    assert [row.name for row in report.filled] == ["1.weight", "1.bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_precision_gets_the_same_numbers(dtype):
    """A model of another precision holds the float32 numbers, rounded."""
    model, twin = small().to(dtype), small()
    initialize(model)
    initialize(twin)
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight, twin[0].weight.to(dtype))


def test_every_memory_format_gets_the_same_numbers():
    """Channels-last weights hold the values of contiguous ones, and stay channels-last."""
    model, twin = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last), nn.Conv2d(4, 8, 3)
    initialize(model)
    initialize(twin)
    assert torch.equal(model.weight, twin.weight)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_gradients_flow_as_before():
    """Filled parameters are still leaves that require gradients."""
    model = small()
    initialize(model)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


@pytest.mark.parametrize("scheme", ["kaiming", 0, True])
def test_an_unknown_scheme_is_an_error_and_changes_nothing(scheme):
    """The error shows what was given, and no parameter has moved."""
    model = small()
    before = weights(model)
    with pytest.raises(ValueError, match=f"scheme must be one of he, .*, got {scheme!r}"):
        initialize(model, scheme)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_pytorch_touches_nothing_and_reports():
    """Every parameter keeps its values; the report has fans and the standard deviation that it holds."""
    model = small(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = initialize(model, "pytorch")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {row.scheme for row in report.rows} == {"kept"}
    assert report.skipped == {}
    assert report.rows[0].actual_std == pytest.approx(model[0].weight.std(correction=0).item())
    assert report.rows[0].fan_in == 4


def test_only_what_is_included_and_not_excluded_is_filled():
    """The rest keeps its values and is listed as the user's own choice."""
    model = small(2)
    before = weights(model)
    report = initialize(model, "naive", include=["2", "3"], exclude=["BatchNorm1d"])
    assert [row.name for row in report.filled] == ["2.weight", "2.bias"]
    assert report.skipped == {}
    assert torch.equal(model[0].weight, before["0.weight"])


def test_a_pattern_that_matches_nothing_warns_with_the_nearest_names():
    """The warning names the argument, and the rest is done."""
    with pytest.warns(UserWarning, match=r"exclude: 'Batchnorm1d' matches nothing; nearest: BatchNorm1d"):
        report = initialize(small(), exclude=["Batchnorm1d"])
    assert len(report.filled) == 8


def test_the_gain_follows_the_nonlinearity_behind_the_layer():
    """Tanh behind the first layer, GELU behind the second; behind the last ReLU is assumed for He, none for Xavier."""
    net = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9), nn.LayerNorm(9), nn.GELU(), nn.Linear(9, 9))
    for scheme, last in (("he", RELU), ("xavier", 1), ("orthogonal", 1)):
        rows = {row.name: row for row in initialize(net, scheme).rows}
        stds = [rows[f"{place}.weight"].target_std for place in (0, 2, 5)]
        assert stds == [pytest.approx(gain / 3, rel=1e-4) for gain in (5 / 3, 1.53353, last)]


def test_without_activation_modules_weights_are_those_of_the_papers():
    """Whatever functions a forward may call, He is √(2 / fan_in) and Xavier √(2 / (fan_in + fan_out))."""
    net = nn.ModuleList([nn.Linear(9, 25), nn.Conv2d(4, 6, 3)])
    assert [row.target_std for row in initialize(net, "he").rows if row.fan_in] == [
        pytest.approx(math.sqrt(2 / 9)),
        pytest.approx(math.sqrt(2 / 36)),
    ]
    assert [row.target_std for row in initialize(net, "xavier").rows if row.fan_in] == [
        pytest.approx(math.sqrt(2 / 34)),
        pytest.approx(math.sqrt(2 / 90)),
    ]


@pytest.mark.parametrize(
    ("nonlinearity", "gains"),
    [
        pytest.param("linear", [1, 1], id="for all"),
        pytest.param({"1*": "linear"}, [RELU, 1], id="by pattern"),
        pytest.param({"*": "tanh", "1": "linear"}, [5 / 3, 5 / 3], id="the first pattern that matches"),
    ],
)
def test_the_nonlinearity_can_be_given(nonlinearity, gains):
    """What the user says takes the place of what was found or assumed."""
    net = nn.ModuleList([nn.Linear(9, 9), nn.Linear(9, 9)])
    rows = [row for row in initialize(net, "he", nonlinearity=nonlinearity).rows if row.fan_in]
    assert [row.target_std * 3 for row in rows] == [pytest.approx(gain) for gain in gains]


def test_the_forget_gate_gets_its_bias_on_request():
    """The second quarter of one of the two biases that add up has it; all else is 0."""
    layer = nn.LSTM(3, 5, num_layers=2)
    initialize(layer, forget_bias=1.5)
    for depth in (0, 1):
        both = getattr(layer, f"bias_ih_l{depth}") + getattr(layer, f"bias_hh_l{depth}")
        assert both.tolist() == [0] * 5 + [1.5] * 5 + [0] * 10


def test_a_forget_bias_without_an_lstm_is_said():
    """A wish that has no effect is a remark, not silence."""
    assert "no LSTM" in initialize(nn.GRU(2, 2), forget_bias=1.0).remarks[0]


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("nonlinearity", "swoosh", "nonlinearity must be one of linear, .*, got 'swoosh'"),
        ("nonlinearity", {"*": "swoosh"}, "nonlinearity must be one of linear, .*, got 'swoosh'"),
        ("zero_init_residual", 1, "zero_init_residual must be true, false or None, got 1"),
        ("forget_bias", math.inf, "forget_bias must be a finite number, or None, got inf"),
        ("forget_bias", True, "forget_bias must be a finite number, or None, got True"),
    ],
)
def test_bad_arguments_are_refused_with_name_need_and_got(argument, value, words):
    """Before anything is changed."""
    with pytest.raises(ValueError, match=words):
        initialize(small(), **{argument: value})
