# SPDX-License-Identifier: Apache-2.0
"""Mean, spread, range and zero share of whole tensors, from a state that adds.

A state is a row ``(count, mean, m2, absmax, zeros)``; ``m2`` is the sum of squared deviations from the mean.
Rows of two batches, of two micro-batches or of two ranks pool exactly, whatever their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COUNT, MEAN, M2, ABSMAX, ZEROS = range(5)
WIDTH = 5
TINY = torch.finfo(torch.float32).tiny
EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}


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


def measure(x: Tensor) -> Tensor:
    """The few reductions of a tensor that have to be made at once; :func:`complete` makes rows of many of them.

    The tensor is scaled by a power of two and centred before it is squared, so that neither a large offset nor values
    near either end of float32's range lose the spread (corrected two-pass algorithm, Chan, Golub & LeVeque 1983,
    eq. 1.7).

    Args:
        x: floating-point tensor of any shape and memory format; all axes are reduced.

    Returns:
        ``(5,)`` on the device of ``x``, float32 (float64 of a float64 tensor): largest absolute value; mean of the
        scaled tensor, mean and sum of squares of what is left without it; number of values unequal to 0. Nothing is
        read on the host.
    """
    x = x.detach()
    x = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    if x.numel() == 0:
        return x.new_zeros(5)
    low, high = torch.aminmax(x)
    absmax = torch.maximum(high, -low)
    y = x / _scale(absmax)
    mean = y.mean()
    # The rounded mean leaves a residue, which is taken out in float64.
    residue = y.sub_(mean).mean()
    return torch.stack([absmax, mean, residue, y.square_().sum(), torch.sign(x).abs_().sum()])


def complete(measured: Tensor, counts: Tensor) -> Tensor:
    """Rows of many measured tensors at once.

    Args:
        measured: ``(K, 5)``, what :func:`measure` gave for each tensor.
        counts: ``(K,)``, their numbers of elements.

    Returns:
        ``(K, 5)``, a state for each, in the dtype of :func:`wide_dtype`.
    """
    absmax, mean, residue, squares, nonzero = measured.to(wide_dtype(measured.device)).unbind(-1)
    counts = counts.to(absmax)
    scale = _scale(absmax)
    # The sign of NaN is 0; and float32 counts past 2**24 may be one too high.
    zeros = torch.where(torch.isnan(absmax), absmax, (counts - nonzero).clamp(min=0))
    m2 = (squares - counts * residue.square()) * scale.square()
    return torch.stack([counts, (mean + residue) * scale, m2, absmax.abs(), zeros], dim=-1)


def moments(x: Tensor) -> Tensor:
    """The row of one tensor; nothing is read on the host.

    Args:
        x: floating-point tensor of any shape and memory format; all axes are reduced.

    Returns:
        ``(5,)`` on the device of ``x``, float64 (float32 on MPS).

    Example:
        >>> summarize(moments(torch.tensor([0.0, 2.0])))
        Summary(count=2, mean=1.0, std=1.0, absmax=2.0, zero_share=0.5)
    """
    measured = measure(x)
    return complete(measured[None], measured.new_full((1,), x.numel(), dtype=wide_dtype(x.device)))[0]


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


def pool_into(state: Tensor, places: Sequence[int], rows: Tensor) -> None:
    """Pool rows into the layers they belong to, in place; a layer may have several.

    Args:
        state: ``(layers, 5)``.
        places: layer of each row.
        rows: ``(K, 5)``, same dtype and device.
    """
    rounds: list[dict[int, int]] = []  # in each round a layer has one row: layer -> row
    for row, place in enumerate(places):
        free = next((turn for turn in rounds if place not in turn), None)
        if free is None:
            free = {}
            rounds.append(free)
        free[place] = row
    for turn in rounds:
        layers, chosen = list(turn), list(turn.values())
        state[layers] = pool(state[layers], rows[chosen])


def summarize(row: Tensor) -> Summary:
    """Read one pooled row, ``(5,)``, that lies on the host."""
    count, mean, m2, absmax, zeros = row.tolist()
    if count == 0:
        return Summary(0, *[math.nan] * 4)
    std = math.nan if math.isnan(m2) else math.sqrt(max(m2 / count, 0.0))
    return Summary(int(count), mean, std, absmax, zeros / count)


def _scale(absmax: Tensor) -> Tensor:
    """The power of two at or below ``absmax``, by its exponent bits: dividing by it rounds nothing."""
    bits, exponent = EXPONENT[absmax.dtype]
    return absmax.view(bits).bitwise_and(exponent).view(absmax.dtype).clamp(min=TINY)
