# SPDX-License-Identifier: Apache-2.0
"""The network was looked at and does not overfit."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.verdict import RISE, Case

RULE = "no-overfitting"


def no_overfitting(case: Case) -> Finding | None:
    """Say that no overfitting was found, and why.

    Args:
        case: the run.

    Returns:
        An ``info``; None where the network overfits, or may do so.
    """
    if case.overfits or case.unsure:
        return None
    losses = case.losses
    if losses.best is None:
        evidence = f"{case.name} is at its best: {losses.rise.after:.4g} with statistics estimated anew"
    else:
        rise = losses.rise
        reason = (
            f"with statistics estimated anew for both, {case.name} went from {rise.before:.4g} (epoch "
            f"{case.best_epoch}) to {rise.after:.4g} ({rise.relative:+.1%}; overfitting is {RISE:.0%} or more while "
            "the training loss falls)"
        )
        if case.train_fell is False:
            reason += "; the training loss rose too"
        evidence = f"{reason}. γ moved by {case.drift:.0%} of its norm since then: movement alone is not a fault"
    return Finding(RULE, Severity.INFO, evidence, "", data=case.data())
