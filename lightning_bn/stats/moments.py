# SPDX-License-Identifier: Apache-2.0
"""Mean, spread, range and zero share of whole tensors, from a state that adds.

A state is a row ``(count, mean, m2, absmax, zeros)``; ``m2`` is the sum of squared deviations from the mean.
Rows of two batches, of two micro-batches or of two ranks pool exactly, whatever their sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

COUNT, MEAN, M2, ABSMAX, ZEROS = range(5)
WIDTH = 5


@dataclass(frozen=True)
class Summary:
    """What a pooled row says, on the host.

    Args:
        count: number of values.
        mean: their mean; NaN where a value was NaN or infinite.
        std: biased standard deviation (divided by ``count``), in the units of the values.
        absmax: largest absolute value; NaN or inf where one was there.
        zero_share: share of values that are exactly 0; NaN where a value was NaN.
    """

    count: int
    mean: float
    std: float
    absmax: float
    zero_share: float


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def blank(rows: int, device: torch.device) -> Tensor:
    """The state before anything was seen, ``(rows, 5)``: pooling with it changes nothing."""
    return torch.zeros(rows, WIDTH, dtype=wide_dtype(device), device=device)


def moments(x: Tensor) -> Tensor:
    """The row of one tensor; nothing is read on the host.

    The tensor is scaled by a power of two and centred before it is squared, so that neither a large offset
    nor values near the end of float32's range lose the spread.

    Args:
        x: floating-point tensor of any shape and memory format; all axes are reduced.

    Returns:
        ``(5,)`` on the device of ``x``, float64 (float32 on MPS).

    Example:
        >>> summarize(moments(torch.tensor([0.0, 2.0])))
        Summary(count=2, mean=1.0, std=1.0, absmax=2.0, zero_share=0.5)
    """
    x = x.detach()
    if x.numel() == 0:
        return blank(1, x.device)[0]
    x = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    low, high = torch.aminmax(x)
    absmax = torch.maximum(low.abs(), high.abs())
    scale = _power_of_two(absmax)
    y = x / scale
    mean = y.mean()
    # The rounded mean leaves a residue that the second mean takes out: corrected two-pass algorithm,
    # Chan, Golub & LeVeque 1983, eq. 1.7.
    y.sub_(mean)
    residue = y.mean()
    wide = wide_dtype(x.device)
    m2 = y.square_().sum().to(wide) - x.numel() * residue.to(wide).square()
    scale, absmax = scale.to(wide), absmax.to(wide)
    count = torch.full_like(absmax, x.numel())
    zeros = count - torch.sign(x).abs_().sum(dtype=wide)
    zeros = torch.where(torch.isnan(absmax), absmax, zeros)  # the sign of NaN is 0
    return torch.stack([count, (mean.to(wide) + residue.to(wide)) * scale, m2 * scale.square(), absmax, zeros])


def pool(a: Tensor, b: Tensor) -> Tensor:
    """Pool two states exactly: Chan, Golub & LeVeque 1983, eq. 2.1.

    Args:
        a: ``(..., 5)``.
        b: ``(..., 5)``, same dtype and device.

    Returns:
        ``(..., 5)``, the state of all values behind ``a`` and ``b`` together.
    """
    count = a[..., COUNT] + b[..., COUNT]
    share = b[..., COUNT] / count.clamp(min=1)
    delta = b[..., MEAN] - a[..., MEAN]
    mean = a[..., MEAN] + delta * share
    m2 = a[..., M2] + b[..., M2] + delta.square() * a[..., COUNT] * share
    absmax = torch.maximum(a[..., ABSMAX], b[..., ABSMAX])
    return torch.stack([count, mean, m2, absmax, a[..., ZEROS] + b[..., ZEROS]], dim=-1)


def summarize(row: Tensor) -> Summary:
    """Read one pooled row, ``(5,)``, that lies on the host."""
    count, mean, m2, absmax, zeros = row.tolist()
    if count == 0:
        return Summary(0, *[math.nan] * 4)
    std = math.nan if math.isnan(m2) else math.sqrt(max(m2 / count, 0.0))
    return Summary(int(count), mean, std, absmax, zeros / count)


def _power_of_two(absmax: Tensor) -> Tensor:
    """The power of two just below ``absmax``; 1 where that is 0 or not finite. Dividing by it rounds nothing."""
    usable = (absmax > 0) & torch.isfinite(absmax)
    _, exponent = torch.frexp(torch.where(usable, absmax, torch.ones_like(absmax)))
    # One less than frexp's exponent: 2**128, above float32's largest value, is no float32.
    return torch.ldexp(torch.ones_like(absmax), exponent - 1)
