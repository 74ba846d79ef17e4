# SPDX-License-Identifier: Apache-2.0
"""Who carries a rise of the validation loss: γ and β, the other weights, or the running statistics.

All numbers come from losses of the same validation batches under different weights and statistics, so that they are
compared batch by batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
FEWEST = 5
"""Batches below which a spread over batches says too little."""


@dataclass(frozen=True)
class Change:
    """How a mean loss changes from one setting to another.

    Args:
        before: mean loss over all samples.
        after: the same in the other setting.
        z: how sure the change is, in standard errors of a normal distribution; see :func:`change`.
    """

    before: float
    after: float
    z: float

    @property
    def relative(self) -> float:
        """Part of ``before`` by which the loss rose; negative where it fell."""
        return (self.after - self.before) / self.before if self.before else math.nan


def change(before: Sequence[float], after: Sequence[float], sizes: Sequence[int]) -> Change:
    """Compare losses of the same batches in pairs.

    With differences d of n batches of w samples each, t is their mean Σwd/Σw over its standard error
    √(n/(n−1)·Σw²(d − mean)²)/Σw. Few batches leave that error itself uncertain: t has Student's distribution with n − 1
    degrees of freedom, and z is the value that is as improbable under the normal one (Wallace 1959, Ann. Math. Stat.
    30: z = (8n′ + 1)/(8n′ + 3)·√(n′·ln(1 + t²/n′)), n′ = n − 1), so that one threshold serves any n.

    Args:
        before: mean loss of each batch.
        after: mean loss of the same batches in the other setting.
        sizes: samples of each batch.

    Returns:
        The change; z is 0 where nothing changed or there is one batch only, infinite where all batches changed alike.

    Example:
        >>> change([1.0, 1.0, 1.0], [1.5, 1.4, 1.6], [8, 8, 8]).relative
        0.5
    """
    first, second, weight = (np.asarray(values, np.float64) for values in (before, after, sizes))
    total = float(weight.sum())
    means = float((first * weight).sum()) / total, float((second * weight).sum()) / total
    middle, freedom = means[1] - means[0], len(weight) - 1
    if not math.isfinite(middle) or not freedom or not middle:
        return Change(*means, 0.0 if math.isfinite(middle) else math.nan)
    differences = second - first
    spread = np.sum((weight * (differences - middle)) ** 2) * len(differences) / freedom
    error = math.sqrt(spread) / total
    t = abs(middle) / error if error else math.inf
    z = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t * t / freedom))
    return Change(*means, math.copysign(z, middle))


@dataclass(frozen=True)
class Losses:
    """Mean losses of the same validation batches in all settings; ``(batches,)`` each.

    *Now* and *best* are the weights at the end and at the best validation. *Estimated* statistics are those of the
    setting's own weights on training data: from large batches without dropout, or, in ``as_trained``, from batches of
    the training size with dropout.

    Args:
        sizes: samples of each batch.
        stored: weights of now, running statistics as they are.
        now: weights of now, estimated statistics.
        as_trained: weights of now, statistics estimated as training sees them; None where ``stored`` is as good as
            ``now``, so that there is nothing to explain.
        best: weights of best, estimated statistics; None where now is the best.
        first: weights of best with γ and β of now, estimated statistics; None where that is not needed.
        last: weights of now with γ and β of best, estimated statistics; likewise.
    """

    sizes: Sequence[int]
    stored: Sequence[float]
    now: Sequence[float]
    as_trained: Sequence[float] | None = None
    best: Sequence[float] | None = None
    first: Sequence[float] | None = None
    last: Sequence[float] | None = None

    @property
    def statistics(self) -> Change:
        """What the running statistics as they are do to the loss: lag and mismatch together."""
        return change(self.now, self.stored, self.sizes)

    @property
    def lag(self) -> Change | None:
        """What running statistics that lag behind the weights do to the loss; None where that was not measured."""
        return None if self.as_trained is None else change(self.as_trained, self.stored, self.sizes)

    @property
    def mismatch(self) -> Change | None:
        """What small batches and dropout in training do to the loss through the statistics; None likewise."""
        return None if self.as_trained is None else change(self.now, self.as_trained, self.sizes)

    @property
    def rise(self) -> Change:
        """The rise since the best validation, each with its own estimated statistics."""
        return change(self.now if self.best is None else self.best, self.now, self.sizes)

    @property
    def shares(self) -> tuple[float, float] | None:
        """The part of the rise that γ and β carry: moved first, and moved last.

        The two orders of a two-player Shapley value; their mean is the share, their difference what γ, β and the other
        weights do together. None where they were not measured or there is no rise.
        """
        if self.best is None or self.first is None or self.last is None:
            return None
        alone, both = change(self.best, self.first, self.sizes), self.rise
        without = change(self.best, self.last, self.sizes)
        total = both.after - both.before
        if not total > 0:
            return None
        return (alone.after - alone.before) / total, (both.after - without.after) / total


def effective_samples(differences: Numbers, means: Numbers, pairs: int) -> float:
    """Effective samples per channel m_eff of a BatchNorm layer: how noisy its batch statistics are.

    The standard deviation s of a channel differs from batch to batch. For m independent normal values its coefficient
    of variation is c = 1/√(2(m − 1)), so that m_eff = 1 + 1/(2c²); correlated values, such as pixels of one image,
    count as fewer than there are. c² is taken from pairs of successive steps, E[(s − s′)²]/2 over the squared mean
    (von Neumann 1941), as a drift of s over the steps is no noise.

    Args:
        differences: ``(C,)``, sum over pairs of (s − s′)².
        means: ``(C,)``, sum over pairs of (s + s′)/2; 0 marks a channel that is constant and does not count.
        pairs: number of pairs.

    Returns:
        m_eff by the median of c² over channels, divided by the median of its distribution; NaN without a channel.
    """
    counted = means > 0
    if not pairs or not counted.any():
        return math.nan
    square = (differences[counted] / (2 * pairs)) / (means[counted] / pairs) ** 2
    # The sum of k squared normal values has its median below its mean k: about k(1 - 2/(9k))³ (Wilson & Hilferty 1931).
    middle = float(np.median(square)) / (1 - 2 / (9 * pairs)) ** 3
    return 1 + 1 / (2 * middle) if middle else math.inf
