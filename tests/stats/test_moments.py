# SPDX-License-Identifier: Apache-2.0
"""Mean, spread, range, zero share and non-finite values agree with a float64 loop, whole or pooled."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from specimens import NoHostRead

from lightning_bn.stats.moments import (
    MEASURED,
    NONFINITE,
    Summary,
    blank,
    complete,
    measure,
    moments,
    pool,
    summarize,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pooled(*rows):
    """The state of all rows together."""
    return pool(np.stack(rows), [0] * len(rows), 1)[0]


def by_hand(x):
    """The summary of finite values, from correctly rounded float64 sums."""
    values = x.detach().double().flatten().tolist()
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    zero_share = sum(value == 0 for value in values) / len(values)
    spread, absmax = math.sqrt(variance), max(map(abs, values))
    return Summary(len(values), mean, spread, absmax, zero_share, min(values), max(values), nonfinite=0)


def assert_agree(found, expected, rel=1e-6):
    """Spread to a relative, mean to a part of the spread; count, range and zero share exactly."""
    assert found.count == expected.count
    assert found.mean == pytest.approx(expected.mean, rel=0, abs=rel * expected.std)
    assert found.std == pytest.approx(expected.std, rel=rel, abs=0)
    assert (found.absmax, found.low, found.high) == (expected.absmax, expected.low, expected.high)
    assert found.zero_share == expected.zero_share
    assert found.nonfinite == expected.nonfinite


@pytest.mark.parametrize(
    ("x", "rel"),
    [
        pytest.param(normal(500), 1e-6, id="normal"),
        pytest.param(normal(500) + 1e4, 1e-6, id="mean is 1e4 standard deviations"),
        pytest.param(normal(500) - 1e4, 1e-6, id="negative mean"),
        pytest.param(normal(500) * 3e37, 1e-6, id="near the largest float32"),
        pytest.param(torch.tensor([3.4e38, -3.4e38, 3.3e38]), 1e-6, id="sum overflows float32"),
        pytest.param(normal(500) * 1e-41, 1e-6, id="subnormal"),
        pytest.param(torch.tensor([0.0, 1.4e-45]), 1e-6, id="smallest subnormal"),
        pytest.param(normal(500) * 1e-25, 1e-6, id="squares underflow float32"),
        pytest.param(normal(500).half(), 1e-6, id="float16"),
        pytest.param(normal(500).half() * 1e4, 1e-6, id="float16, squares overflow"),
        pytest.param(normal(500).bfloat16() + 100, 1e-6, id="bfloat16, with an offset"),
        pytest.param(normal(500).double() + 1e6, 1e-9, id="float64, with an offset"),
        pytest.param(normal(500).double() * 1e100, 1e-12, id="float64, beyond float32"),
        pytest.param(normal(500).relu(), 1e-6, id="half of the values are zero"),
    ],
)
def test_a_row_says_what_a_float64_loop_says(x, rel):
    """Every statistic equals that of a float64 loop, whatever the scale, the offset and the dtype."""
    assert_agree(summarize(moments(x)), by_hand(x), rel)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(normal(2, 3, 4, 5).to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(normal(6, 7).t(), id="transposed"),
        pytest.param(normal(20, 6)[::3, 1::2], id="strided"),
        pytest.param(normal(7, 1).expand(7, 5), id="expanded"),
    ],
)
def test_the_memory_layout_does_not_matter(x):
    """A view that is not contiguous is measured as what it shows."""
    assert_agree(summarize(moments(x)), by_hand(x))


@pytest.mark.parametrize("value", [pytest.param(-3.0, id="negative"), pytest.param(0.1, id="no binary fraction")])
@pytest.mark.parametrize("shape", [pytest.param((), id="0-dim"), pytest.param((9,), id="vector")])
def test_a_constant_has_no_spread(value, shape):
    """Equal values have exactly the standard deviation 0 and their own mean."""
    x = torch.full(shape, value)
    own = x.double().flatten()[0].item()
    assert summarize(moments(x)) == Summary(x.numel(), own, 0.0, abs(own), 0.0, own, own, nonfinite=0)


@pytest.mark.parametrize("shape", [pytest.param((0,), id="vector"), pytest.param((3, 0, 2), id="batch")])
def test_an_empty_tensor_leaves_everything_undefined(shape):
    """Without values the count is 0 and every statistic NaN."""
    found = summarize(moments(torch.empty(shape)))
    assert (found.count, found.nonfinite) == (0, 0)
    assert all(map(math.isnan, (found.mean, found.std, found.absmax, found.zero_share)))


def test_an_inference_tensor_is_measured_outside_of_inference_mode():
    """A tensor made under inference mode can be measured where gradients are on."""
    with torch.inference_mode():
        x = normal(50)
    assert_agree(summarize(moments(x)), by_hand(x))


def test_a_tensor_is_measured_inside_inference_mode():
    """Inference mode changes no number."""
    x = normal(50)
    with torch.inference_mode():
        found = summarize(moments(x))
    assert_agree(found, by_hand(x))


def test_no_graph_is_kept():
    """What is measured of a tensor inside a graph belongs to no graph."""
    x = (normal(10).requires_grad_() * 2).exp()
    row = measure(x)
    assert x.requires_grad
    assert not row.requires_grad
    assert row.grad_fn is None


def test_the_measured_tensor_is_left_as_it_is():
    """Measuring writes nothing into the tensor and gradients still flow through it."""
    x = normal(10).requires_grad_()
    y = x * 2
    before = y.detach().clone()
    moments(y)
    y.sum().backward()
    assert torch.equal(y, before)
    assert torch.equal(x.grad, torch.full((10,), 2.0))


@pytest.mark.parametrize(
    ("values", "share"),
    [
        pytest.param([1.0, -2.0, 3.0], 0.0, id="none"),
        pytest.param([0.0, 1.0, 0.0, -1.0], 0.5, id="half"),
        pytest.param([0.0, 0.0], 1.0, id="all"),
        pytest.param([-0.0, 1.0], 0.5, id="minus zero is zero"),
        pytest.param([1.4e-45, 0.0], 0.5, id="the smallest subnormal is not zero"),
    ],
)
def test_zero_share_counts_exact_zeros(values, share):
    """The zero share is the number of values that equal 0, over the number of values."""
    assert summarize(moments(torch.tensor(values))).zero_share == share


@pytest.mark.parametrize("other", [0.0, 1.0, math.inf, -math.inf])
def test_nan_leaves_everything_undefined(other):
    """With a NaN among the values every statistic is NaN, not 0 and not that of the rest."""
    found = summarize(moments(torch.tensor([other, math.nan, 0.0])))
    assert found.count == 3
    assert all(map(math.isnan, (found.mean, found.std, found.absmax, found.zero_share)))


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_infinity_leaves_range_and_zero_share_known(infinity):
    """With an infinity the range is infinite, the zero share is known, mean and spread are undefined."""
    found = summarize(moments(torch.tensor([infinity, 0.0, 1.0, 2.0])))
    assert (found.absmax, found.zero_share) == (math.inf, 0.25)
    assert math.isnan(found.mean)
    assert math.isnan(found.std)


def spoilt(x, *bad):
    """The tensor with some values in its middle replaced."""
    flat = x.clone().reshape(-1)
    flat[3 : 3 + len(bad)] = torch.tensor(bad, dtype=x.dtype)
    return flat.reshape(x.shape)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(normal(50), id="none"),
        pytest.param(spoilt(normal(50), NAN), id="NaN"),
        pytest.param(spoilt(normal(50), INF, -INF), id="both infinities"),
        pytest.param(spoilt(normal(50), NAN, INF, 0.0, NAN, -INF), id="NaN, infinities and a zero"),
        pytest.param(torch.full((50,), NAN), id="all NaN"),
        pytest.param(torch.full((), INF), id="0-dim"),
        pytest.param(spoilt(normal(50) * 3e38, 3.4e38), id="overflowed, and the largest finite values"),
        pytest.param(spoilt(normal(50).double() * 1e300, NAN), id="float64, beyond float32"),
        pytest.param(spoilt((normal(50) * 3e4).half(), NAN), id="float16, in part overflowed"),
        pytest.param(spoilt(normal(50).bfloat16(), -INF), id="bfloat16"),
        pytest.param(spoilt(normal(4, 3, 5, 5), NAN, INF).to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(spoilt(normal(7, 1), NAN).expand(7, 5), id="expanded"),
    ],
)
def test_values_that_are_not_finite_are_counted_exactly(x):
    """The number of NaN and infinities is that of ``torch.isfinite``, in any dtype, layout and company."""
    assert summarize(moments(x)).nonfinite == int((~torch.isfinite(x)).sum())


@pytest.mark.slow
def test_a_count_beyond_what_float32_holds_is_exact():
    """One more than 2**24 values that are not finite are that many."""
    x = torch.full((2**24 + 4,), NAN)
    x[:3] = 1.0
    assert summarize(moments(x)).nonfinite == 2**24 + 1


def test_counts_of_values_that_are_not_finite_add():
    """Three of one part and two of another are five of the whole; where one part was not counted nobody knows."""
    a, b = moments(spoilt(normal(50), NAN, INF, NAN)), moments(spoilt(normal(9), INF, -INF))
    assert summarize(pooled(a, b, moments(normal(4)))).nonfinite == 5
    unknown = a.copy()
    unknown[NONFINITE] = NAN
    assert math.isnan(summarize(pooled(b, unknown)).nonfinite)


@pytest.mark.parametrize(("count", "finite"), [(0.0, True), (1.0, False), (NAN, False)])
def test_where_the_range_is_not_known_the_count_tells_whether_a_layer_is_finite(count, finite):
    """A layer that was asked and not measured is finite if no value is known to be otherwise."""
    row = summarize([4.0, 0.0, 1.0, INF, -INF, 0.0, 0.0, count])
    assert (row.ranged, row.is_finite) == (False, finite)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([normal(3), normal(200, seed=1)], id="unequal sizes"),
        pytest.param([normal(50) + 1e4, normal(70, seed=1) - 1e4], id="distant means"),
        pytest.param([normal(40) * 1e30, normal(5, seed=1) * 1e-30], id="distant scales"),
        pytest.param([normal(40).half(), normal(5, seed=1).double()], id="different dtypes"),
        pytest.param([normal(30).relu(), torch.zeros(4), normal(9, seed=1)], id="zeros in some parts"),
        pytest.param([normal(1), normal(1, seed=1), normal(9, seed=2), normal(40, seed=3)], id="four parts"),
    ],
)
def test_pooled_parts_equal_the_whole(parts):
    """The pool of unequal parts says what a float64 loop over all their values says."""
    row = pooled(*map(moments, parts))
    assert_agree(summarize(row), by_hand(torch.cat([part.double() for part in parts])))


def test_pooling_is_associative():
    """Whether the first or the last two of three are pooled first makes no difference beyond rounding."""
    a, b, c = moments(normal(3)), moments(normal(40, seed=1) + 100), moments(normal(11, seed=2) * 50)
    np.testing.assert_allclose(pooled(pooled(a, b), c), pooled(a, pooled(b, c)), rtol=1e-12)
    np.testing.assert_allclose(pooled(a, b, c), pooled(a, pooled(b, c)), rtol=1e-12)


def test_pooling_is_commutative():
    """Which of two comes first makes no difference beyond rounding."""
    a, b = moments(normal(3)), moments(normal(40, seed=1) + 100)
    np.testing.assert_allclose(pooled(a, b), pooled(b, a), rtol=1e-12)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(normal(30) + 5, id="values"),
        pytest.param(torch.empty(0), id="no values"),
        pytest.param(torch.tensor([math.nan, 1.0]), id="NaN"),
        pytest.param(torch.tensor([math.inf, 1.0]), id="inf"),
    ],
)
def test_pooling_with_the_blank_state_changes_nothing(x):
    """The blank state is the identity of pooling, from either side."""
    row, none = moments(x), blank(1)[0]
    np.testing.assert_allclose(pooled(row, none), row, rtol=1e-15)
    np.testing.assert_allclose(pooled(none, row), row, rtol=1e-15)


def test_nan_survives_pooling():
    """A NaN in one of two parts leaves the pool undefined, apart from its count."""
    found = summarize(pooled(moments(normal(5)), moments(torch.tensor([math.nan]))))
    assert found.count == 6
    assert all(map(math.isnan, (found.mean, found.std, found.absmax, found.zero_share)))


def test_rows_pool_side_by_side():
    """States of several layers pool layer by layer, no layer sees another, and one without rows stays blank."""
    a, b, c, d = (moments(normal(size, seed=size)) for size in (3, 5, 7, 9))
    found = pool(np.stack([a, b, c, d]), [0, 2, 0, 2], 3)
    np.testing.assert_array_equal(found, np.stack([pooled(a, c), blank(1)[0], pooled(b, d)]))


def test_single_rows_are_put_in_their_places():
    """Where no layer has two rows, they are those that were given, to the last bit."""
    a, b = moments(normal(3)), moments(torch.tensor([math.nan, 1.0]))
    np.testing.assert_array_equal(pool(np.stack([a, b]), [2, 0], 3), np.stack([b, blank(1)[0], a]))


def test_nothing_is_read_on_the_host():
    """Measuring queues work on the device and waits for nothing."""
    x = normal(20)
    with NoHostRead():
        measured = torch.stack([measure(x), measure(x.half())])
    assert pool(complete(measured.double().numpy(), np.array([20.0, 20.0])), [0, 0], 1)[0, 0] == 40


def test_the_watch_for_host_reads_catches_one():
    """The watch used above sees a planted read."""
    with NoHostRead(), pytest.raises(AssertionError, match="read on the host"):
        normal(1).item()


def test_measuring_works_without_memory():
    """On the meta device, where there is nothing to read, the numbers have their shape."""
    measured = measure(torch.empty(4, 5, device="meta"))
    assert (measured.shape, measured.dtype) == ((MEASURED,), torch.float32)


@pytest.mark.parametrize(
    ("m2", "std"),
    [
        pytest.param(8.0, 2.0, id="positive"),
        pytest.param(0.0, 0.0, id="zero"),
        pytest.param(-1e-30, 0.0, id="just below zero by rounding"),
        pytest.param(math.inf, math.inf, id="infinite"),
    ],
)
def test_the_standard_deviation_is_the_root_of_the_mean_square(m2, std):
    """The biased standard deviation is √(m2 / count), and a rounding error below 0 counts as 0."""
    assert summarize([2.0, 1.0, m2, 1.0, 1.0, 0.0, 2.0, 0.0]).std == std
