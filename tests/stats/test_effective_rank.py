# SPDX-License-Identifier: Apache-2.0
"""The participation ratio says what the eigenvalues of a float64 covariance say, at a bounded cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from specimens import NoHostRead

from lightning_bn.stats.effective_rank import SAMPLES, WORK, _samples, participation_ratio, samples_of


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_eigenvalues(x, axis):
    """(Σ λ)² / Σ λ² of the float64 covariance over all samples."""
    rows = np.moveaxis(x.double().numpy(), axis, -1).reshape(-1, x.shape[axis])
    values = np.linalg.eigvalsh(np.cov(rows, rowvar=False, bias=True))
    return values.sum() ** 2 / (values**2).sum()


STEEP = torch.linspace(0.01, 3, 20)


@pytest.mark.parametrize(
    ("x", "axis"),
    [
        pytest.param(normal(300, 20), 1, id="more samples than channels"),
        pytest.param(normal(12, 40), 1, id="fewer samples than channels"),
        pytest.param(normal(20, 20), -1, id="as many"),
        pytest.param(normal(300, 20) * STEEP, -1, id="channels of different size"),
        pytest.param(normal(300, 3) @ normal(3, 20, seed=1), 1, id="three directions"),
        pytest.param(normal(8, 20, 6, 5), 1, id="channels first"),
        pytest.param(normal(8, 6, 20) * STEEP, -1, id="channels last"),
        pytest.param(normal(8, 20, 6, 5).to(memory_format=torch.channels_last), 1, id="channels_last in memory"),
        pytest.param(normal(40, 20)[::2, ::3], 1, id="strided"),
        pytest.param(normal(300, 20).relu(), 1, id="behind a ReLU"),
        pytest.param(normal(300, 20) * STEEP + 1e4, 1, id="offset of 1e4"),
        pytest.param(normal(300, 20) * STEEP + torch.logspace(-3, 6, 20), 1, id="a different offset for each channel"),
        pytest.param(normal(300, 20) * 1e37, 1, id="near the largest float32"),
        pytest.param(normal(300, 20) * 1e-35, 1, id="near the smallest float32"),
        pytest.param(normal(300, 20).half(), 1, id="float16"),
        pytest.param(normal(300, 20).bfloat16() + 100, 1, id="bfloat16, with an offset"),
        pytest.param(normal(300, 20).double() * STEEP.double() + 1e9, 1, id="float64, with an offset"),
        pytest.param(normal(300, 1), 1, id="one channel"),
        pytest.param(normal(2, 20), 1, id="two samples"),
    ],
)
def test_it_agrees_with_the_eigenvalues_of_a_float64_covariance(x, axis):
    """Whatever the layout, the scale, the offset and the dtype; never below 1 nor above min(C, samples - 1)."""
    found = participation_ratio(x, axis)
    assert (found.shape, found.dtype) == ((), torch.float32)
    if x.shape[axis] == 1:
        assert found.item() == pytest.approx(1.0)
        return
    assert found.item() == pytest.approx(by_eigenvalues(x, axis), rel=2e-5)
    samples = x.numel() // x.shape[axis]
    assert 1 - 1e-6 <= found.item() <= min(x.shape[axis], samples - 1) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("weights", "ratio"),
    [
        pytest.param([1.0, 0.0, 0.0, 0.0], 1.0, id="one direction"),
        pytest.param([1.0, 1.0, 0.0, 0.0], 2.0, id="two"),
        pytest.param([1.0, 1.0, 1.0, 1.0], 4.0, id="all alike"),
        pytest.param([2.0, 1.0, 1.0, 0.0], 2.0, id="one of twice the deviation: 6² / (4² + 1 + 1)"),
    ],
)
def test_it_is_the_number_of_directions_that_vary_alike(weights, ratio):
    """With variances λ it is (Σ λ)² / Σ λ², also where the directions are turned against the channels."""
    signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    samples = torch.cat([signs, -signs]) * torch.tensor(weights)  # every channel is ±weight, and none goes with another
    turned = samples @ torch.linalg.qr(normal(4, 4))[0]
    assert participation_ratio(samples, 1).item() == pytest.approx(ratio, rel=1e-6)
    assert participation_ratio(turned, 1).item() == pytest.approx(ratio, rel=1e-5)


def test_a_mean_is_no_direction():
    """What all samples share does not count: the samples are centred."""
    x = normal(300, 20)
    assert participation_ratio(x + 50, 1).item() == pytest.approx(participation_ratio(x, 1).item(), rel=1e-4)


def test_few_samples_look_poorer_by_the_rule_that_is_written_down():
    """Of n independent samples of a normal distribution whose own ratio is r about r·n/(n + r) is seen."""
    for samples, channels in ((64, 64), (200, 50), (50, 200)):
        found = participation_ratio(normal(samples, channels), 1).item()
        assert found == pytest.approx(samples * channels / (samples + channels), rel=0.05)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.zeros(40, 7), id="zeros"),
        pytest.param(torch.full((40, 7), 0.1), id="a constant"),
        pytest.param(torch.linspace(-7, 1e5, 7).expand(40, 7), id="a constant for each channel"),
        pytest.param(normal(1, 7), id="one sample"),
        pytest.param(torch.empty(0, 7), id="no sample"),
        pytest.param(torch.empty(7, 0), id="no channel"),
    ],
)
def test_where_nothing_varies_there_is_no_rank(x):
    """NaN, not 0 or 1, and not what rounding leaves."""
    assert math.isnan(participation_ratio(x, 1).item())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_leaves_it_undefined(bad):
    """One NaN or infinity anywhere makes it NaN."""
    x = normal(30, 7)
    x[3, 2] = bad
    assert math.isnan(participation_ratio(x, 1).item())


@pytest.mark.parametrize("channels", [1, 3, 64, 362, 363, 512, 1023, 1024, 1025, 4096, 50_257, 2_000_000])
def test_the_cost_is_bounded(channels):
    """However many samples there are, the matrix product takes at most 2³⁰ multiplications, of at most 8192 samples."""
    kept = samples_of(10**9, channels)
    assert 2 <= kept <= SAMPLES
    assert kept * channels * min(kept, channels) <= WORK
    assert kept == SAMPLES or (kept + 1) * channels * min(kept + 1, channels) > WORK
    assert samples_of(7, channels) == 7


@pytest.mark.parametrize("shape", [(30, 4, 28, 28), (64, 4, 56, 56), (9, 4, 2310)], ids=str)
def test_of_many_samples_each_row_column_and_image_has_its_share(shape):
    """Samples that are looked at are distinct and spread evenly, whatever divisors their number and the image have."""
    x = torch.arange(math.prod(shape) // 4).reshape(shape[0], 1, *shape[2:]).expand(shape).float()
    rows = _samples(x, 1)
    assert rows.shape == (SAMPLES, 4)
    assert len(rows[:, 0].unique()) == SAMPLES
    places = np.unravel_index(rows[:, 0].long().numpy(), (shape[0], *shape[2:]))
    for along, length in zip(places, (shape[0], *shape[2:]), strict=True):
        share = np.bincount(along, minlength=length) / (SAMPLES / length)
        assert share.min() > 0.5
        assert share.max() < 1.6


def test_a_selection_of_samples_says_nearly_what_all_say():
    """Of an image whose columns differ, 8192 of 100,352 samples give the ratio of all to 2 %."""
    x = normal(32, 8, 56, 56) * torch.linspace(0.1, 1, 8).view(8, 1, 1) + torch.linspace(-1, 1, 56)
    assert participation_ratio(x, 1).item() == pytest.approx(by_eigenvalues(x, 1), rel=0.02)


def test_nothing_is_read_on_the_host_and_no_graph_is_kept():
    """It queues work on the device, whichever samples it takes, and leaves the tensor and its graph alone."""
    x = normal(3, 4, 60, 60).requires_grad_()
    before = x.detach().clone()
    with NoHostRead():
        found = participation_ratio(x, 1), participation_ratio(x[:, :, 0, 0], 1)
    assert not any(ratio.requires_grad for ratio in found)
    assert torch.equal(x, before)


def test_one_axis_has_no_samples():
    """The error names the argument, what it needs and what it got."""
    with pytest.raises(ValueError, match=r"x must have at least 2 axes, got shape \(5,\)"):
        participation_ratio(torch.ones(5), 0)
