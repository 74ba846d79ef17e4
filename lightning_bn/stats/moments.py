# SPDX-License-Identifier: Apache-2.0
"""Mean, spread, range and zero share of whole tensors, from a state that adds.

A state is a row ``(count, mean, m2, low, high, zeros, known)``; ``m2`` is the sum of squared deviations from the mean,
``known`` the number of values whose range and zeros were looked at. Rows of two batches, of two micro-batches or of two
ranks pool exactly, whatever their sizes.

Only the reductions run where the tensor is. What follows is arithmetic on a handful of numbers, in NumPy and float64:
an operation on so few costs torch several times as much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COUNT, MEAN, M2, LOW, HIGH, ZEROS, KNOWN = range(7)
WIDTH = 7
MEASURED = 6
"""Numbers that :func:`measure` gives."""
PLAIN_MEAN, PLAIN = 3.0, (1e-12, 1e12)
"""Largest mean, in standard deviations, and range of the largest absolute value, of values that need no care."""
TINY = torch.finfo(torch.float32).tiny
EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}

Rows = NDArray[np.float64]
"""Numbers on the host."""


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


def blank(rows: int) -> Rows:
    """The state before anything was seen, ``(rows, 7)``: pooling with it changes nothing."""
    state = np.zeros((rows, WIDTH))
    state[:, LOW], state[:, HIGH] = np.inf, -np.inf
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


def complete(measured: Rows, counts: Rows) -> Rows:
    """Rows of many measured tensors at once.

    Args:
        measured: ``(K, 6)``, what :func:`measure` gave for each tensor.
        counts: ``(K,)``, their numbers of elements.

    Returns:
        ``(K, 7)``, a state for each.
    """
    low, high, mean, residue, squares, nonzero = measured.T
    with np.errstate(all="ignore"):
        absmax = np.maximum(high, -low)
        scale = np.maximum(np.exp2(np.frexp(absmax)[1] - 1.0), TINY)
        m2 = (squares - counts * residue**2) * scale**2
        zeros = zero_counts(counts, nonzero, absmax)
        rows: Rows = np.stack([counts, (mean + residue) * scale, m2, low, high, zeros, counts], axis=1)
    return rows


def zero_counts(counts: Rows, nonzero: Rows, absmax: Rows) -> Rows:
    """Number of zeros: undefined where a value was NaN, and never below 0, as float32 counts round past 2**24."""
    found: Rows = np.where(np.isnan(absmax), np.nan, np.maximum(counts - nonzero, 0))
    return found


def moments(x: Tensor) -> Rows:
    """The row of one tensor.

    Args:
        x: floating-point tensor of any shape and memory format; all axes are reduced.

    Returns:
        ``(7,)``, on the host.

    Example:
        >>> summarize(moments(torch.tensor([0.0, 2.0])))
        Summary(count=2, mean=1.0, std=1.0, absmax=2.0, zero_share=0.5, low=0.0, high=2.0, ranged=True)
    """
    row: Rows = complete(measure(x).cpu().double().numpy()[None], np.array([float(x.numel())]))[0]
    return row


def pool(rows: Rows, places: Sequence[int], layers: int) -> Rows:
    """Pool rows into the layers they belong to, exactly: Chan, Golub & LeVeque 1983, eq. 2.1, for any number of parts.

    Args:
        rows: ``(K, 7)``.
        places: layer of each row; a layer may have several rows, or none.
        layers: number of layers.

    Returns:
        ``(layers, 7)``: for each layer the state of all values behind its rows together.
    """
    state, at = blank(layers), np.asarray(places, dtype=np.intp)
    if len(set(places)) == len(places):
        state[at] = rows
        return state
    with np.errstate(all="ignore"):
        state[:, COUNT] = _sums(rows[:, COUNT], at, layers)
        state[:, MEAN] = _sums(_product(rows[:, COUNT], rows[:, MEAN]), at, layers) / np.maximum(state[:, COUNT], 1)
        apart = _product(rows[:, COUNT], (rows[:, MEAN] - state[at, MEAN]) ** 2)
        state[:, M2] = _sums(rows[:, M2] + apart, at, layers)
        np.minimum.at(state[:, LOW], at, rows[:, LOW])
        np.maximum.at(state[:, HIGH], at, rows[:, HIGH])
        for column in (ZEROS, KNOWN):
            state[:, column] = _sums(rows[:, column], at, layers)
    return state


def summarize(row: Iterable[float]) -> Summary:
    """Read one pooled row, ``(7,)``."""
    count, mean, m2, low, high, zeros, known = row.tolist() if isinstance(row, np.ndarray) else row
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


def _sums(values: Rows, at: NDArray[np.intp], layers: int) -> Rows:
    return np.bincount(at, values, layers).astype(np.float64, copy=False)


def _product(counts: Rows, values: Rows) -> Rows:
    """What rows without values say counts nothing, not even where it is undefined."""
    return np.where(counts > 0, counts * values, 0.0)
