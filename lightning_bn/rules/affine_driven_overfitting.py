# SPDX-License-Identifier: Apache-2.0
"""The network overfits, and γ and β of its BatchNorm layers are what carries it."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.verdict import HALF, Case, percent

RULE = "affine-driven-overfitting"


def affine_driven_overfitting(case: Case) -> Finding | None:
    """Judge whether γ and β alone make up most of a rise of the validation loss.

    Args:
        case: the run.

    Returns:
        A ``warning``; None where the network does not overfit, or γ and β carry less than half of it.
    """
    if not case.overfits or case.share is None or case.share[0] < HALF:
        return None
    low, high = case.share
    evidence = (
        f"{case.words()}; putting γ and β alone back to that epoch takes away {percent(low, high)} of the rise: "
        "γ and β drive the overfitting"
    )
    advice = (
        f"take the checkpoint of epoch {case.best_epoch}, and give γ and β the learning rate of the weights or a lower "
        "one, or freeze them from there on"
    )
    return Finding(RULE, Severity.WARNING, evidence, advice, data=case.data())
