# SPDX-License-Identifier: Apache-2.0
"""A layer pattern that the user gave matches no module."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bn.findings import Finding, Severity

RULE = "unmatched-layers"


def unmatched_layers(glob: str, nearest: Sequence[str]) -> Finding:
    """Say which pattern matched nothing, and what names there are.

    Args:
        glob: the pattern as given.
        nearest: the names that look most like it.

    Returns:
        A ``warning``.
    """
    names = ", ".join(name or "(the model itself)" for name in nearest) or "none"
    evidence = f"layers needs patterns that match a module name, got {glob!r}, which matches none"
    return Finding(RULE, Severity.WARNING, evidence, f"the nearest names are: {names}", data={"glob": glob})
