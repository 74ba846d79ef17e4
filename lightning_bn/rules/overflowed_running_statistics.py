# SPDX-License-Identifier: Apache-2.0
"""A BatchNorm layer's running statistics are infinite: the values were finite, their squares were not."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.stats.finite import Census

RULE = "overflowed-running-statistics"


def overflowed_running_statistics(layer: str, before: Census, after: Census, *, used: bool) -> Finding | None:
    """Judge running mean and variance of one layer, taken together, where neither holds NaN.

    Args:
        layer: module path.
        before: census before the forward pass, or at the last look.
        after: census now.
        used: whether the layer ran since; statistics of a layer that never runs harm nobody.

    Returns:
        An ``error``, or None where no value is infinite, one is NaN, or the layer did not run.
    """
    if after.is_finite or after.nan or not used:
        return None
    since = "they were finite before" if before.is_finite else "they were not finite before either"
    evidence = (
        f"running mean and variance: {after.describe()}; {since}. Such a channel puts out β alone, whatever comes in: "
        "neither the loss nor the gradients show it"
    )
    data = {
        "nan": after.nan,
        "posinf": after.posinf,
        "neginf": after.neginf,
        "count": after.count,
        "finite_before": before.is_finite,
    }
    advice = "make what feeds this layer smaller (weights, input scale), then call reset_running_stats() on it"
    return Finding(RULE, Severity.ERROR, evidence, advice, layer=layer, data=data)
