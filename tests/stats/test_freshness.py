# SPDX-License-Identifier: Apache-2.0
"""Fresh values of every usual kind look drawn, trained ones do not, and each statistic is what it is called."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_bn.stats import freshness
from lightning_bn.stats.freshness import (
    BUDGET,
    FEWEST,
    LIMITS,
    batchnorm_looks_new,
    departures,
    looks_drawn,
    why_not_drawn,
    why_not_new,
)

SHAPES = [(10, 64), (128, 64), (400, 300), (16, 3, 3, 3), (48, 32, 3, 3), (256, 1, 3, 3), (128,)]


def initialised(fill, dtype=torch.float32, **options):
    """A builder of tensors that a function of ``torch.nn.init`` fills."""

    def build(shape):
        weight = torch.empty(shape, dtype=dtype)
        return fill(weight, **options)

    return build


def default(shape):
    """PyTorch's default for 100 inputs, whatever the shape."""
    return torch.rand(shape) * 0.2 - 0.1


def with_value(part, value):
    """A builder of default values in which a part of the rows was set."""

    def build(shape):
        weight = default(shape)
        weight[part(shape[0])] = value
        return weight

    return build


ANY = [
    pytest.param(initialised(nn.init.uniform_, a=-0.1, b=0.1), id="uniform"),
    pytest.param(initialised(nn.init.uniform_), id="uniform from 0"),
    pytest.param(initialised(nn.init.uniform_, torch.bfloat16, a=-3, b=3), id="uniform in bfloat16"),
    pytest.param(initialised(nn.init.normal_, std=0.01), id="normal"),
    pytest.param(initialised(nn.init.normal_, torch.float16, std=1e-6), id="normal at the end of float16"),
    pytest.param(initialised(nn.init.normal_, torch.float16, std=3e-7), id="few levels of float16"),
    pytest.param(initialised(nn.init.normal_, std=1e-30), id="tiny"),
    pytest.param(initialised(nn.init.normal_, std=1e30), id="huge"),
    pytest.param(initialised(nn.init.trunc_normal_), id="torch's truncated normal"),
    pytest.param(initialised(nn.init.trunc_normal_, std=0.02, a=-0.02, b=0.02), id="cut at 1 std"),
    pytest.param(initialised(nn.init.trunc_normal_, std=0.02, a=-0.04, b=0.04), id="cut at 2 std"),
    pytest.param(initialised(nn.init.trunc_normal_, std=0.02, a=-0.06, b=0.06), id="cut at 3 std"),
    pytest.param(initialised(nn.init.zeros_), id="zeros"),
    pytest.param(initialised(nn.init.ones_), id="ones"),
    pytest.param(with_value(lambda rows: slice(rows // 4), 1.0), id="a block of ones"),
    pytest.param(with_value(lambda rows: slice(None, rows, 3), 0.0), id="rows of zeros"),
    pytest.param(lambda shape: default(shape) * (torch.rand(shape) < 0.5), id="masked"),
    pytest.param(lambda shape: default(shape).repeat_interleave(4, 0)[: shape[0]], id="repeated rows"),
]
MATRIX = [
    pytest.param(initialised(nn.init.kaiming_uniform_, a=math.sqrt(5)), id="PyTorch's default"),
    pytest.param(initialised(nn.init.kaiming_normal_), id="He"),
    pytest.param(initialised(nn.init.xavier_uniform_), id="Xavier"),
    pytest.param(initialised(nn.init.orthogonal_, gain=1.4), id="orthogonal"),
    pytest.param(lambda shape: nn.init.orthogonal_(torch.empty(shape)).bfloat16(), id="orthogonal in bfloat16"),
    pytest.param(
        lambda shape: torch.cat([nn.init.orthogonal_(torch.empty(shape)) for _ in range(4)]), id="orthogonal blocks"
    ),
    pytest.param(lambda shape: nn.functional.normalize(torch.randn(shape).flatten(1)).reshape(shape), id="unit rows"),
    pytest.param(lambda shape: nn.init.orthogonal_(torch.empty(shape)).transpose(0, 1), id="transposed"),
    pytest.param(with_value(lambda _: 0, 0.0), id="a padding row"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("build", ANY)
def test_fresh_values_look_drawn(build, shape):
    """What an initialisation of any usual kind leaves, rounded or with constants in it, is called drawn."""
    assert why_not_drawn(build(shape)) == ""


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("build", MATRIX)
def test_fresh_matrices_look_drawn(build, shape):
    """Initialisations that need rows and columns, also such as make rows depend on one another, are called drawn."""
    assert why_not_drawn(build(shape)) == ""


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: nn.LSTM(40, 64), id="LSTM"),
        pytest.param(lambda: nn.GRU(40, 100), id="GRU"),
        pytest.param(lambda: nn.MultiheadAttention(64, 4), id="attention"),
        pytest.param(lambda: nn.Embedding(1000, 64, padding_idx=3), id="embedding"),
        pytest.param(lambda: nn.ConvTranspose2d(64, 128, 4), id="transposed convolution"),
        pytest.param(lambda: nn.Conv1d(1, 128, 512), id="long kernel"),
        pytest.param(lambda: nn.Bilinear(20, 30, 40), id="bilinear"),
    ],
)
def test_layers_look_drawn_as_they_are_built(build):
    """Every parameter of a layer that PyTorch has just built is called drawn."""
    assert {name: why_not_drawn(value) for name, value in build().named_parameters() if why_not_drawn(value)} == {}


def trained(net, steps=150):
    """The weights of a network before and after a short training on a rule that can be learnt."""
    inputs = torch.randn(512, 64)
    labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
    before = net[0].weight.detach().clone()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    return before, net[0].weight.detach()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_trained_weights_are_told_from_their_start(dtype):
    """Training blurs the edges of PyTorch's default; the same is seen in every precision, and not before."""
    before, after = trained(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2)))
    assert looks_drawn(before.to(dtype))
    assert not looks_drawn(after.to(dtype))


