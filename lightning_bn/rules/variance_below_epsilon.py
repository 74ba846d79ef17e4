# SPDX-License-Identifier: Apache-2.0
"""What a BatchNorm layer normalises varies so little that its ε, not the variance, sets the scale."""

from __future__ import annotations

import math

from lightning_bn.findings import Finding, Severity

RULE = "variance-below-epsilon"
NOTE, WARN = 10.0, 1.0
"""Variance over ε below which it is noted, and below which it is a warning. By benchmarks/signals.py networks at 1.6
train as fast as at 10,000."""
SETTLED = 50
"""Optimizer steps before which it is only noted: weights that start too small grow within 20."""


def variance_below_epsilon(
    layer: str, variance: float, eps: float, *, step: int | None = None, data: bool = False
) -> Finding | None:
    """Judge the batch variance of the input of one BatchNorm layer.

    Args:
        layer: module path of the BatchNorm layer.
        variance: median over its channels of the biased batch variance of its input.
        eps: its ε.
        step: optimizer steps taken before; None where that is not known, and taken for many.
        data: whether the layer is given the data themselves, with no layer with weights in front. Of sparse ones half
            the channels are constant in a batch, which is only noted.

    Returns:
        An ``info`` below ten times ε, a ``warning`` below ε after the first 50 steps; else None.
    """
    if not (eps > 0 and 0 <= variance < NOTE * eps):
        return None
    below = variance < WARN * eps
    lasting = (step is None or step >= SETTLED) and not (data and variance == 0)
    severity = Severity.WARNING if below and lasting else Severity.INFO
    left = math.sqrt(variance / (variance + eps))
    if variance:
        evidence = (
            f"the median over the channels of the batch variance of its input is {variance:.3g}, {variance / eps:.3g} "
            f"times its ε ({eps:.3g}): its output has {left:.1%} of the standard deviation that γ asks for"
        )
    else:
        evidence = (
            "at least half of the channels of its input are constant (median batch variance 0): there its output is β, "
            "the same for every sample, as behind weights that are all 0 or units that are dead"
        )
    advice = "bring the input of this layer to a standard deviation of about 1" if below else ""
    numbers = {"variance": variance, "eps": eps, "left": left}
    return Finding(RULE, severity, evidence, advice, layer=layer, data=numbers)
