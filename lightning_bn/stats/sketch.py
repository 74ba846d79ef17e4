# SPDX-License-Identifier: Apache-2.0
"""Moments of a tensor in the operations that cost least: sums of what is there, and the spread by their difference.

The difference loses digits where the mean is large against the spread, and squares leave float32's range where values
are huge or tiny: such a row has no spread (NaN), and :func:`.moments.measure` is to be asked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bn.stats.moments import wide_dtype

PIECE = 1 << 17
"""Values in one piece of a large tensor on a CPU: 512 kB, so that all sums but the first find it in the cache."""
SURE = 0.05
"""Share of the mean square that the variance must be for it to have kept its digits; a float32 sum of squares is
right to about 1e-6 in pieces of this size."""
SMALLEST, LARGEST = 1e-15, 1e15
"""Largest absolute values between which float32 holds the squares."""


def sketch(x: Tensor, *, zeros: bool = True) -> list[list[Tensor]]:
    """The sums of one tensor, piece by piece; :func:`complete_sketches` makes rows of them.

    Args:
        x: float32 values, without a graph, of any shape and memory format.
        zeros: whether to count values unequal to 0.

    Returns:
        For each piece its sum, sum of squares, smallest value, largest value and, if asked for, number of values
        unequal to 0, all of them 0-dimensional and on the device of ``x``. Nothing is read on the host.
    """
    flat = flatten(x)
    size = flat.numel()
    if size == 0:
        return []
    if size <= PIECE or flat.device.type != "cpu":
        return [_sums(flat, torch.sign(flat).abs_().sum() if zeros else None)]
    scratch = torch.empty(PIECE)
    rows = []
    for piece in torch.split(flat, PIECE):
        nonzero = torch.sign(piece, out=scratch[: piece.numel()]).abs_().sum() if zeros else None
        rows.append(_sums(piece, nonzero))
    return rows


def flatten(x: Tensor) -> Tensor:
    """All values in one dimension, in the order in which they lie in memory; a copy only where they have gaps."""
    if x.is_contiguous():
        return x.view(-1)
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda axis: -strides[axis])
    return x.permute(order).reshape(-1)


def complete_sketches(sums: Tensor, counts: Tensor) -> Tensor:
    """Rows of many sketched pieces at once.

    Args:
        sums: ``(K, 5)``, what :func:`sketch` gave for each piece.
        counts: ``(K,)``, their numbers of values.

    Returns:
        ``(K, 7)``, a state as in :mod:`.moments` for each; ``m2`` is NaN where it would not be exact enough.
    """
    total, squares, low, high, nonzero = sums.to(wide_dtype(sums.device)).unbind(-1)
    counts = counts.to(total)
    mean = total / counts
    m2 = squares - total * mean
    absmax = torch.maximum(high, -low)
    sure = (m2 >= SURE * squares) & (absmax >= SMALLEST) & (absmax <= LARGEST)
    m2 = torch.where(sure | (absmax == 0), m2, torch.nan)
    zeros = torch.where(torch.isnan(absmax), absmax, (counts - nonzero).clamp(min=0))
    return torch.stack([counts, mean, m2, low, high, zeros, counts], dim=-1)


def _sums(flat: Tensor, nonzero: Tensor | None) -> list[Tensor]:
    low, high = torch.aminmax(flat)
    sums = [flat.sum(), torch.dot(flat, flat), low, high]
    return sums if nonzero is None else [*sums, nonzero]
