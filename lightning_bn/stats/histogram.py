# SPDX-License-Identifier: Apache-2.0
"""Histogram of a tensor in bins that are the same for every tensor, so that counts add over micro-batches and ranks.

The edges are powers of two, ±2⁻²⁰ to ±2²⁰ (1e-6 to 1e6): the bin of a value is its sign and exponent, which a few
integer operations on its bits give exactly, for less than a search among the edges costs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_bn.stats.sketch import PIECE, flatten

OCTAVES = 20
"""The edges reach from 2**-20 to 2**20. A bin is no wider than an octave, as TensorBoard spreads its values evenly."""
_POWERS = [2.0**power for power in range(-OCTAVES, OCTAVES + 1)]
EDGES = (
    -sys.float_info.max,
    *(-power for power in reversed(_POWERS)),
    0.0,
    math.ulp(0.0),
    *_POWERS,
    sys.float_info.max,
)
"""Bin ``k`` holds ``EDGES[k] <= x < EDGES[k + 1]``, the last one its upper edge too, as in ``numpy.histogram``. The
outermost bins hold what lies beyond ±2**20; the bin from 0 on holds 0 and -0 alone."""
BINS = len(EDGES) - 1
NAN, POSINF, NEGINF = range(BINS, BINS + 3)
"""Places of the counts of NaN, +inf and -inf, which are in no bin."""
WIDTH = BINS + 3
_ZERO = EDGES.index(0.0)
_WIDEST = torch.finfo(torch.float32).max
# As TensorBoard can draw them, which makes float32 of them: 0 has a bin of its own, and open ends are an octave wide.
_SHOWN = (-2 * _POWERS[-1], *EDGES[1 : _ZERO + 1], 2.0**-149, *_POWERS, 2 * _POWERS[-1])

_BITS = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}
"""Integer of the same size, bits of the mantissa, bias of the exponent."""


def bin_counts(x: Tensor) -> Tensor:
    """How many values lie in each bin.

    Args:
        x: real floating-point tensor of any dtype, shape and memory format; float16 and others of fewer than 32 bits
            become float32, which changes no value.

    Returns:
        ``(88,)``, int64, on the device of ``x``: 85 bins, see :data:`EDGES`, then NaN, +inf and -inf. The counts of
        two tensors add. Nothing is read on the host.

    Raises:
        TypeError: if the values are not real floating-point numbers.

    Example:
        >>> counts = bin_counts(torch.tensor([0.0, 1.0, 1.5, float("nan")]))
        >>> [(EDGES[k], EDGES[k + 1], int(counts[k])) for k in range(BINS) if counts[k]], int(counts[NAN])
        ([(0.0, 5e-324, 1), (1.0, 2.0, 2)], 1)
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be of a real floating-point dtype, got {x.dtype}")
    flat = flatten(x.detach())
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pieces = torch.split(flat, PIECE) if flat.device.type == "cpu" else (flat,)
    integer, mantissa, bias = _BITS[wide]
    exponents = torch.zeros(4 * (bias + 1), dtype=torch.int64, device=x.device)
    special = torch.zeros(3, dtype=torch.int64, device=x.device)
    for piece in pieces:
        keys = _keys(piece.to(wide).view(integer), integer)
        special += _special(keys, (2 * bias + 1) << mantissa)
        places = keys.bitwise_right_shift_(mantissa).add_(2 * (bias + 1))
        # Not bincount, which waits for the device, nor histc, which torch's deterministic mode refuses.
        exponents.index_add_(0, places, exponents.new_ones(()).expand(len(places)))
    return _fold(exponents, special, bias)


