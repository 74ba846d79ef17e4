# SPDX-License-Identifier: Apache-2.0
"""Counts by bin are those of numpy on float64, whatever the dtype, the shape and the device's patience."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from specimens import NoHostRead
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.data_compat import migrate_value
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import histogram_raw

from lightning_bn.stats.histogram import BINS, EDGES, NAN, NEGINF, POSINF, bin_counts, raw_histogram
from lightning_bn.stats.sketch import PIECE

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
NARROW = DTYPES[2:]
BITS = {1: torch.int8, 2: torch.int16}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_numpy(x):
    """The same counts by ``numpy.histogram`` on float64."""
    values = x.double().numpy().ravel()
    binned, _ = np.histogram(values[np.isfinite(values)], bins=np.array(EDGES))
    return [*binned.tolist(), *(int(flag.sum()) for flag in (np.isnan(values), values == np.inf, values == -np.inf))]


def delicate():
    """Every edge and its neighbours in float64 and float32, both zeros, subnormal and extreme values."""
    edges = torch.tensor(EDGES, dtype=torch.float64)
    ends = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    near = [torch.nextafter(edges, end) for end in ends]
    near += [torch.nextafter(edges.float(), end).double() for end in ends.float()]
    more = [
        0.0,
        -0.0,
        1e-40,
        -1e-40,
        1e-310,
        -1e-310,
        3e38,
        -3e38,
        65504.0,
        5e-324,
        math.inf,
        -math.inf,
        math.nan,
        -math.nan,
    ]
    return torch.cat([edges, *near, torch.tensor(more, dtype=torch.float64)])


def logarithmic(number):
    """Values of both signs over forty decades."""
    random = torch.Generator().manual_seed(1)
    return normal(number).double() * 10 ** (torch.rand(number, generator=random).double() * 40 - 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", [pytest.param(delicate(), id="edges"), pytest.param(logarithmic(3000), id="random")])
def test_counts_equal_those_of_numpy(values, dtype):
    """Each bin holds its lower edge and not its upper one, on both sides of 0; every value is counted once."""
    x = values.to(dtype)
    assert bin_counts(x).tolist() == by_numpy(x)
    assert bin_counts(x).sum() == x.numel()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_number_of_a_narrow_dtype_lands_where_numpy_puts_it(dtype):
    """All bit patterns, one by one."""
    width = 8 * dtype.itemsize
    x = torch.arange(-(2 ** (width - 1)), 2 ** (width - 1)).to(BITS[dtype.itemsize]).view(dtype)
    assert bin_counts(x).tolist() == by_numpy(x)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.tensor(-3.0), id="no dimension"),
        pytest.param(torch.empty(0), id="empty"),
        pytest.param(torch.empty(2, 0, 3, dtype=torch.bfloat16), id="empty, several axes"),
        pytest.param(normal(3 * PIECE + 17).relu(), id="several pieces"),
        pytest.param(normal(4, 3, 5, 5).to(memory_format=torch.channels_last), id="channels_last"),
        pytest.param(normal(20, 6)[::3, 1::2], id="strided"),
        pytest.param(normal(7, 1).expand(7, 5), id="expanded"),
        pytest.param(normal(6, 5).requires_grad_(), id="with a graph"),
    ],
)
def test_any_shape_is_binned_and_left_as_it_is(x):
    """Whatever its shape and strides, a tensor is counted in full, and not written to."""
    before = x.detach().clone()
    assert bin_counts(x).tolist() == by_numpy(x.detach())
    assert torch.equal(x.detach(), before)
    assert not bin_counts(x).requires_grad


def test_what_is_not_finite_is_counted_apart():
    """NaN of either sign, +inf and -inf have places of their own, and are in no bin."""
    bad = [math.nan, -math.nan, math.nan, math.inf, math.inf, -math.inf]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        counts = bin_counts(torch.tensor([*bad, 1.0], dtype=dtype))
        assert [int(counts[place]) for place in (NAN, POSINF, NEGINF)] == [3, 2, 1]
        assert int(counts[:BINS].sum()) == 1


def test_zero_has_a_bin_of_its_own():
    """0 and -0 are told from the smallest numbers beside them, also where the processor flushes those to 0."""
    x = torch.tensor([0.0, -0.0, 0.0, 1e-45, -1e-45])
    place = EDGES.index(0.0)
    assert torch.set_flush_denormal(True) or pytest.skip("this processor cannot flush")
    try:
        counts = bin_counts(x)
    finally:
        torch.set_flush_denormal(False)
    assert counts[place - 1 : place + 2].tolist() == [1, 3, 1]


def test_counts_of_parts_add_to_those_of_the_whole():
    """Micro-batches of unequal size, summed, equal the batch."""
    x = logarithmic(1000).float()
    parts = torch.split(x, [1, 499, 0, 500])
    assert torch.equal(sum(map(bin_counts, parts)), bin_counts(x))


@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_is_read_on_the_host(deterministic):
    """Counting waits for no value: it runs on tensors that have none; torch's deterministic mode has no objection."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        with NoHostRead():
            bin_counts(normal(100))
        found = bin_counts(torch.empty(4, 1000, device="meta"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert (found.shape, found.dtype, found.device.type) == ((88,), torch.int64, "meta")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_other_kinds_of_numbers_are_refused(dtype):
    """The error names the dtype."""
    with pytest.raises(TypeError, match=f"x must be of a real floating-point dtype, got {dtype}"):
        bin_counts(torch.zeros(3, dtype=dtype))


def raw_of(x, *, exact=True):
    """What is written for a tensor, with the numbers of its finite values or without any."""
    fine = x[torch.isfinite(x)].double()
    known = {"low": fine.min(), "high": fine.max(), "mean": fine.mean(), "std": fine.std(correction=0)} if exact else {}
    return raw_histogram(bin_counts(x).tolist(), **{name: float(value) for name, value in known.items()})


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(normal(1000), id="normal"),
        pytest.param(normal(1000).relu(), id="behind ReLU"),
        pytest.param(torch.zeros(9), id="all zero"),
        pytest.param(torch.full((9,), -2.0), id="a constant on an edge"),
        pytest.param(torch.tensor([-1e30, 0.0, 1e-30, 1e30]), id="beyond both ends"),
        pytest.param(torch.tensor([1.0, math.nan, math.inf, -math.inf]), id="one finite value"),
        pytest.param(torch.tensor([-1e300, 1e300], dtype=torch.float64), id="beyond float32"),
    ],
)
@pytest.mark.parametrize("exact", [True, False], ids=["moments known", "moments estimated"])
def test_tensorboard_reads_back_what_was_counted(tmp_path, x, exact):
    """Every finite value is in a bucket, buckets are in order and meet, and float32 keeps them apart."""
    raw = raw_of(x, exact=exact)
    with SummaryWriter(tmp_path) as writer:
        writer.add_histogram_raw("activations", **raw, global_step=3)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    (event,) = events.Histograms("activations")
    assert (event.step, event.histogram_value.num) == (3, int(torch.isfinite(x).sum()))
    assert (event.histogram_value.bucket, event.histogram_value.bucket_limit) == (
        raw["bucket_counts"],
        raw["bucket_limits"],
    )
    low, high, counts = buckets(raw).T
    assert counts.sum() == torch.isfinite(x).sum()
    assert np.isfinite([low, high]).all()
    assert (low <= high).all()
    assert (low[1:] == high[:-1]).all()
    assert (np.diff(low) > 0).all()


