# SPDX-License-Identifier: Apache-2.0
"""A pattern that the user gave matches nothing in the model."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bn.findings import Finding, Severity

RULE = "unmatched-layers"


def unmatched_layers(
    glob: str, nearest: Sequence[str], *, argument: str = "layers", what: str = "a module name"
) -> Finding:
    """Say which pattern matched nothing, and what names there are.

    Args:
        glob: the pattern as given.
        nearest: the names that look most like it.
        argument: the argument that it was given to.
        what: what a pattern of that argument has to match.

    Returns:
        A ``warning``.
    """
    names = ", ".join(name or "(the model itself)" for name in nearest) or "none"
    evidence = f"{argument} needs patterns that match {what}, got {glob!r}, which matches none"
    data = {"glob": glob, "argument": argument}
    return Finding(RULE, Severity.WARNING, evidence, f"the nearest names are: {names}", data=data)
