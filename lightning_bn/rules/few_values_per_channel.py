# SPDX-License-Identifier: Apache-2.0
"""BatchNorm without spatial extent on small batches: its statistics are noise."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.listing import listed, the_one

RULE = "few-values-per-channel"
FEW = 6
NOTED = 16
"""Values for each channel below which it is a warning, and a note. A variance from m independent values is known to
a share of √(2 / (m - 1)) of itself: 140 % at 2, 63 % at 6, 37 % at 16."""


def few_values_per_channel(layers: Sequence[str], values: int) -> Finding | None:
    """Judge how many values a batch gives for each channel where it gives one for each sample.

    Args:
        layers: BatchNorm layers in training mode that see one value for each sample and channel.
        values: samples that one statistic is taken over, at least 2: of all processes where they are synchronised.

    Returns:
        A ``warning`` below 6, an ``info`` below 16, else None.
    """
    if not layers or not 1 < values < NOTED:
        return None
    spread = (2 / (values - 1)) ** 0.5
    evidence = (
        f"{listed(layers)}: mean and variance come from {values} values for each channel; such a variance is known to "
        f"± {spread:.0%} (one standard deviation, of independent normal values)"
    )
    advice = "larger batches, or GroupNorm or LayerNorm in place of it; accumulating gradients does not change it"
    data = {"layers": list(layers), "values": values}
    severity = Severity.WARNING if values < FEW else Severity.INFO
    return Finding(RULE, severity, evidence, advice, layer=the_one(layers), data=data)
