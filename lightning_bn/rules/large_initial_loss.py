# SPDX-License-Identifier: Apache-2.0
"""An untrained classifier is far worse than one that knows nothing."""

from __future__ import annotations

import math

from lightning_bn.findings import Finding, Severity

RULE = "large-initial-loss"


def large_initial_loss(loss: float, expected: float, *, note: float = 2.0, warn: float = 5.0) -> Finding | None:
    """Say that the initial loss is many times that of equal probabilities.

    Args:
        loss: mean cross-entropy of the first training batch.
        expected: ln C.
        note: ratio above which it is noted. He, Xavier and naive starts lie at 1.0 to 1.5 in digits networks of 5 to 50
            layers with and without BatchNorm.
        warn: ratio above which it is a warning: N(0, 1) behind BatchNorm has about 6, N(0, 1000²) about 6000.

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
    advice = "start the last layer smaller: he or xavier, or a smaller standard deviation for it alone"
    data = {"loss": loss, "expected": expected, "ratio": ratio}
    return Finding(RULE, severity, evidence, advice, data=data)
