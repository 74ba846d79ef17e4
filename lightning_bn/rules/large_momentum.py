# SPDX-License-Identifier: Apache-2.0
"""A momentum that makes the running statistics those of the last batch or two."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.listing import listed, the_one

RULE = "large-momentum"
LARGE = 0.5
"""Momentum above which it is a warning: an exponential average of momentum m has the variance of a mean over
(2 - m) / m batches, 19 at 0.1, 3 at 0.5, 1.2 at 0.9."""


def large_momentum(momenta: Mapping[str, float]) -> Finding | None:
    """Judge the momentum of running statistics.

    Args:
        momenta: momentum of each BatchNorm layer that updates running statistics.

    Returns:
        A ``warning`` where one is above 0.5, else None.
    """
    large = {layer: momentum for layer, momentum in momenta.items() if momentum > LARGE}
    if not large:
        return None
    layers, top = list(large), max(large.values())
    low = min(large.values())
    shown = f"{top:g}" if low == top else f"{low:g} to {top:g}"
    evidence = (
        f"momentum {shown} in {listed(layers)}: in torch it is the weight of the newest batch, so that running "
        f"statistics are as noisy as a mean over {max(2 - top, 0) / top:.1f} batches"
    )
    advice = "set momentum to 0.1 (in Keras it is the weight of the past: a momentum of 0.9 there is 0.1 here)"
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=the_one(layers), data={"momenta": large})
