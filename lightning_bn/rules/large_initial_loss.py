# SPDX-License-Identifier: Apache-2.0
"""An untrained classifier is far worse than one that knows nothing."""

from __future__ import annotations

import math

from lightning_bn.findings import Finding, Severity

RULE = "large-initial-loss"


def large_initial_loss(loss: float, expected: float, *, note: float = 4.0, warn: float = 8.0) -> Finding | None:
    """Say that the initial loss is many times that of equal probabilities.

    Args:
        loss: mean cross-entropy of the first training batch, in nats.
        expected: ln C, above 0.
        note: ratio above which it is noted. On digits (benchmarks/initial_loss.py, 20 seeds) He, Xavier, orthogonal,
            naive and torch's own starts have at most 2.2 in perceptrons of 2 to 50 layers with and without BatchNorm;
            residual networks with BatchNorm under He 1.1 to 2.1 at 4 blocks, 1.4 to 3.9 at 10.
        warn: ratio above which it is a warning. Above every healthy start seen: residual networks of 24 blocks with
            BatchNorm under He have up to 6.5. N(0, 1) in a perceptron with BatchNorm overlaps with them (3 to 7.6), in
            a residual network it has 6 to 60; N(0, 1000²) has thousands.

    Returns:
        An ``info`` or a ``warning``; None for a usual loss, and for NaN and infinity, which are other rules' matter.
    """
    ratio = loss / expected
    if not math.isfinite(ratio) or ratio <= note:
        return None
    severity = Severity.WARNING if ratio > warn else Severity.INFO
    evidence = (
        f"the loss of the first batch is {loss:.4g}, {ratio:.3g} times that of equal probabilities ({expected:.4g}): "
        "before its first update the network is sure of wrong answers"
    )
    advice = "draw the weights of the last layer with a smaller standard deviation"
    data = {"loss": loss, "expected": expected, "ratio": ratio}
    return Finding(RULE, severity, evidence, advice, data=data)