def with_direction(x):
    return x + 0.4 * torch.randn(len(x)).outer(torch.randn(x.shape[1]))


PLANTS = {
    "mean": lambda x: x + 0.4,
    "tails": lambda x: x**3,
    "rows": lambda x: x * torch.linspace(0.5, 1.5, len(x)).unsqueeze(1),
    "centre": lambda x: x * torch.tensor([[0.5, 1, 0.5], [1, 2, 1], [0.5, 1, 0.5]]),
    "direction": with_direction,
    "smooth kernels": lambda x: x + 0.5 * torch.randn(*x.shape[:2], 1, 1),
}
MARKS = [
    pytest.param((500,), "mean", "mean", id="mean"),
    pytest.param((64, 48), "tails", "shape", id="tails"),
    pytest.param((500,), "tails", "shape", id="tails of a bias"),
    pytest.param((64, 48), "rows", "spread", id="rows"),
    pytest.param((32, 16, 3, 3), "centre", "spread", id="kernel positions"),
    pytest.param((64, 48), "direction", "spectrum", id="direction"),
    pytest.param((32, 16, 3, 3), "smooth kernels", "spectrum", id="smooth kernels"),
    pytest.param((2000, 1500), "rows", "spread", id="in a sample"),
]


@pytest.mark.parametrize(("shape", "plant", "sign"), MARKS)
def test_each_mark_of_training_is_seen(shape, plant, sign):
    """A planted mean, tail, size of rows or direction exceeds its own limit; without it nothing exceeds any."""
    x = torch.randn(shape)
    assert {name for name, value in departures(x).items() if value > LIMITS[name]} == set()
    assert departures(PLANTS[plant](x))[sign] > LIMITS[sign]


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        pytest.param(lambda: PLANTS["mean"](torch.randn(500)), "standard errors from 0", id="mean"),
        pytest.param(lambda: PLANTS["tails"](torch.randn(64, 48)), "neither uniform nor normal", id="shape"),
        pytest.param(lambda: PLANTS["rows"](torch.randn(64, 48)), "of different size", id="spread"),
        pytest.param(
            lambda: PLANTS["smooth kernels"](torch.randn(32, 16, 3, 3)), "a direction stands out", id="spectrum"
        ),
        pytest.param(lambda: torch.tensor([0.0, math.nan]), "NaN or infinite values", id="not finite"),
        pytest.param(lambda: torch.randn(64, 48), "", id="fresh"),
    ],
)
def test_the_clearest_mark_is_named(weight, words):
    """The reason is the mark that is farthest above its limit; without one there is no reason."""
    reason = why_not_drawn(weight())
    assert words in reason
    assert bool(words) is bool(reason)


