# SPDX-License-Identifier: Apache-2.0
"""Non-finite values are counted by kind, on the device, and found by index."""

from __future__ import annotations

import math

import pytest
import torch
from specimens import NoHostRead

from lightning_bn.stats.finite import NOTHING, Census, census, first_bad_index, is_measurable, read

NAN, INF = math.nan, math.inf


def counted(x):
    return read([census(x)])[0]


def by_hand(values):
    """The census of a list of Python floats."""
    finite = [abs(value) for value in values if math.isfinite(value)]
    kinds = sum(map(math.isnan, values)), values.count(INF), values.count(-INF)
    return Census(len(values), *kinds, max(finite, default=0.0))


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([1.0, -2.5, 0.0], id="all finite"),
        pytest.param([NAN, 1.0, NAN], id="NaN"),
        pytest.param([INF, 1.0, -4.0], id="+inf"),
        pytest.param([-INF, -INF, 2.0, -INF], id="-inf"),
        pytest.param([NAN, INF, -INF, -8.0, 0.0, INF, 3.0], id="mixed"),
        pytest.param([NAN, INF], id="nothing finite"),
        pytest.param([], id="empty"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_census_counts_what_a_loop_counts(values, dtype):
    """Count, NaN, +inf, -inf and the largest finite size are those of a Python loop, in every dtype."""
    assert counted(torch.tensor(values, dtype=dtype)) == by_hand(values)


@pytest.mark.parametrize(
    ("x", "largest"),
    [
        pytest.param(torch.tensor([65504.0, INF], dtype=torch.float16), 65504.0, id="float16"),
        pytest.param(torch.tensor([-(2.0**127), INF], dtype=torch.bfloat16), 2.0**127, id="bfloat16"),
        pytest.param(torch.tensor([1e300, 1.0], dtype=torch.float64), 1e300, id="float64"),
    ],
)
def test_the_largest_value_of_a_dtype_is_kept(x, largest):
    """A finite value near the end of its dtype's range stays finite and keeps its size."""
    assert counted(x).largest == largest


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.tensor([complex(NAN, 1), complex(2, -INF), complex(-3, 4)]), id="plain"),
        pytest.param(torch.tensor([complex(NAN, 1), complex(2, INF), complex(-3, 4)]).conj(), id="conjugated view"),
    ],
)
def test_both_parts_of_a_complex_value_are_counted(x):
    """Of three complex values six parts are counted."""
    assert counted(x) == Census(6, 1, 0, 1, 4.0)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.tensor([[1.0, NAN], [INF, 9.0]]).t(), id="transposed"),
        pytest.param(torch.tensor([1.0, 50.0, NAN, 50.0, INF, 50.0, 9.0, 50.0])[::2], id="strided"),
        pytest.param(torch.tensor([1.0, NAN, INF, 9.0]).requires_grad_(), id="inside a graph"),
    ],
)
def test_the_layout_of_a_tensor_does_not_matter(x):
    """A view is counted as what it shows, and no graph is kept."""
    assert counted(x) == Census(4, 1, 1, 0, 9.0)
    assert not census(x).requires_grad


@pytest.mark.parametrize(
    ("values", "level"),
    [
        pytest.param([1.0], 0, id="finite"),
        pytest.param([], 0, id="empty"),
        pytest.param([-INF, 1.0], 1, id="-inf alone"),
        pytest.param([INF], 2, id="+inf"),
        pytest.param([NAN], 2, id="NaN"),
        pytest.param([-INF, NAN], 2, id="-inf and NaN"),
    ],
)
def test_the_level_tells_masks_from_faults(values, level):
    """NaN and +inf are level 2, -inf alone is level 1, and only level 0 is finite."""
    found = counted(torch.tensor(values))
    assert found.level == level
    assert found.is_finite is (level == 0)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        pytest.param(Census(4, 0, 0, 0, 1.0), "all 4 values are finite", id="finite"),
        pytest.param(Census(4, 1, 0, 0, 1.0), "1 of 4 values are NaN", id="NaN"),
        pytest.param(
            Census(9, 1, 2, 3, 1.0),
            "1 of 9 values are NaN, 2 of 9 values are +inf, 3 of 9 values are -inf",
            id="every kind",
        ),
    ],
)
def test_a_census_describes_itself_in_words(found, words):
    """The description names every kind there is, with its number and the total."""
    assert found.describe() == words


