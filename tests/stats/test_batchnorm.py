# SPDX-License-Identifier: Apache-2.0
"""Drift of γ and β is a distance in the unit of the initial γ."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_bn.stats.batchnorm import TINY, Affine, drift, scale_of


def affine(gamma, beta, dtype=torch.float32):
    return Affine(torch.tensor(gamma, dtype=dtype), torch.tensor(beta, dtype=dtype))


def by_hand(now, start):
    """Both distances in Python floats, over the norm of the initial γ."""
    unit = math.hypot(*start.gamma.double().tolist())
    pairs = (now.gamma, start.gamma), (now.beta, start.beta)
    return [math.dist(a.double().tolist(), b.double().tolist()) / unit for a, b in pairs]


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


def test_layers_are_rows_in_the_order_given():
    """Layers of different width give one row each, in order."""
    starts = [affine([1, 2, 2], [0, 0, 0]), affine([0.5], [1])]
    nows = [affine([1, 2, 5], [1, 0, 0]), affine([0.25], [1.5])]
    expected = torch.tensor([by_hand(now, start) for now, start in zip(nows, starts, strict=True)])
    torch.testing.assert_close(drift(nows, starts), expected)


@pytest.mark.parametrize("channels", [1, 4, 9])
def test_a_gamma_that_starts_at_zero_is_measured_in_the_usual_unit(channels):
    """Where γ₀ = 0 on purpose the unit is √C, the norm of γ = 1, so that γ = 1 counts as 100 % and not as inf."""
    start = affine([0.0] * channels, [0.0] * channels)
    now = affine([1.0] * channels, [0.5] * channels)
    torch.testing.assert_close(drift([now], [start]), torch.tensor([[1.0, 0.5]]))


@pytest.mark.parametrize(
    ("size", "unit"),
    [
        pytest.param(2 * TINY, 2 * 2 * TINY, id="just above: its own norm"),
        pytest.param(TINY / 2, 2.0, id="just below: the root of the width"),
    ],
)
def test_the_unit_changes_where_gamma_is_as_good_as_zero(size, unit):
    """A γ₀ above 1e-6 root mean square is measured in its own norm, one below in √C."""
    torch.testing.assert_close(scale_of(torch.full((4,), size)), torch.tensor(unit))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_parameters_of_any_precision_are_compared_in_float32(dtype):
    """Half-precision γ whose squares leave their own range still drift by the right number."""
    start, now = affine([300.0, 400.0], [0.0, 0.0], dtype), affine([300.0, 500.0], [1000.0, 0.0], dtype)
    found = drift([now], [start])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([by_hand(now, start)]))


def test_a_non_finite_parameter_leaves_drift_undefined():
    """A NaN in γ gives NaN for γ and leaves β alone."""
    found = drift([affine([math.nan, 1], [1, 0])], [affine([3, 4], [0, 0])])[0]
    assert math.isnan(found[0])
    assert found[1] == pytest.approx(0.2)


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


def test_a_different_number_of_layers_is_an_error():
    """Layers are compared one to one; a layer that has none to compare with is no drift of 0."""
    one = affine([1], [0])
    with pytest.raises(ValueError, match="zip"):
        drift([one, one], [one])