@pytest.mark.parametrize(("errors", "drawn"), [(5.45, True), (5.55, False)], ids=["just below", "just above"])
def test_the_mean_is_told_at_its_limit(errors, drawn):
    """A mean up to 5.5 standard errors from 0 passes, a larger one does not, on either side."""
    x = torch.randn(400, dtype=torch.float64)
    x = (x - x.mean()) / x.std() + errors / math.sqrt(len(x))
    assert departures(x)["mean"] == pytest.approx(errors)
    assert looks_drawn(x) is looks_drawn(-x) is drawn


def anderson_darling(u):
    """A² of sorted values of a uniform distribution, by Python's own arithmetic."""
    n = len(u)
    terms = ((2 * i + 1) * (math.log(u[i]) + math.log(1 - u[n - 1 - i])) for i in range(n))
    return -n - sum(terms) / n


def test_the_shape_of_positive_values_is_judged_against_a_uniform_distribution():
    """A² of U(0, b) is that of the ratios to the largest value."""
    x = torch.rand(300, dtype=torch.float64) + 1e-3
    ratios = sorted((x / x.max()).tolist())[:-1]
    found = departures(x)
    assert found["shape"] == pytest.approx(anderson_darling(ratios), abs=0.02)
    assert "mean" not in found


def test_the_shape_is_judged_against_the_best_truncated_normal():
    """A² is that of the normal, cut at the largest value, whose second moment is the observed one."""
    x = torch.randn(300, dtype=torch.float64)
    ratios = sorted((x / x.abs().max()).abs().tolist())[:-1]
    wanted = sum(ratio**2 for ratio in ratios) / len(ratios)
    grid = torch.linspace(0, 1, 20001, dtype=torch.float64)

    def second_moment(cut):
        density = torch.exp(-((cut * grid) ** 2) / 2)
        return float((density * grid**2).sum() / density.sum())

    cut = min(torch.linspace(1, 6, 2001).tolist(), key=lambda cut: abs(second_moment(cut) - wanted))
    u = [math.erf(cut * ratio / math.sqrt(2)) / math.erf(cut / math.sqrt(2)) for ratio in ratios]
    assert departures(x)["shape"] == pytest.approx(anderson_darling(u), abs=0.02)


def chi2_tail(x, half):
    """P(χ² > x) with an even number of degrees of freedom, twice ``half``."""
    return math.exp(-x / 2) * sum((x / 2) ** k / math.factorial(k) for k in range(half))


