# SPDX-License-Identifier: Apache-2.0
"""BatchNorm sees other values in training than in evaluation: dropout in front of it, or very small batches."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.verdict import Case

RULE = "mismatched-statistics"
RISE, SURE = 0.05, 3.0
"""Part of the validation loss, and standard errors, by which it is higher with the statistics of training."""


def mismatched_statistics(case: Case, dropout: str | None) -> Finding | None:
    """Judge what dropout and small batches do to the validation loss through the statistics.

    Args:
        case: the run.
        dropout: a dropout module that is active in training; None where there is none.

    Returns:
        An ``info``; None where training and evaluation agree.
    """
    shift = case.losses.mismatch
    if shift is None or not (shift.relative >= RISE and shift.z >= SURE):
        return None
    cause = "small batches" if dropout is None else f"dropout ({dropout}) or small batches"
    evidence = (
        f"{case.name} is {shift.after:.4g} with statistics as training makes them, and {shift.before:.4g} with those "
        f"of large batches without dropout ({shift.relative:+.0%}, {shift.z:.1f} standard errors): {cause} give "
        "BatchNorm other values in training than in evaluation; the running average itself is another matter"
    )
    advice = "use larger batches" if dropout is None else "move dropout behind the last BatchNorm layer"
    return Finding(RULE, Severity.INFO, evidence, advice, data={**case.data(), "dropout": dropout})
