# SPDX-License-Identifier: Apache-2.0
"""How many directions the channels of an output make use of: the participation ratio of their covariance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_bn.stats.moments import power_of_two

SAMPLES = 1 << 13
"""Most samples that are looked at."""
WORK = 1 << 30
"""Most multiplications for one tensor: some hundredths of a second on one core of a CPU."""
GOLDEN = (math.sqrt(5) - 1) / 2


def participation_ratio(x: Tensor, axis: int) -> Tensor:
    """Effective rank of an output: (tr Σ)² / ‖Σ‖²_F, Σ being the covariance of its channels.

    With the eigenvalues λ of Σ it is (Σ λ)² / Σ λ²: k where k of them are equal and the others 0 (Gao, Trautmann, Yu,
    Santhanam, Ryu, Shenoy & Ganguli 2017, "A theory of multineuronal dimensionality, dynamics and measurement"). It is
    not the exponential of an entropy that Roy & Vetterli (2007) call effective rank. No eigenvalue is computed: trace
    and Frobenius norm are those of the smaller of the two Gram matrices of the centred samples.

    The covariance is that of the samples, which few samples make look poorer: of a normal distribution whose own ratio
    is r, n independent samples show about r·n/(n + r).

    Args:
        x: floating-point tensor, ``(N, C, *)`` or ``(N, *, C)``, of any memory format. Every axis but that of the
            channels counts samples. Of many samples at most 8192 are looked at, and fewer where C is above 362, so that
            a matrix product takes no more than 2³⁰ multiplications: n·C·min(n, C) ≤ 2³⁰.
        axis: where the channels are.

    Returns:
        Scalar on the device of ``x``, float32, from 1 to min(C, samples - 1); NaN where no channel varies, and where a
        value that was looked at is not finite. Computed in float32, of a float64 tensor in float64; within what a user
        has set for matrix products of float32 (TF32). Nothing is read on the host.

    Raises:
        ValueError: if ``x`` has fewer than two axes.

    Example:
        >>> participation_ratio(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), 1)
        tensor(2.)
    """
    if x.dim() < 2:  # noqa: PLR2004  (one axis has no samples)
        raise ValueError(f"x must have at least 2 axes, got shape {tuple(x.shape)}")
    rows = _samples(x.detach(), axis)
    if rows.numel() == 0:
        return torch.full((), torch.nan, device=x.device)
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    low, high = torch.aminmax(rows)
    rows = rows / power_of_two(torch.maximum(high, -low))
    # Differences of values that lie close together are exact: a large offset goes before anything is summed.
    rows = rows - rows[0]
    rows = rows - rows.mean(0)
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    return (gram.diagonal().sum().square() / gram.square().sum()).float()


def samples_of(total: int, channels: int) -> int:
    """How many samples are looked at.

    Args:
        total: how many there are.
        channels: C, at least 1.

    Example:
        >>> samples_of(100, 64), samples_of(10**6, 64), samples_of(10**6, 1024), samples_of(10**6, 4096)
        (100, 8192, 1024, 512)
    """
    return min(total, SAMPLES, max(WORK // channels**2, math.isqrt(WORK // channels), 2))


def _samples(x: Tensor, axis: int) -> Tensor:
    """Samples ``(n, C)``; of too many every k-th, going round.

    k is coprime to their number and near its golden section, so that no sample is met twice, and every row, column and
    image about equally often. Only what is looked at is copied.
    """
    x = x.movedim(axis, -1)
    channels = x.shape[-1]
    total = x.numel() // channels if channels else 0
    kept = samples_of(total, channels) if channels else 0
    if kept == total:
        return x.reshape(total, channels)
    stride = round(GOLDEN * total)
    while math.gcd(stride, total) > 1:
        stride += 1
    at, places = torch.arange(kept, device=x.device) * stride % total, []
    for length in reversed(x.shape[:-1]):
        places.append(at % length)
        at = at // length
    return x[tuple(reversed(places))]