def raw_histogram(
    counts: Sequence[int],
    *,
    low: float = math.nan,
    high: float = math.nan,
    mean: float = math.nan,
    std: float = math.nan,
) -> dict[str, Any] | None:
    """What ``SummaryWriter.add_histogram_raw`` takes besides the tag and the step.

    Numbers that are not finite, as those of a tensor with a NaN in it, are estimated from the bins: the ends by the
    outermost edges, mean and spread as if each bin's values lay in its middle. Empty bins at both ends are left out.

    Args:
        counts: ``(88,)``, from :func:`bin_counts`, on the host; NaN and infinities are not drawn.
        low: smallest value.
        high: largest value.
        mean: mean of the values.
        std: their biased standard deviation.

    Returns:
        ``min``, ``max``, ``num``, ``sum``, ``sum_squares``, ``bucket_limits`` (upper edges) and ``bucket_counts``; None
        where no value is finite, which TensorBoard cannot draw.

    Raises:
        ValueError: if there are not 88 counts.

    Example:
        >>> raw = raw_histogram(bin_counts(torch.tensor([0.0, 1.0, 1.5])).tolist(), low=0.0, high=1.5)
        >>> raw["min"], raw["max"], raw["num"], sum(raw["bucket_counts"]), raw["bucket_limits"][-1]
        (0.0, 1.5, 3, 3, 1.5)
    """
    if len(counts) != WIDTH:
        raise ValueError(f"counts must be the {WIDTH} numbers of bin_counts, got {len(counts)}")
    full = [k for k in range(BINS) if counts[k]]
    if not full:
        return None
    first, last, number = full[0], full[-1], sum(counts[:BINS])
    low = min(max(low, EDGES[first], -_WIDEST), _SHOWN[first + 1]) if math.isfinite(low) else _SHOWN[first]
    high = max(min(high, EDGES[last + 1], _WIDEST), _SHOWN[last]) if math.isfinite(high) else _SHOWN[last + 1]
    limits = [*_SHOWN[first + 1 : last + 1], high]
    middles = [left / 2 + right / 2 for left, right in pairwise([low, *limits])]
    weighted = list(zip(middles, counts[first : last + 1], strict=True))
    total, squares = mean * number, (std * std + mean * mean) * number
    return {
        "min": low,
        "max": high,
        "num": number,
        "sum": total if math.isfinite(total) else sum(middle * count for middle, count in weighted),
        "sum_squares": squares
        if math.isfinite(squares)
        else sum(middle * middle * count for middle, count in weighted),
        "bucket_limits": limits,
        "bucket_counts": [int(count) for count in counts[first : last + 1]],
    }


def _keys(bits: Tensor, integer: torch.dtype) -> Tensor:
    """Integers that are ordered as the values are, 0 for both zeros; those of ``x`` and ``-x`` differ in the sign."""
    info = torch.iinfo(integer)
    return (bits & info.max).mul_((bits >> (info.bits - 1)).bitwise_or_(1))


def _special(keys: Tensor, infinity: int) -> Tensor:
    """Counts of 0, +inf and -inf, ``(3,)``: the values that the exponent does not tell from others."""
    others = [torch.count_nonzero(keys), *(torch.count_nonzero(keys ^ key) for key in (infinity, -infinity))]
    return keys.numel() - torch.stack(others)


def _fold(exponents: Tensor, special: Tensor, bias: int) -> Tensor:
    """Bins from counts by sign and exponent.

    Args:
        exponents: ``(4 * (bias + 1),)``, in the order of the values. From the middle on lie the positive ones by their
            biased exponent, +inf and NaN last; before it the negative ones, NaN first; -inf counts as the lowest finite
            exponent, as lower edges belong to a bin and upper ones do not.
        special: ``(3,)``, how many of them are 0, +inf and -inf.
        bias: bias of the exponent.
    """
    near, octaves = bias - OCTAVES, 2 * OCTAVES
    beyond = 2 * bias + 1 - near - octaves
    sizes = [1, beyond, octaves, near, near, octaves, beyond, 1]
    nan, below, negative, just_below, just_above, positive, above, top = torch.split(exponents, sizes)
    zero, posinf, neginf = torch.split(special, 1)
    ends = [part.sum(0, keepdim=True) for part in (below, just_below, just_above, above)]
    return torch.cat(
        [
            ends[0] - neginf,
            negative,
            ends[1],
            zero,
            ends[2] - zero,
            positive,
            ends[3],
            nan + top - posinf,
            posinf,
            neginf,
        ]
    )
