# SPDX-License-Identifier: Apache-2.0
"""The loss is NaN or infinite although every module output is finite."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.stats.finite import Census

RULE = "non-finite-loss"


def non_finite_loss(loss: Census) -> Finding | None:
    """Judge the loss when no input, parameter or module explains it.

    Args:
        loss: census of the loss.

    Returns:
        An ``error``, or None if the loss is finite.
    """
    if loss.is_finite:
        return None
    kind = "NaN" if loss.nan else "+inf" if loss.posinf else "-inf"
    evidence = f"the loss is {kind}; inputs, parameters and every module output are finite"
    advice = "look in training_step after the forward pass: a logarithm of 0, a root, or a mean over nothing"
    data = {"nan": loss.nan, "posinf": loss.posinf, "neginf": loss.neginf}
    return Finding(RULE, Severity.ERROR, evidence, advice, data=data)
