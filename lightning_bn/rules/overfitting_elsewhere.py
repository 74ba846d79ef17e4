# SPDX-License-Identifier: Apache-2.0
"""The network overfits, and not through γ and β of its BatchNorm layers."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.verdict import HALF, Case

RULE = "overfitting-elsewhere"


def overfitting_elsewhere(case: Case) -> Finding | None:
    """Judge whether a rise of the validation loss is carried by other weights than γ and β.

    Args:
        case: the run.

    Returns:
        A ``warning``; None where the network does not overfit, or γ and β may carry half of it.
    """
    if not case.overfits or case.share is None or case.share[1] >= HALF:
        return None
    evidence = (
        f"{case.words()}; putting γ and β alone back to that epoch takes away at most {max(case.share[1], 0):.0%} of "
        f"the rise, though γ moved by {case.drift:.0%} of its norm: the overfitting is not carried by γ and β"
    )
    advice = (
        f"stop at epoch {case.best_epoch}, or use augmentation, dropout, weight decay or more data; freezing γ and β "
        "is unlikely to help"
    )
    return Finding(RULE, Severity.WARNING, evidence, advice, data=case.data())
