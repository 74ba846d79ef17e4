# SPDX-License-Identifier: Apache-2.0
"""A BatchNorm layer's running statistics hold NaN or infinity."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.stats.finite import Census

RULE = "poisoned-running-statistics"


def poisoned_running_statistics(layer: str, before: Census, after: Census, *, used: bool) -> Finding | None:
    """Judge running mean and variance of one layer, taken together.

    They stay non-finite for ever: each update keeps a share of the old value. The loss need not show it, since
    training normalises by the batch; a variance that overflowed makes the layer's output constant.

    Args:
        layer: module path.
        before: census before the forward pass.
        after: census after it.
        used: whether the layer ran in this pass; statistics of a layer that never runs harm nobody.

    Returns:
        An ``error``, or None if they are finite or the layer did not run.
    """
    if after.is_finite or not used:
        return None
    since = "they were finite before" if before.is_finite else "they were not finite before either"
    evidence = f"running statistics after the forward pass: {after.describe()}; {since}"
    advice = "rescale what feeds this layer, then call reset_running_stats() on it"
    data = {
        "nan": after.nan,
        "posinf": after.posinf,
        "neginf": after.neginf,
        "finite_before": before.is_finite,
    }
    return Finding(RULE, Severity.ERROR, evidence, advice, layer=layer, data=data)
