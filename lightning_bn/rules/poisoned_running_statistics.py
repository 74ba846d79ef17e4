# SPDX-License-Identifier: Apache-2.0
"""A BatchNorm layer's running statistics hold NaN."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.stats.finite import Census

RULE = "poisoned-running-statistics"


def poisoned_running_statistics(layer: str, before: Census, after: Census, *, used: bool) -> Finding | None:
    """Judge running mean and variance of one layer, taken together, where one of them holds NaN.

    They stay so for ever: each update keeps a share of the old value. The training loss need not show it, since
    training normalises by the batch; in eval mode every output of the channel is NaN.

    Args:
        layer: module path.
        before: census before the forward pass, or at the last look.
        after: census now.
        used: whether the layer ran in this pass; statistics of a layer that never runs harm nobody.

    Returns:
        An ``error``, or None if none is NaN or the layer did not run.
    """
    if not after.nan or not used:
        return None
    since = "they were finite before" if before.is_finite else "they were not finite before either"
    evidence = f"running mean and variance: {after.describe()}; {since}; in eval mode these channels are NaN"
    advice = "keep the batch that did it out (it is not finite), then call reset_running_stats() on this layer"
    data = {
        "nan": after.nan,
        "posinf": after.posinf,
        "neginf": after.neginf,
        "finite_before": before.is_finite,
    }
    return Finding(RULE, Severity.ERROR, evidence, advice, layer=layer, data=data)
