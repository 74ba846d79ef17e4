# SPDX-License-Identifier: Apache-2.0
"""Processes whose BatchNorm layers see different data are told from those that see the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_bn import Severity
from lightning_bn.callbacks.between_ranks import compare
from lightning_bn.callbacks.statistics_watch import StatisticsWatch, of_ranks


def shares(change, *, seed, batch=16, momentum=0.1, steps=200, width=16):
    """What one process has behind ``steps`` batches of normal values."""
    net = nn.Sequential(nn.BatchNorm1d(width, momentum=momentum))
    watch, generator = StatisticsWatch(net, 2), torch.Generator().manual_seed(seed)
    for step in range(steps):
        x = change(torch.randn(batch, width, generator=generator))
        watch.begin_batch()
        net(x)
        watch.end_batch(step)
    return watch.shares()


def same(x):
    return x


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda x: x + 1.0, 0.5, id="mean"),
        pytest.param(lambda x: 0.4 * x, 0.6 / 2 / math.sqrt((1 + 0.16) / 2), id="contrast"),
        pytest.param(lambda x: 0.5 * x + 1.0, math.sqrt(1 + 0.25) / 2 / math.sqrt((1 + 0.25) / 2), id="both"),
    ],
)
def test_the_distance_is_half_of_that_between_two_normal_distributions(change, expected):
    """√((μ − μ′)² + (σ − σ′)²)/2 in standard deviations within a process, of batches and of running statistics."""
    ranks = [shares(same, seed=0, batch=256), shares(change, seed=1, batch=256)]
    (apart,) = compare(ranks).values()
    assert apart.batches == pytest.approx(expected, rel=0.02)
    assert apart.stored == pytest.approx(expected, rel=0.05)
    assert of_ranks(ranks).severity is Severity.WARNING


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("batch", "momentum"), [(2, 0.9), (2, 1.0), (2, 0.1), (16, 0.1), (16, None)])
def test_processes_that_draw_from_the_same_data_are_silent(seed, batch, momentum):
    """Whatever the noise of their batches and of their running averages."""
    ranks = [shares(same, seed=2 * seed + rank, batch=batch, momentum=momentum) for rank in (0, 1)]
    assert of_ranks(ranks) is None


def test_more_than_two_processes_are_measured_from_their_mean():
    """One of four that is off by 1 lies 3/4 from the mean, the others 1/4: √3/4 in the root mean square."""
    ranks = [shares(same, seed=rank, batch=256) for rank in range(3)] + [shares(lambda x: x + 1, seed=3, batch=256)]
    (apart,) = compare(ranks).values()
    assert apart.batches == pytest.approx(math.sqrt(3) / 4, rel=0.02)


def test_a_process_without_anything_leaves_the_others_without_a_verdict():
    """So it is where a monitor failed, where too few batches were heard, and where there is one process."""
    full, other = shares(same, seed=0), shares(lambda x: x + 1, seed=1)
    assert of_ranks([full, other]) is not None
    assert of_ranks([full, None]) is None
    assert of_ranks([full, {}]) is None
    assert of_ranks([full]) is None
    assert shares(same, seed=0, steps=60) == {}


def test_running_statistics_that_are_not_finite_leave_the_batches_to_be_judged():
    """Another rule speaks of them."""
    ranks = [shares(same, seed=0), shares(lambda x: x + 1, seed=1)]
    ranks[1]["0"].stored[3] = math.inf
    assert of_ranks(ranks).rule == "statistics-differ-between-ranks"


def test_a_constant_channel_does_not_count():
    """It has no unit to measure in."""

    def one_constant(x):
        return torch.cat([x[:, :1] * 0 + 7, x[:, 1:]], 1)

    ranks = [shares(same, seed=0, batch=64), shares(one_constant, seed=1, batch=64)]
    assert of_ranks(ranks) is None
