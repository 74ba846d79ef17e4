# SPDX-License-Identifier: Apache-2.0
"""The cheap sums say what a float64 loop says, or that they do not know."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from specimens import NoHostRead

from lightning_bn.stats.moments import moments, pool, summarize
from lightning_bn.stats.sketch import PIECE, complete_sketches, flatten, sketch
from lightning_bn.stats.slots import COLUMNS, GROWTH, Slots


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def summary(x):
    slots = Slots(x.device)
    sizes = sketch(x, slots)
    sums = torch.cat(slots.taken()).double().view(-1, COLUMNS).numpy()
    return summarize(pool(complete_sketches(sums, np.array(sizes, dtype=float)), [0] * len(sizes), 1)[0])


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(normal(500), id="normal"),
        pytest.param(normal(500).relu(), id="half of the values are zero"),
        pytest.param(normal(500) + 2, id="a mean of two standard deviations"),
        pytest.param(normal(500) * 1e-10, id="small"),
        pytest.param(normal(500) * 1e10, id="large"),
        pytest.param(normal(3 * PIECE + 17).relu(), id="several pieces"),
        pytest.param(torch.zeros(9), id="all zero"),
        pytest.param(normal(4, 3, 5, 5).to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(normal(20, 6)[::3, 1::2], id="strided"),
        pytest.param(normal(7, 1).expand(7, 5), id="expanded"),
    ],
)
def test_the_cheap_sums_equal_the_careful_ones(x):
    """Count, range and zeros agree exactly with the careful measurement, mean and spread to 1e-5."""
    found, expected = summary(x), summarize(moments(x))
    assert (found.count, found.low, found.high, found.zero_share, found.nonfinite) == (
        expected.count,
        expected.low,
        expected.high,
        expected.zero_share,
        0,
    )
    assert found.mean == pytest.approx(expected.mean, rel=0, abs=1e-5 * expected.std)
    assert found.std == pytest.approx(expected.std, rel=1e-5, abs=0)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(normal(500) + 1e4, id="mean of 1e4 standard deviations"),
        pytest.param(torch.full((PIECE,), 0.1), id="constant"),
        pytest.param(normal(500) * 1e-20, id="squares underflow"),
        pytest.param(normal(500) * 1e25, id="squares overflow"),
    ],
)
def test_a_spread_that_the_sums_would_lose_is_not_claimed(x):
    """Where the difference of sums keeps too few digits the spread is NaN, and the range is still known."""
    found = summary(x)
    assert math.isnan(found.std)
    assert (found.low, found.high) == (x.min().item(), x.max().item())
    assert found.is_finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_value_is_seen(bad):
    """One NaN or infinity makes the row say that it is not finite, and that nobody counted."""
    x = normal(50)
    x[7] = bad
    assert not summary(x).is_finite
    assert math.isnan(summary(x).nonfinite)


def test_an_empty_tensor_has_no_pieces():
    """Without values there is nothing to sum."""
    slots = Slots(torch.device("cpu"))
    assert sketch(torch.empty(0, 3), slots) == slots.taken() == []


def test_nothing_is_copied_where_memory_has_no_gaps():
    """Flattening a dense tensor, in whatever order its axes lie, shares its memory."""
    x = normal(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert flatten(x).data_ptr() == x.data_ptr()
    assert flatten(x.contiguous().transpose(1, 2)).shape == (120,)


def test_nothing_is_read_on_the_host():
    """Sketching queues work on the device and waits for nothing."""
    x, slots = normal(2 * PIECE), Slots(torch.device("cpu"))
    with NoHostRead():
        sizes = sketch(x, slots)
    assert sizes == [PIECE, PIECE]


def test_slots_give_back_what_was_written_in_order():
    """Rows of several buffers come one after the other, and only those that were taken."""
    slots = Slots(torch.device("cpu"))
    for number in range(GROWTH + 3):
        for place in slots.row():
            place.fill_(number)
    found = torch.cat(slots.taken()).view(-1, COLUMNS)
    assert len(slots) == len(found) == GROWTH + 3
    assert found[:, -1].tolist() == list(range(GROWTH + 3))


def test_slots_are_used_again():
    """After a clear the same memory is given out, so that nothing grows from step to step."""
    slots = Slots(torch.device("cpu"))
    first = [slots.row()[0].data_ptr() for _ in range(3)]
    slots.clear()
    assert slots.taken() == []
    assert [slots.row()[0].data_ptr() for _ in range(3)] == first


def test_slots_that_were_made_in_inference_mode_can_be_written_outside_of_it():
    """A first look within inference mode does not bind later ones to it."""
    slots = Slots(torch.device("cpu"))
    with torch.inference_mode():
        sketch(normal(5), slots)
    assert sketch(normal(5), slots) == [5]
