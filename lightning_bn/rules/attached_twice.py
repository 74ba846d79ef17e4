# SPDX-License-Identifier: Apache-2.0
"""A monitor stands twice among the callbacks of a trainer."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity

RULE = "attached-twice"


def attached_twice(name: str, added_by: str | None = None) -> Finding:
    """Say that a callback leaves the work to another one.

    Args:
        name: class of the callback.
        added_by: what attached it, if neither the user's code nor config did.

    Returns:
        An ``info``.
    """
    if added_by:
        evidence = f"{name} is among the callbacks already; the one that {added_by} adds stays off"
        return Finding(RULE, Severity.INFO, evidence, "", data={"added_by": added_by})
    evidence = f"{name} stands twice among the callbacks, with the same arguments; the second one stays off"
    advice = "give a recipe once; a saved config.yaml already contains the recipe that was used with it"
    return Finding(RULE, Severity.INFO, evidence, advice)
