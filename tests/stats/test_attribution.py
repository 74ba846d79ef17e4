# SPDX-License-Identifier: Apache-2.0
"""Changes of a loss are judged in pairs, shares follow Shapley, and noise is told by how much a deviation varies."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from lightning_bn.stats.attribution import Losses, change, effective_samples


def test_a_change_is_weighted_by_samples():
    """The mean losses are those over all samples, whatever the sizes of the batches."""
    found = change([1.0, 3.0], [2.0, 3.0], [30, 10])
    assert (found.before, found.after) == (1.5, 2.25)
    assert found.relative == pytest.approx(0.5)


def tail(t, freedom):
    """Probability that Student's t is above a value, by numerical integration of its density."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    x = np.linspace(0, t, 200_001)
    density = scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    return 0.5 - float(np.trapezoid(density, x))


@pytest.mark.parametrize("count", [5, 10, 32, 200])
@pytest.mark.parametrize("shift", [0.5, 1.0, 1.5])
def test_z_is_as_improbable_as_students_t(count, shift):
    """Its probability under the normal distribution is that of t under Student's with n − 1 degrees of freedom."""
    noise = np.linspace(-1, 1, count)
    losses = np.ones(count)
    found = change(losses, losses + shift + noise, [8] * count)
    t = shift / (noise.std(ddof=1) / math.sqrt(count))
    expected = tail(t, count - 1)
    assert NormalDist().cdf(-found.z) == pytest.approx(expected, rel=0.1) or expected < 1e-9


@pytest.mark.parametrize(
    ("before", "after", "z"),
    [
        pytest.param([1.0, 2.0], [1.0, 2.0], 0.0, id="nothing changed"),
        pytest.param([1.0], [2.0], 0.0, id="one batch"),
        pytest.param([1.0, 2.0], [1.5, 2.5], math.inf, id="all alike"),
        pytest.param([1.5, 2.5], [1.0, 2.0], -math.inf, id="all alike, down"),
    ],
)
def test_the_ends_of_certainty(before, after, z):
    """Without a change, or with one batch, nothing is sure; a change that is the same everywhere is."""
    assert change(before, after, [4] * len(before)).z == z


def test_a_loss_that_is_not_finite_leaves_everything_undefined():
    """NaN in one batch is no certainty of anything."""
    found = change([1.0, 1.0, 1.0], [1.0, math.nan, 2.0], [1, 1, 1])
    assert math.isnan(found.z)
    assert math.isnan(found.relative)


def losses(**values):
    given = {"stored": 1.0, "as_trained": 1.0, "now": 2.0, "best": 1.0, **values}
    both = {name: None if value is None else [value, value] for name, value in given.items()}
    return Losses(sizes=[10, 10], **both)


def test_statistics_are_lag_and_mismatch_together():
    """The loss by running statistics over that by estimated ones is the product of both parts, where both are known."""
    known, unknown = losses(stored=3.0, as_trained=2.5), losses(stored=3.0, as_trained=None)
    assert known.statistics == unknown.statistics
    assert known.statistics.relative == pytest.approx(0.5)
    assert (1 + known.lag.relative) * (1 + known.mismatch.relative) == pytest.approx(1.5)
    assert (unknown.lag, unknown.mismatch) == (None, None)


def test_shares_are_those_of_two_players():
    """γ and β moved first carry (1.2 - 1)/1 of the rise, moved last (2 - 1.5)/1."""
    assert losses(first=1.2, last=1.5).shares == pytest.approx((0.2, 0.5))


def test_shares_of_both_players_add_up_to_the_rise():
    """What γ and β carry on average and what the other weights carry on average is the whole rise."""
    ours = losses(first=1.3, last=1.6)
    theirs = losses(first=1.6, last=1.3)
    assert sum(ours.shares) / 2 + sum(theirs.shares) / 2 == pytest.approx(1.0)


@pytest.mark.parametrize("values", [{}, {"first": 1.0}, {"now": 0.9, "first": 1.0, "last": 1.0}])
def test_without_a_rise_or_a_mixture_there_is_no_share(values):
    """A share of nothing is not printed, as it would be any number."""
    assert losses(**values).shares is None


def pairs_of(size, channels, pairs, *, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * pairs, size, channels, generator=generator, dtype=torch.float64) * spread
    s = x.var(1, correction=0).sqrt()
    first, second = s[::2], s[1::2]
    return (first - second).square().sum(0).numpy(), ((first + second) / 2).sum(0).numpy()


@pytest.mark.parametrize("size", [4, 8, 16, 64])
@pytest.mark.parametrize("pairs", [8, 64])
def test_independent_normal_values_count_as_many_as_there_are(size, pairs):
    """Of m independent normal values m_eff is about m, with few pairs and with many."""
    assert effective_samples(*pairs_of(size, 256, pairs), pairs) == pytest.approx(size, rel=0.15)


def test_two_values_are_about_two():
    """The smallest batch: m_eff is 1.9, as the meter is not exact so far from normal."""
    assert effective_samples(*pairs_of(2, 256, 64), 64) == pytest.approx(1.9, abs=0.1)


def test_a_drift_of_the_scale_is_no_noise():
    """Where the deviation grows tenfold over the steps m_eff stays, as pairs are taken step by step."""
    growth = torch.logspace(0, 1, 64, dtype=torch.float64).repeat_interleave(2)[:, None, None]
    steady, moving = pairs_of(16, 256, 64), pairs_of(16, 256, 64, spread=growth)
    assert effective_samples(*moving, 64) == pytest.approx(effective_samples(*steady, 64), rel=0.6)


def test_constant_channels_do_not_count():
    """A channel with mean 0, which was constant, changes nothing; without any other m_eff is not known."""
    apart, middle = pairs_of(16, 64, 32)
    more = np.concatenate([apart, np.zeros(100)]), np.concatenate([middle, np.zeros(100)])
    assert effective_samples(*more, 32) == effective_samples(apart, middle, 32)
    assert math.isnan(effective_samples(np.zeros(3), np.zeros(3), 32))


def test_values_that_never_vary_are_infinitely_many():
    """The same deviation in every batch has no noise."""
    assert effective_samples(np.zeros(3), np.ones(3), 8) == math.inf
