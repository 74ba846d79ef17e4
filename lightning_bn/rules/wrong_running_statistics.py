# SPDX-License-Identifier: Apache-2.0
"""Running statistics of BatchNorm do not suit the weights that they are used with."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.verdict import Case

RULE = "wrong-running-statistics"
RISE, SURE = 0.25, 2.0
"""Part of the validation loss, and standard errors, by which it is higher than with statistics estimated anew."""
USUAL, GRAVE = (0.02, 0.5), 1.0
"""Momenta between which nobody made a mistake, and the part above which it is a warning with those too: with a high
learning rate the average lags behind in a healthy network."""


def wrong_running_statistics(case: Case, momenta: dict[str, float | None]) -> Finding | None:
    """Judge what the running averages of mean and variance do to the validation loss.

    Args:
        case: the run.
        momenta: momentum of each BatchNorm layer.

    Returns:
        A ``warning``; an ``info`` where the momentum is usual and the loss not twice as high; None where they suit the
        weights.
    """
    lag = case.losses.lag
    if lag is None or not (lag.relative >= RISE and lag.z >= SURE):
        return None
    evidence = (
        f"{case.name} is {lag.after:.4g} with the running statistics as they are, and {lag.before:.4g} with statistics "
        f"estimated anew from training batches ({lag.relative:+.0%}, {lag.z:.1f} standard errors): the validation "
        "curve shows the lag of the statistics, be the weights as they may"
    )
    kinds = sorted({"None" if value is None else f"{value:g}" for value in momenta.values()})
    data = {**case.data(), "momentum": kinds}
    usual = all(value is None or USUAL[0] <= value <= USUAL[1] for value in momenta.values())
    severity = Severity.INFO if usual and lag.relative < GRAVE else Severity.WARNING
    return Finding(RULE, severity, f"{evidence} (momentum {', '.join(kinds)})", _advice(momenta), data=data)


def _advice(momenta: dict[str, float | None]) -> str:
    known = [value for value in momenta.values() if value is not None]
    if known and max(known) > USUAL[1]:
        return "set momentum to 0.1: in PyTorch it is the weight of the new batch, 0.9 in Keras is 0.1 here"
    if known and min(known) < USUAL[0]:
        return "set momentum to 0.1, or train for more steps, or add PreciseBatchNorm"
    return "add PreciseBatchNorm, or lower the learning rate towards the end"
