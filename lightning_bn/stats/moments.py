# SPDX-License-Identifier: Apache-2.0
"""Mean, spread, range, zeros and non-finite values of whole tensors, from a state that adds.

A state is a row ``(count, mean, m2, low, high, zeros, known, nonfinite)``; ``m2`` is the sum of squared deviations from
the mean, ``known`` the number of values whose range and zeros were looked at, ``nonfinite`` the number of values that
are NaN or infinite, itself NaN where they were not counted. Rows of two batches, of two micro-batches or of two ranks
pool exactly, whatever their sizes.

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

COUNT, MEAN, M2, LOW, HIGH, ZEROS, KNOWN, NONFINITE = range(8)
WIDTH = 8
MEASURED = 8
"""Numbers that :func:`measure` gives."""
WHOLE = 1 << 24
"""float32 holds all whole numbers up to here; a count is brought over as a multiple of it and the rest."""
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
        nonfinite: number of values that are NaN or infinite; NaN where they were not counted.
    """

    count: int
    mean: float
    std: float
    absmax: float
    zero_share: float
    low: float = math.nan
    high: float = math.nan
    ranged: bool = True
    nonfinite: int | float = math.nan

    @property
    def is_finite(self) -> bool:
        """Whether no value was NaN or infinite."""
        return math.isfinite(self.absmax) if self.ranged else self.nonfinite == 0


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def blank(rows: int) -> Rows:
    """The state before anything was seen, ``(rows, 8)``: pooling with it changes nothing."""
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
        ``(8,)`` on the device of ``x``, float32 (float64 of a float64 tensor): smallest and largest value; mean of the
        scaled tensor, mean and sum of squares of what is left without it; number of values unequal to 0; number of
        values that are NaN or infinite, as a multiple of 2**24 and the rest. Nothing is read on the host.
    """
    x = x.detach()
    x = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    if x.numel() == 0:
        return torch.cat([x.new_full((1,), torch.inf), x.new_full((1,), -torch.inf), x.new_zeros(6)])
    low, high = torch.aminmax(x)
    y = x / power_of_two(torch.maximum(high, -low))
    mean = y.mean()
    # The rounded mean leaves a residue, which is taken out in float64.
    residue = y.sub_(mean).mean()
    squares, nonzero = y.square_().sum(), torch.sign(x).abs_().sum()
    # x - x is 0 where x is finite and NaN elsewhere; on a CPU isfinite and a sum of bools take several times as long.
    bad = torch.sub(x, x, out=y).count_nonzero()
    return torch.stack([low, high, mean, residue, squares, nonzero, bad // WHOLE, bad % WHOLE])


def complete(measured: Rows, counts: Rows) -> Rows:
    """Rows of many measured tensors at once.

    Args:
        measured: ``(K, 8)``, what :func:`measure` gave for each tensor.
        counts: ``(K,)``, their numbers of elements.

    Returns:
        ``(K, 8)``, a state for each.
    """
    low, high, mean, residue, squares, nonzero, wholes, rest = measured.T
    with np.errstate(all="ignore"):
        absmax = np.maximum(high, -low)
        scale = np.maximum(np.exp2(np.frexp(absmax)[1] - 1.0), TINY)
        m2 = (squares - counts * residue**2) * scale**2
        zeros = zero_counts(counts, nonzero, absmax)
        bad = wholes * WHOLE + rest
        rows: Rows = np.stack([counts, (mean + residue) * scale, m2, low, high, zeros, counts, bad], axis=1)
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
        ``(8,)``, on the host.

    Example:
        >>> row = summarize(moments(torch.tensor([0.0, 2.0])))
        >>> row.count, row.mean, row.std, row.absmax, row.zero_share, row.low, row.high, row.nonfinite
        (2, 1.0, 1.0, 2.0, 0.5, 0.0, 2.0, 0)
    """
    row: Rows = complete(measure(x).cpu().double().numpy()[None], np.array([float(x.numel())]))[0]
    return row


def pool(rows: Rows, places: Sequence[int], layers: int) -> Rows:
    """Pool rows into the layers they belong to, exactly: Chan, Golub & LeVeque 1983, eq. 2.1, for any number of parts.

    Args:
        rows: ``(K, 8)``.
        places: layer of each row; a layer may have several rows, or none.
        layers: number of layers.

    Returns:
        ``(layers, 8)``: for each layer the state of all values behind its rows together.
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
        for column in (ZEROS, KNOWN, NONFINITE):
            state[:, column] = _sums(rows[:, column], at, layers)
    return state


def summarize(row: Iterable[float]) -> Summary:
    """Read one pooled row, ``(8,)``."""
    count, mean, m2, low, high, zeros, known, bad = row.tolist() if isinstance(row, np.ndarray) else row
    if count == 0:
        return Summary(0, math.nan, math.nan, math.nan, math.nan, nonfinite=0)
    std = math.nan if math.isnan(m2) else math.sqrt(max(m2 / count, 0.0))
    nonfinite = math.nan if math.isnan(bad) else int(bad)
    if known < count:
        return Summary(int(count), mean, std, math.nan, math.nan, ranged=False, nonfinite=nonfinite)
    return Summary(int(count), mean, std, max(abs(low), abs(high)), zeros / count, low, high, nonfinite=nonfinite)


def is_plain(row: Summary) -> bool:
    """Whether values like these keep their digits in :func:`.sketch.sketch`; a layer that did not run is not plain."""
    if not row.ranged:
        return True
    return row.count > 0 and abs(row.mean) <= PLAIN_MEAN * row.std and PLAIN[0] <= row.absmax <= PLAIN[1]


def power_of_two(absmax: Tensor) -> Tensor:
    """The power of two at or below ``absmax``, by its exponent bits: dividing by it rounds nothing."""
    bits, exponent = EXPONENT[absmax.dtype]
    return absmax.view(bits).bitwise_and(exponent).view(absmax.dtype).clamp(min=TINY)


def _sums(values: Rows, at: NDArray[np.intp], layers: int) -> Rows:
    return np.bincount(at, values, layers).astype(np.float64, copy=False)


def _product(counts: Rows, values: Rows) -> Rows:
    """What rows without values say counts nothing, not even where it is undefined."""
    return np.where(counts > 0, counts * values, 0.0)
