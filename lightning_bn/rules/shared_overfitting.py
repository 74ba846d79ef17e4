# SPDX-License-Identifier: Apache-2.0
"""The network overfits, and γ and β of its BatchNorm layers have a part in it."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.verdict import HALF, Case, percent

RULE = "shared-overfitting"


def shared_overfitting(case: Case) -> Finding | None:
    """Judge whether a rise of the validation loss is carried by γ and β and by the other weights together.

    Args:
        case: the run.

    Returns:
        A ``warning``; None where the network does not overfit, or one of both carries most of it.
    """
    if not case.overfits or case.share is None or case.share[0] >= HALF or case.share[1] < HALF:
        return None
    evidence = (
        f"{case.words()}; putting γ and β alone back to that epoch takes away {percent(*case.share)} of the rise, "
        "depending on what else is put back: γ, β and the other weights overfit together"
    )
    advice = f"stop at epoch {case.best_epoch}; then lower the learning rate of γ and β, and look again"
    return Finding(RULE, Severity.WARNING, evidence, advice, data=case.data())