def test_censuses_add():
    """The sum of two censuses is the census of both tensors together."""
    a, b = [1.0, NAN, -7.0], [INF, -INF, 2.0]
    assert counted(torch.tensor(a)) + counted(torch.tensor(b)) == by_hand(a + b)


def test_adding_nothing_changes_nothing():
    """The empty census is the identity of addition."""
    found = Census(3, 1, 0, 1, 0.5)
    assert found + NOTHING == NOTHING + found == found


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        pytest.param(torch.ones(1), True, id="float"),
        pytest.param(torch.ones(1).bfloat16(), True, id="bfloat16"),
        pytest.param(torch.ones(1, dtype=torch.complex64), True, id="complex"),
        pytest.param(torch.ones(0), True, id="empty"),
        pytest.param(torch.ones(1, dtype=torch.int64), False, id="int"),
        pytest.param(torch.ones(1, dtype=torch.bool), False, id="bool"),
        pytest.param(torch.ones(2, 2).to_sparse(), False, id="sparse"),
        pytest.param(torch.ones(1, device="meta"), False, id="meta"),
    ],
)
def test_only_dense_floating_point_with_memory_is_measurable(x, expected):
    """Integers, sparse tensors and tensors without memory cannot be counted; all others can."""
    assert is_measurable(x) is expected


def test_reading_keeps_the_order():
    """Rows come back in the order in which they were given."""
    rows = [census(torch.full((size,), NAN)) for size in (3, 1, 2)]
    assert [found.nan for found in read(rows)] == [3, 1, 2]


def test_reading_nothing_gives_nothing():
    """No rows make an empty list."""
    assert read([]) == []


def test_counts_are_kept_in_float64():
    """The row is float64 even of half-precision values: float32 cannot hold every count above 2**24."""
    assert census(torch.ones(1, dtype=torch.float16)).dtype == torch.float64


def test_nothing_is_read_on_the_host():
    """Counting queues work on the device and waits for nothing."""
    with NoHostRead():
        rows = [census(x) for x in (torch.ones(3), torch.tensor([NAN]), torch.empty(0), torch.ones(2).half())]
    assert [row[0].item() for row in rows] == [3, 1, 0, 2]


def test_the_watch_for_host_reads_catches_one():
    """The watch used above sees a planted read."""
    with NoHostRead(), pytest.raises(AssertionError, match="read on the host"):
        torch.ones(1).item()


def test_counting_works_without_memory():
    """On the meta device, where there is nothing to read, the row has its shape."""
    assert census(torch.empty(3, 4, device="meta")).shape == (5,)


@pytest.mark.parametrize(
    ("x", "index"),
    [
        pytest.param(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None, id="all finite"),
        pytest.param(torch.empty(0, 3), None, id="empty"),
        pytest.param(torch.tensor([[1.0, 2.0], [NAN, INF]]), (1, 0), id="first in its row"),
        pytest.param(torch.tensor([[1.0, -INF], [NAN, 4.0]]), (1, 0), id="NaN before an earlier -inf"),
        pytest.param(torch.tensor([[1.0, -INF], [2.0, -INF]]), (0, 1), id="-inf alone"),
        pytest.param(torch.tensor(NAN), (), id="0-dim"),
        pytest.param(torch.tensor(1.0), None, id="0-dim and finite"),
        pytest.param(torch.tensor([1 + 1j, complex(0, NAN)]), (1,), id="complex"),
        pytest.param(torch.tensor([[1.0, 2.0], [NAN, 4.0]]).t(), (0, 1), id="transposed view"),
    ],
)
def test_the_first_bad_index_is_the_first_in_row_major_order(x, index):
    """The index of the first value that is not finite, or None."""
    assert first_bad_index(x) == index
