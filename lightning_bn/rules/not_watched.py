# SPDX-License-Identifier: Apache-2.0
"""Something that a monitor was meant to watch is out of its sight."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity

RULE = "not-watched"


def not_watched(what: str, why: str, remedy: str = "", *, layer: str | None = None) -> Finding:
    """Say that something was not looked at: a monitor is never silently off.

    Args:
        what: what is not watched.
        why: the reason.
        remedy: what the user can do about it, if anything.
        layer: module path, if one layer is meant.

    Returns:
        An ``info``.
    """
    return Finding(RULE, Severity.INFO, f"{what} is not watched: {why}", remedy, layer=layer)
