# SPDX-License-Identifier: Apache-2.0
"""A monitor measures less often than it was asked to, as it took too much of the training time."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity

RULE = "interval-widened"


def interval_widened(share: float, limit: float, before: int, now: int) -> Finding:
    """Say that the interval of a monitor has grown.

    Args:
        share: share of the training time that measuring took.
        limit: largest share that it may take.
        before: steps from one measured step to the next, before.
        now: the same from now on.

    Returns:
        An ``info``.
    """
    evidence = (
        f"measuring every {before} step{'s' if before > 1 else ''} took {share:.1%} of the training time, and "
        f"max_overhead is {limit:.1%}: from now on every {now} steps are measured"
    )
    advice = "set every_n_steps to a larger number, or max_overhead to None, to choose the interval yourself"
    data = {"share": share, "limit": limit, "before": before, "now": now}
    return Finding(RULE, Severity.INFO, evidence, advice, data=data)
