# SPDX-License-Identifier: Apache-2.0
"""Whether the network overfits through γ and β was not assessed."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity

RULE = "not-assessed"


def not_assessed(why: str, remedy: str = "") -> Finding:
    """Say that there is no verdict, which is not the same as a good one.

    Args:
        why: the reason.
        remedy: what the user can do about it, if anything.

    Returns:
        An ``info``.
    """
    return Finding(RULE, Severity.INFO, f"whether the network overfits through γ and β was not assessed: {why}", remedy)
