# SPDX-License-Identifier: Apache-2.0
"""The batch statistics of a BatchNorm layer are noise to a good part."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from lightning_bn.findings import Finding, Severity

RULE = "noisy-batch-statistics"
NOISY, SEVERE, ALONE = 16.0, 6.0, 3.0
"""Effective samples per channel below which a layer is noted; below which it is a warning where the layers have so few
in their median; and below which it is one where a single layer has."""
FEWEST = 8
"""Pairs of steps below which the noise is not known."""


def noisy_batch_statistics(effective: Mapping[str, float], pairs: int) -> Finding | None:
    """Judge how many independent values each channel of a BatchNorm layer is normalised by.

    Args:
        effective: m_eff by layer, from :func:`~lightning_bn.stats.attribution.effective_samples`.
        pairs: pairs of steps that it was measured on.

    Returns:
        An ``info`` or a ``warning`` about the noisiest layer; None where all have enough, or too little was seen.
    """
    known = {name: value for name, value in effective.items() if value == value}  # noqa: PLR0124  (not NaN)
    if pairs < FEWEST or not known or min(known.values()) >= NOISY:
        return None
    worst = min(known, key=lambda name: known[name])
    few = sum(value < NOISY for value in known.values())
    evidence = (
        f"{known[worst]:.1f} effective samples per channel, by how much its batch standard deviation varies over "
        f"{pairs} pairs of steps; {few} of {len(known)} BatchNorm layers have fewer than {NOISY:g}"
    )
    advice = "use larger batches, SyncBatchNorm or GroupNorm; accumulating gradients does not change it"
    grave = median(known.values()) < SEVERE or known[worst] < ALONE
    severity = Severity.WARNING if grave else Severity.INFO
    data = {"effective": dict(effective), "pairs": pairs}
    return Finding(RULE, severity, evidence, advice, layer=worst, data=data)
