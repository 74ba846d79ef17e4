# SPDX-License-Identifier: Apache-2.0
"""γ and β learn much faster than the weights."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity

RULE = "fast-affine"
RATIO = 10.0


def fast_affine(affine: float, weights: float) -> Finding | None:
    """Judge the learning rate of γ and β against that of the weights, of one kind of optimizer.

    Args:
        affine: largest learning rate of a parameter group that holds γ or β.
        weights: largest learning rate of a group that holds weight matrices or kernels.

    Returns:
        A ``warning`` from a ratio of 10 on, else None.
    """
    if weights <= 0 or affine < RATIO * weights:
        return None
    evidence = (
        f"γ and β learn at a rate of {affine:g}, the weights at {weights:g}: {affine / weights:,.0f} times as fast. On "
        "small data γ and β that are much faster than the weights can become the way by which a network overfits"
    )
    advice = "give γ and β the learning rate of the weights"
    return Finding(RULE, Severity.WARNING, evidence, advice, data={"affine": affine, "weights": weights})