def test_spread_is_a_chi_square_of_the_mean_sizes():
    """The p-value of equal mean |w| over the rows, or over the columns, whichever is smaller."""
    x = torch.randn(11, 15, dtype=torch.float64) * torch.linspace(0.5, 1.5, 11).reshape(-1, 1)
    sizes = (x / x.abs().max()).abs().tolist()
    everything = [value for row in sizes for value in row]
    mean = sum(everything) / len(everything)
    variance = sum((value - mean) ** 2 for value in everything) / len(everything)
    tails = []
    for lines in (sizes, list(zip(*sizes, strict=True))):
        chi2 = sum(len(line) * (sum(line) / len(line) - mean) ** 2 for line in lines) / variance
        tails.append(chi2_tail(chi2, (len(lines) - 1) // 2))
    assert departures(x)["spread"] == pytest.approx(-math.log10(min(tails)))


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (12, 8, 3, 3)], ids=str)
def test_spectrum_is_the_largest_singular_value_on_the_scale_of_noise(shape):
    """The largest squared singular value of all unfoldings, less its expectation, in Johnstone's unit."""
    x = torch.randn(shape, dtype=torch.float64)
    y = ((x - x.mean()) / x.std(correction=0)).flatten(2) if x.dim() > 2 else (x - x.mean()) / x.std(correction=0)
    excess = []
    for axis in range(y.dim()):
        matrix = y.movedim(axis, 0).flatten(1)
        a, b = (math.sqrt(side - 0.5) for side in matrix.shape)
        largest = float(torch.linalg.svdvals(matrix)[0]) ** 2
        excess.append((largest - (a + b) ** 2) / ((a + b) * (1 / a + 1 / b) ** (1 / 3)))
    assert departures(x)["spectrum"] == pytest.approx(max(excess))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(10, 10), (16, 3, 3, 3), (64, 40)], ids=str)
@pytest.mark.parametrize("build", [torch.randn, lambda shape: torch.rand(shape) - 0.5], ids=["normal", "uniform"])
def test_fresh_values_keep_to_the_laws_that_the_limits_come_from(build, shape):
    """No more fresh tensors than one in a hundred, chance allowed for, exceed each law's 1 % point along one axis."""
    axes = min(len(shape), 3)
    points = {"mean": (2.63, 1), "shape": (3.86, 1), "spread": (2.0, axes), "spectrum": (2.02, axes)}
    found = [departures(build(shape)) for _ in range(1000)]
    for name, (point, times) in points.items():
        expected = 10 * times
        assert sum(values[name] > point for values in found) <= expected + 4 * math.sqrt(expected), name
        assert max(values[name] for values in found) < LIMITS[name], name


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        pytest.param(torch.linspace(1, 2, FEWEST - 1), True, id="too few to tell"),
        pytest.param(torch.linspace(1, 2, FEWEST), False, id="just enough"),
        pytest.param(torch.randn(300).abs(), False, id="one side of a normal"),
        pytest.param(torch.empty(0, 5), True, id="none"),
        pytest.param(torch.tensor(3.0), True, id="a scalar"),
        pytest.param(torch.full((300,), math.nan), False, id="NaN"),
        pytest.param(torch.tensor([1.0, math.inf]), False, id="infinity, however few"),
        pytest.param(torch.randn(300, device="meta"), True, id="no memory"),
        pytest.param(nn.LazyLinear(4).weight, True, id="lazy"),
        pytest.param(torch.sin(torch.arange(200.0)[:, None] / 10 ** torch.linspace(0, 4, 32)), False, id="sinusoids"),
    ],
)
def test_what_cannot_be_told_counts_as_drawn(values, drawn):
    """Too few values, or none, are no sign of training; a value that is not finite, and a formula, are one."""
    assert looks_drawn(values) is drawn


TENT = 1 - torch.linspace(-1, 1, 17)[:-1].add(1 / 16).abs()


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(lambda: nn.functional.normalize(torch.randn(3000, 9)), id="short unit rows"),
        pytest.param(lambda: TENT.outer(TENT), id="bilinear kernel"),
    ],
)
def test_unit_rows_and_patterns_look_drawn(weight):
    """Neither orthonormal rows too short to be normal, nor a pattern of at most 64 values, is a sign of training."""
    assert why_not_drawn(weight()) == ""


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_other_dtypes_are_an_error(dtype):
    """The error says what is needed and what was given."""
    with pytest.raises(TypeError, match=f"weight must be of a real floating-point dtype, got {dtype}"):
        looks_drawn(torch.zeros(300, dtype=dtype))


