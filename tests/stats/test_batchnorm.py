# SPDX-License-Identifier: Apache-2.0
"""Drift of γ and β is a distance in the unit of the initial γ; batch statistics are read and not computed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_bn.stats import batchnorm
from lightning_bn.stats.batchnorm import (
    TINY,
    Affine,
    Batch,
    batch_statistics,
    batch_statistics_from_running,
    drift,
    output_moments,
    saved_statistics,
)


def affine(gamma, beta, dtype=torch.float32):
    return Affine(torch.tensor(gamma, dtype=dtype), torch.tensor(beta, dtype=dtype))


@pytest.fixture(params=[0, 10**9], ids=["arrays", "plain"])
def _both_ways(request, monkeypatch):
    """Few values and many go different ways to the same numbers."""
    monkeypatch.setattr(batchnorm, "FEW", request.param)


def by_hand(now, start):
    """Both distances in Python floats, over the norm of the initial γ."""
    unit = math.hypot(*start.gamma.double().tolist())
    pairs = (now.gamma, start.gamma), (now.beta, start.beta)
    return [math.dist(a.double().tolist(), b.double().tolist()) / unit for a, b in pairs]


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(
    ("now", "start", "expected"),
    [
        pytest.param(affine([1, 1], [0, 0]), affine([1, 1], [0, 0]), [0, 0], id="no movement"),
        pytest.param(affine([1.5] * 4, [0] * 4), affine([1] * 4, [0] * 4), [0.5, 0], id="gamma grew by half"),
        pytest.param(affine([1] * 4, [2] * 4), affine([1] * 4, [0] * 4), [0, 2], id="beta moved by twice gamma"),
        pytest.param(affine([-3, 4], [0, 0]), affine([3, 4], [0, 0]), [6 / 5, 0], id="one sign flipped"),
        pytest.param(affine([3, 4], [6, 8]), affine([3, 4], [0, 0]), [0, 2], id="beta in the unit of gamma"),
        pytest.param(affine([2], [1]), affine([4], [1]), [0.5, 0], id="one channel"),
    ],
)
def test_drift_follows_its_closed_form(now, start, expected):
    """Drift is ‖γ − γ₀‖/‖γ₀‖ and ‖β − β₀‖/‖γ₀‖."""
    torch.testing.assert_close(drift([now], [start]), torch.tensor([expected], dtype=torch.float32))


@pytest.mark.usefixtures("_both_ways")
def test_layers_are_rows_in_the_order_given():
    """Layers of different width give one row each, in order."""
    starts = [affine([1, 2, 2], [0, 0, 0]), affine([0.5], [1])]
    nows = [affine([1, 2, 5], [1, 0, 0]), affine([0.25], [1.5])]
    expected = torch.tensor([by_hand(now, start) for now, start in zip(nows, starts, strict=True)])
    torch.testing.assert_close(drift(nows, starts), expected)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("channels", [1, 4, 9])
def test_a_gamma_that_starts_at_zero_is_measured_in_the_usual_unit(channels):
    """Where γ₀ = 0 on purpose the unit is √C, the norm of γ = 1, so that γ = 1 counts as 100 % and not as inf."""
    start = affine([0.0] * channels, [0.0] * channels)
    now = affine([1.0] * channels, [0.5] * channels)
    torch.testing.assert_close(drift([now], [start]), torch.tensor([[1.0, 0.5]]))


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param(2 * TINY, 1 / (2 * TINY), id="just above: its own norm"),
        pytest.param(TINY / 2, 1.0, id="just below: the root of the width"),
    ],
)
def test_the_unit_changes_where_gamma_is_as_good_as_zero(size, expected):
    """A γ₀ above 1e-6 root mean square is measured in its own norm, one below in √C."""
    start, now = affine([size] * 4, [0.0] * 4), affine([size] * 4, [1.0] * 4)
    torch.testing.assert_close(drift([now], [start])[0, 1], torch.tensor(expected))


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_parameters_of_any_precision_are_compared_in_float32(dtype):
    """Half-precision γ whose squares leave their own range still drift by the right number."""
    start, now = affine([300.0, 400.0], [0.0, 0.0], dtype), affine([300.0, 500.0], [1000.0, 0.0], dtype)
    found = drift([now], [start])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([by_hand(now, start)]))


@pytest.mark.usefixtures("_both_ways")
def test_a_non_finite_parameter_leaves_drift_undefined():
    """A NaN in γ gives NaN for γ and leaves β alone."""
    found = drift([affine([math.nan, 1], [1, 0])], [affine([3, 4], [0, 0])])[0]
    assert math.isnan(found[0])
    assert found[1] == pytest.approx(0.2)


@pytest.mark.usefixtures("_both_ways")
def test_an_infinite_parameter_leaves_drift_undefined_without_a_word():
    """Infinity less infinity is NaN, and NumPy does not warn of it."""
    same = affine([math.inf, 1], [0, 0])
    assert math.isnan(drift([same], [same])[0, 0])


def test_a_start_is_a_copy():
    """Values taken as a start do not follow the parameters, and belong to no graph."""
    gamma, beta = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(3))
    start = Affine.of(gamma, beta)
    with torch.no_grad():
        gamma.add_(1)
        beta.add_(1)
    assert torch.equal(start.gamma, torch.ones(3))
    assert torch.equal(start.beta, torch.zeros(3))
    assert not start.gamma.requires_grad


def test_a_start_moves_to_a_device():
    """Values taken on one device can be compared on another."""
    moved = affine([1.0, 2.0], [0.0, 0.0]).to(torch.device("meta"))
    assert moved.gamma.device == moved.beta.device == torch.device("meta")


@pytest.mark.usefixtures("_both_ways")
def test_a_different_number_of_layers_is_an_error():
    """Layers are compared one to one; a layer that has none to compare with is no drift of 0."""
    one = affine([1], [0])
    with pytest.raises(ValueError, match="zip"):
        drift([one, one], [one])


def trained(norm, x):
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm(x)


def moments_of_output(norm, y):
    """What γ, β and the batch say of the output."""
    mean, inverse = (x.detach().double().numpy() for x in saved_statistics(y))
    ones, zeros = np.ones(norm.num_features), np.zeros(norm.num_features)
    gamma, beta = (ones, zeros) if norm.weight is None else (x.detach().numpy() for x in (norm.weight, norm.bias))
    (found,) = output_moments(np.stack([mean, inverse, gamma, beta])[None], [norm.eps])
    return found[:2]


SHAPES = [
    pytest.param(torch.nn.BatchNorm1d, (16, 5), id="1d"),
    pytest.param(torch.nn.BatchNorm1d, (16, 5, 3), id="1d, sequence"),
    pytest.param(torch.nn.BatchNorm2d, (4, 5, 6, 6), id="2d"),
    pytest.param(torch.nn.BatchNorm3d, (2, 5, 3, 3, 3), id="3d"),
]


@pytest.mark.parametrize(("make", "shape"), SHAPES)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_batch_statistics_are_read_and_not_computed(make, shape, offset):
    """What lies in the graph is the mean and the biased variance of the batch, as float64 computes them."""
    torch.manual_seed(0)
    x, norm = torch.randn(shape) * 3 + offset, make(5)
    batch = batch_statistics(trained(norm, x), norm.eps)
    dims = [axis for axis in range(x.dim()) if axis != 1]
    torch.testing.assert_close(batch.mean.double(), x.double().mean(dims), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch.var.double(), x.double().var(dims, correction=0), rtol=1e-3, atol=0)
    assert not batch.var.requires_grad


@pytest.mark.parametrize(("make", "shape"), SHAPES)
def test_moments_of_the_output_follow_from_gamma_beta_and_the_batch(make, shape):
    """Mean and spread of the whole output agree with those of its values."""
    torch.manual_seed(0)
    x, norm = torch.randn(shape) * 3, make(5)
    y = trained(norm, x)
    mean, var = moments_of_output(norm, y)
    assert mean == pytest.approx(y.double().mean().item(), abs=1e-5)
    assert var == pytest.approx(y.double().var(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm1d(7, eps=0.1), torch.nn.BatchNorm1d(2, affine=False)])
def test_epsilon_counts_and_a_layer_without_gamma_has_ones(norm):
    """The moments are those of the values, whatever ε is, and without γ and β."""
    y = norm(torch.randn(9, norm.num_features, requires_grad=True))
    expected = [y.double().mean().item(), y.double().var(correction=0).item()]
    assert moments_of_output(norm, y) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_variance_beyond_float32_leaves_a_constant():
    """Values whose variance overflows are put out as β, and NaN in the batch makes the moments NaN."""
    norm = torch.nn.BatchNorm1d(1)
    assert moments_of_output(norm, norm(torch.tensor([[1e25], [-1e25]]))) == (0.0, 0.0)
    assert np.isnan(moments_of_output(norm, norm(torch.tensor([[float("nan")], [1.0]])))).all()


def test_layers_are_told_apart_and_the_spread_of_their_input_is_told():
    """Several layers at once give what each gives alone, and the median over channels of their batch variances."""
    torch.manual_seed(0)
    norms, alone, together = [torch.nn.BatchNorm1d(5, eps=eps) for eps in (1e-5, 0.5)], [], []
    for norm in norms:
        x = torch.randn(16, 5) * torch.tensor([1.0, 2.0, 3.0, 4.0, 1e25])
        y = trained(norm, x)
        alone.append(moments_of_output(norm, y))
        mean, inverse = (part.detach().double().numpy() for part in saved_statistics(y))
        together.append(np.stack([mean, inverse, *(p.detach().double().numpy() for p in (norm.weight, norm.bias))]))
        expected = x.double().var(0, correction=0).median().item()
        (passed,) = output_moments(np.stack(together[-1:]), [norm.eps])
        assert passed.median == pytest.approx(expected, rel=1e-5)
        assert passed[:2] == pytest.approx([y.double().mean().item(), y.double().var(correction=0).item()], rel=1e-4)
    assert [found[:2] for found in output_moments(np.stack(together), [1e-5, 0.5])] == alone


@pytest.mark.parametrize(
    "see",
    [
        pytest.param(lambda norm, x: norm.eval()(x), id="eval mode"),
        pytest.param(lambda norm, x: torch.no_grad()(norm)(x), id="no gradients"),
        pytest.param(lambda norm, x: norm(x) * 1, id="another operation"),
    ],
)
def test_where_the_graph_holds_no_statistics_none_are_given(see):
    """Without a training pass of BatchNorm in the graph there is nothing to read."""
    norm = torch.nn.BatchNorm1d(3)
    assert batch_statistics(see(norm, torch.randn(8, 3)), norm.eps) is None


def test_a_checkpointed_layer_is_not_computed_again():
    """Within hooks on saved tensors nothing is read, as reading would run the layer once more."""
    norm, seen = torch.nn.BatchNorm1d(3), []
    norm.register_forward_hook(lambda module, args, y: seen.append(batch_statistics(y, module.eps)))
    checkpoint(norm, torch.randn(8, 3, requires_grad=True), use_reentrant=False)
    assert seen == [None]
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_running_statistics_give_the_batch_statistics_back(momentum):
    """The difference that one pass makes to the running statistics is the batch."""
    torch.manual_seed(0)
    norm, x = torch.nn.BatchNorm2d(3, momentum=momentum), torch.randn(4, 3, 5, 5) * 2 + 1
    before = Batch(norm.running_mean.clone(), norm.running_var.clone())
    norm(x)
    after = Batch(norm.running_mean, norm.running_var)
    found = batch_statistics_from_running(before, after, factor=momentum, count=100)
    torch.testing.assert_close(found.mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.var, x.var((0, 2, 3), correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("factor", "count"), [(0.0, 8), (0.1, 1)])
def test_running_statistics_that_tell_nothing_are_refused(factor, count):
    """Without weight on the new value, or with one value per channel, the error says what is needed."""
    one = Batch(torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match=f"factor must be positive and count at least 2, got {factor} and {count}"):
        batch_statistics_from_running(one, one, factor=factor, count=count)
