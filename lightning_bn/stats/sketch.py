# SPDX-License-Identifier: Apache-2.0
"""Moments of a tensor in the operations that cost least: sums of what is there, and the spread by their difference.

The difference loses digits where the mean is large against the spread, and squares leave float32's range where values
are huge or tiny: such a row has no spread (NaN), and :func:`.moments.measure` is to be asked.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_bn.stats.moments import COUNT, HIGH, KNOWN, LOW, M2, MEAN, NONFINITE, WIDTH, ZEROS, Rows, zero_counts
from lightning_bn.stats.slots import Slots

PIECE = 1 << 17
"""Values in one piece of a large tensor on a CPU: 512 kB, so that all sums but the first find it in the cache."""
SURE = 0.05
"""Share of the mean square that the variance must be for it to have kept its digits; a float32 sum of squares is
right to about 1e-6 in pieces of this size."""
SMALLEST, LARGEST = 1e-15, 1e15
"""Largest absolute values between which float32 holds the squares."""


def sketch(x: Tensor, slots: Slots, *, zeros: bool = True) -> list[int]:
    """Take the sums of one tensor, piece by piece; :func:`complete_sketches` makes rows of them.

    Args:
        x: float32 values, without a graph, of any shape and memory format.
        slots: each piece takes a row of them: sum, sum of squares, smallest value, largest value and number of values
            unequal to 0. They lie on the device of ``x``.
        zeros: whether to count values unequal to 0; if not, the last place keeps what it held.

    Returns:
        The number of values of each piece. Nothing is read on the host.
    """
    flat = flatten(x)
    size = flat.numel()
    if size == 0:
        return []
    if size <= PIECE or flat.device.type != "cpu":
        _sums(flat, slots, torch.empty_like(flat) if zeros else None)
        return [size]
    scratch = torch.empty(PIECE) if zeros else None
    pieces = torch.split(flat, PIECE)
    for piece in pieces:
        _sums(piece, slots, None if scratch is None else scratch[: len(piece)])
    return [len(piece) for piece in pieces]


def flatten(x: Tensor) -> Tensor:
    """All values in one dimension, in the order in which they lie in memory; a copy only where they have gaps."""
    if x.is_contiguous():
        return x.view(-1)
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda axis: -strides[axis])
    return x.permute(order).reshape(-1)


def complete_sketches(sums: Rows, counts: Rows) -> Rows:
    """Rows of many sketched pieces at once.

    Args:
        sums: ``(K, 5)``, what :func:`sketch` wrote for each piece, on the host.
        counts: ``(K,)``, their numbers of values.

    Returns:
        ``(K, 8)``, a state as in :mod:`.moments` for each; ``m2`` is NaN where it would not be exact enough, and where
        the range is not finite nobody counted how many values are not.
    """
    total, squares, low, high, nonzero = sums.T
    rows = np.empty((len(sums), WIDTH))
    with np.errstate(all="ignore"):
        mean = total / counts
        m2 = squares - total * mean
        absmax = np.maximum(high, -low)
        sure = (m2 >= SURE * squares) & (absmax >= SMALLEST) & (absmax <= LARGEST) | (absmax == 0)
        rows[:, MEAN], rows[:, M2], rows[:, LOW], rows[:, HIGH] = mean, np.where(sure, m2, np.nan), low, high
        rows[:, COUNT] = rows[:, KNOWN] = counts
        rows[:, ZEROS] = zero_counts(counts, nonzero, absmax)
        rows[:, NONFINITE] = np.where(np.isfinite(absmax), 0, np.nan)
    return rows


def _sums(flat: Tensor, slots: Slots, scratch: Tensor | None) -> None:
    total, squares, low, high, nonzero = slots.row()
    torch.sum(flat, 0, out=total)
    torch.dot(flat, flat, out=squares)
    torch.aminmax(flat, out=(low, high))
    if scratch is not None:
        torch.sum(torch.ne(flat, 0, out=scratch), 0, out=nonzero)