@pytest.mark.parametrize("budget", [1 << 13, BUDGET], ids=["small", "usual"])
@pytest.mark.parametrize(
    "shape",
    [(5000, 5000), (70000, 3), (3, 70000), (512, 512, 3, 3), (1, 1, 70000), (70000,), (300, 7, 255), (100, 100)],
    ids=str,
)
def test_the_number_of_values_looked_at_is_bounded(shape, budget):
    """Of a large tensor about a budget of values is taken, from its root of rows or more; of a small one all."""
    weight = torch.ones(()).expand(shape)
    seen = freshness._sample(weight, budget)
    assert min(weight.numel(), budget // 2) <= seen.numel() <= budget
    assert len(seen) >= min(len(weight), math.isqrt(budget))


def test_a_smaller_budget_sees_less():
    """A mean that is clear in 2^16 values is not in 2^10 of them."""
    weight = torch.randn(300, 300) + 0.1
    assert why_not_drawn(weight) != ""
    assert why_not_drawn(weight, budget=1 << 10) == ""


def test_judging_changes_nothing():
    """Neither the weight nor the global random state moves, and no gradient is recorded."""
    weight = nn.Parameter(torch.randn(64, 64))
    before, state = weight.detach().clone(), torch.get_rng_state()
    departures(weight)
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert weight.grad is None
    assert departures(weight) == departures(weight)


def norm(kind=nn.BatchNorm1d, batches=0, **values):
    """A normalisation layer of 4 channels that has seen some batches, with some of its values set."""
    layer = kind(4) if kind is not nn.GroupNorm else kind(2, 4)
    for _ in range(batches):
        layer(torch.randn(16, 4) + 1)
    for name, value in values.items():
        getattr(layer, name).data.copy_(torch.as_tensor(value))
    return layer


UNEVEN = (1.0, 1.1, 0.9, 1.0)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        pytest.param(lambda: norm(), "", id="as built"),
        pytest.param(lambda: norm(weight=0.0), "", id="zero gamma"),
        pytest.param(lambda: norm(weight=UNEVEN), "", id="gamma drawn, never ran"),
        pytest.param(lambda: norm(batches=10), "", id="dry runs"),
        pytest.param(lambda: norm(batches=11), "its running statistics have seen 11 batches", id="ran"),
        pytest.param(lambda: norm(running_mean=UNEVEN), "its running statistics are not those of", id="loaded mean"),
        pytest.param(lambda: norm(running_var=0.5), "its running statistics are not those of", id="loaded variance"),
        pytest.param(lambda: norm(batches=3, bias=UNEVEN), "its β differs between channels", id="few steps"),
        pytest.param(lambda: norm(nn.GroupNorm), "", id="GroupNorm as built"),
        pytest.param(lambda: norm(nn.GroupNorm, weight=UNEVEN), "its γ differs between channels", id="GroupNorm gamma"),
        pytest.param(lambda: norm(nn.LayerNorm, bias=UNEVEN), "its β differs between channels", id="LayerNorm beta"),
        pytest.param(lambda: nn.BatchNorm2d(4, affine=False), "", id="no gamma"),
        pytest.param(lambda: nn.BatchNorm2d(4, track_running_stats=False), "", id="no statistics"),
        pytest.param(lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False), "", id="nothing"),
        pytest.param(lambda: nn.LazyBatchNorm1d(), "", id="lazy"),
        pytest.param(lambda: nn.BatchNorm1d(4, device="meta"), "", id="no memory"),
    ],
)
def test_a_norm_layer_is_new_until_it_was_trained_or_loaded(layer, reason):
    """More than 10 batches, statistics without a batch, and channels that differ tell, as far as a layer has them."""
    assert why_not_new(layer()).startswith(reason)
    assert batchnorm_looks_new(layer()) is (why_not_new(layer()) == "") is (reason == "")
