# SPDX-License-Identifier: Apache-2.0
"""Dropout in front of a BatchNorm layer: in evaluation it meets another variance than it learned."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity

RULE = "dropout-before-batchnorm"
RATE = 0.5
"""Rate from which on it is said. By benchmarks/dropout_shift.py the shift costs a convolutional network 0.3 points of
accuracy at 0.3, 3 points at 0.5; perceptrons up to 0.1 and up to 0.6."""


def dropout_before_batchnorm(layer: str, dropout: str, p: float) -> Finding | None:
    """Judge a dropout whose output reaches a BatchNorm layer through one layer with weights.

    Args:
        layer: module path of the BatchNorm layer.
        dropout: module path of the dropout.
        p: its rate.

    Returns:
        A ``warning`` from a rate of 0.5 on, else None.
    """
    if not RATE <= p < 1:  # at 1 nothing is left to have a variance
        return None
    evidence = (
        f"{dropout} drops {p:.0%} in front of it: in training what this layer sees has up to {1 / (1 - p):.3g} times "
        "the variance that it has in evaluation, where its running statistics are used"
    )
    advice = f"move {dropout} behind the last BatchNorm layer"
    data = {"dropout": dropout, "p": p, "ratio": 1 / (1 - p)}
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=layer, data=data)
