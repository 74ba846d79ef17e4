# SPDX-License-Identifier: Apache-2.0
"""Mean, spread, range and zero share of whole tensors, from a state that adds.

A state is a row ``(count, mean, m2, low, high, zeros, known)``; ``m2`` is the sum of squared deviations from the mean,
``known`` the number of values whose range and zeros were looked at. Rows of two batches, of two micro-batches or of two
ranks pool exactly, whatever their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COUNT, MEAN, M2, LOW, HIGH, ZEROS, KNOWN = range(7)
WIDTH = 7
PLAIN_MEAN, PLAIN = 3.0, (1e-12, 1e12)
"""Largest mean, in standard deviations, and range of the largest absolute value, of values that need no care."""
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
        low: smallest value; NaN where a value was NaN.
        high: largest value; likewise.
        ranged: whether range and zeros were looked at; if not, ``absmax``, ``zero_share``, ``low``, ``high`` are NaN.
    """

    count: int
    mean: float
    std: float
    absmax: float
    zero_share: float
    low: float = math.nan
    high: float = math.nan
    ranged: bool = True

    @property
    def is_finite(self) -> bool:
        """Whether no value was NaN or infinite."""
        return math.isfinite(self.absmax if self.ranged else self.mean)


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def blank(rows: int, device: torch.device) -> Tensor:
    """The state before anything was seen, ``(rows, 7)``: pooling with it changes nothing."""
    state = torch.zeros(rows, WIDTH, dtype=wide_dtype(device), device=device)
    state[:, LOW], state[:, HIGH] = torch.inf, -torch.inf
    return state


def measure(x: Tensor) -> Tensor:
    """The few reductions of a tensor that have to be made at once; :func:`complete` makes rows of many of them.

    The tensor is scaled by a power of two and centred before it is squared, so that neither a large offset nor values
    near either end of float32's range lose the spread (corrected two-pass algorithm, Chan, Golub & LeVeque 1983,
    eq. 1.7).

    Args:
        x: floating-point tensor of any shape and memory format; all axes are reduced.

    Returns:
        ``(6,)`` on the device of ``x``, float32 (float64 of a float64 tensor): smallest and largest value; mean of the
        scaled tensor, mean and sum of squares of what is left without it; number of values unequal to 0. Nothing is
        read on the host.
    """
    x = x.detach()
    x = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    if x.numel() == 0:
        return torch.cat([x.new_full((1,), torch.inf), x.new_full((1,), -torch.inf), x.new_zeros(4)])
    low, high = torch.aminmax(x)
    y = x / _scale(torch.maximum(high, -low))
    mean = y.mean()
    # The rounded mean leaves a residue, which is taken out in float64.
    residue = y.sub_(mean).mean()
    return torch.stack([low, high, mean, residue, y.square_().sum(), torch.sign(x).abs_().sum()])


def complete(measured: Tensor, counts: Tensor) -> Tensor:
    """Rows of many measured tensors at once.

    Args:
        measured: ``(K, 6)``, what :func:`measure` gave for each tensor.
        counts: ``(K,)``, their numbers of elements.

    Returns:
        ``(K, 7)``, a state for each, in the dtype of :func:`wide_dtype`.
    """
    low, high, mean, residue, squares, nonzero = measured.to(wide_dtype(measured.device)).unbind(-1)
    counts = counts.to(low)
    absmax = torch.maximum(high, -low)
    scale = _scale(absmax)
    # The sign of NaN is 0; and float32 counts past 2**24 may be one too high.
    zeros = torch.where(torch.isnan(absmax), absmax, (counts - nonzero).clamp(min=0))
    m2 = (squares - counts * residue.square()) * scale.square()
    return torch.stack([counts, (mean + residue) * scale, m2, low, high, zeros, counts], dim=-1)


def moments(x: Tensor) -> Tensor:
    """The row of one tensor; nothing is read on the host.

    Args:
        x: floating-point tensor of any shape and memory format; all axes are reduced.

    Returns:
        ``(7,)`` on the device of ``x``, float64 (float32 on MPS).

    Example:
        >>> summarize(moments(torch.tensor([0.0, 2.0])))
        Summary(count=2, mean=1.0, std=1.0, absmax=2.0, zero_share=0.5, low=0.0, high=2.0, ranged=True)
    """
    measured = measure(x)
    return complete(measured[None], measured.new_full((1,), x.numel(), dtype=wide_dtype(x.device)))[0]


def pool(a: Tensor, b: Tensor) -> Tensor:
    """Pool two states exactly: Chan, Golub & LeVeque 1983, eq. 2.1.

    Args:
        a: ``(..., 7)``.
        b: ``(..., 7)``, same dtype and device.

    Returns:
        ``(..., 7)``, the state of all values behind ``a`` and ``b`` together.
    """
    count = a[..., COUNT] + b[..., COUNT]
    share = b[..., COUNT] / count.clamp(min=1)
    delta = b[..., MEAN] - a[..., MEAN]
    mean = a[..., MEAN] + delta * share
    m2 = a[..., M2] + b[..., M2] + delta.square() * a[..., COUNT] * share
    low = torch.minimum(a[..., LOW], b[..., LOW])
    high = torch.maximum(a[..., HIGH], b[..., HIGH])
    zeros, known = a[..., ZEROS] + b[..., ZEROS], a[..., KNOWN] + b[..., KNOWN]
    return torch.stack([count, mean, m2, low, high, zeros, known], dim=-1)


def pool_into(state: Tensor, places: Sequence[int], rows: Tensor) -> None:
    """Pool rows into the layers they belong to, in place; a layer may have several.

    Args:
        state: ``(layers, 7)``.
        places: layer of each row.
        rows: ``(K, 7)``, same dtype and device.
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


def summarize(row: Tensor | Sequence[float]) -> Summary:
    """Read one pooled row, ``(7,)``, that lies on the host."""
    count, mean, m2, low, high, zeros, known = row.tolist() if isinstance(row, Tensor) else row
    if count == 0:
        return Summary(0, math.nan, math.nan, math.nan, math.nan)
    std = math.nan if math.isnan(m2) else math.sqrt(max(m2 / count, 0.0))
    if known < count:
        return Summary(int(count), mean, std, math.nan, math.nan, ranged=False)
    return Summary(int(count), mean, std, max(abs(low), abs(high)), zeros / count, low, high)


def is_plain(row: Summary) -> bool:
    """Whether values like these keep their digits in :func:`.sketch.sketch`; a layer that did not run is not plain."""
    if not row.ranged:
        return True
    return row.count > 0 and abs(row.mean) <= PLAIN_MEAN * row.std and PLAIN[0] <= row.absmax <= PLAIN[1]


def _scale(absmax: Tensor) -> Tensor:
    """The power of two at or below ``absmax``, by its exponent bits: dividing by it rounds nothing."""
    bits, exponent = EXPONENT[absmax.dtype]
    return absmax.view(bits).bitwise_and(exponent).view(absmax.dtype).clamp(min=TINY)