def buckets(raw):
    """The rows (left, right, count) that TensorBoard makes of a histogram for its pictures."""
    value = migrate_value(histogram_raw("activations", **raw).value[0])
    return np.frombuffer(value.tensor.tensor_content, np.float32).reshape(-1, 3)


def test_the_spike_of_relu_has_a_bucket_of_its_own():
    """Zeros are not mixed with small values: the first bucket holds them alone and has no width to speak of."""
    x = normal(1000).relu()
    left, right, count = buckets(raw_of(x))[0]
    assert (left, count) == (0, int((x == 0).sum()))
    assert right < 1e-44


def test_moments_are_passed_on():
    """Ends, number, sum and sum of squares are those of the values, by a float64 loop."""
    x = normal(1000)
    raw, values = raw_of(x), x.double().tolist()
    assert (raw["min"], raw["max"], raw["num"]) == (min(values), max(values), 1000)
    assert raw["sum"] == pytest.approx(math.fsum(values))
    assert raw["sum_squares"] == pytest.approx(math.fsum(value * value for value in values))


def test_unknown_moments_are_estimated_from_the_bins():
    """With a NaN among the values the others are still drawn: ends to a factor of 2, moments in their order of size."""
    x = normal(1000)
    values, raw = x.double(), raw_of(torch.cat([x, torch.tensor([math.nan])]), exact=False)
    assert raw["num"] == 1000
    assert values.max() <= raw["max"] <= 2 * values.max()
    assert 2 * values.min() <= raw["min"] <= values.min()
    assert raw["sum_squares"] == pytest.approx(float(values.square().sum()), rel=0.4)


def test_only_the_bins_between_the_ends_are_written():
    """Normal values take about fifty of the 85 bins, so that an event stays small; the ends are not empty."""
    raw = raw_of(normal(10_000))
    assert raw["bucket_counts"][0] > 0
    assert raw["bucket_counts"][-1] > 0
    assert len(raw["bucket_counts"]) == len(raw["bucket_limits"]) < 60
    assert all(left < right for left, right in itertools.pairwise(raw["bucket_limits"]))


def test_without_a_finite_value_there_is_no_histogram():
    """TensorBoard could not draw it: nothing is to be written."""
    assert raw_histogram(bin_counts(torch.tensor([math.nan, math.inf])).tolist()) is None
    assert raw_histogram(bin_counts(torch.empty(0)).tolist()) is None


def test_a_wrong_number_of_counts_is_refused():
    """The error says how many are needed."""
    with pytest.raises(ValueError, match="counts must be the 88 numbers of bin_counts, got 3"):
        raw_histogram([1, 2, 3])
