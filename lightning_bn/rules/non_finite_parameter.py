# SPDX-License-Identifier: Apache-2.0
"""A weight is NaN or infinite before the first step."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.stats.finite import Census

RULE = "non-finite-parameter"


def non_finite_parameter(name: str, seen: Census, *, spread: bool) -> Finding | None:
    """Judge one parameter, or one buffer that is no running statistic, before the forward pass.

    Values of -inf alone pass: masks are kept in parameters and buffers.

    Args:
        name: path of the parameter or buffer in the model.
        seen: its census.
        spread: whether outputs, loss or running statistics became non-finite in the same pass.

    Returns:
        An ``error`` if it spread; a ``warning`` if this pass did not use it; None if it is clean.
    """
    if seen.level < 2:  # noqa: PLR2004  (Census.level: 2 is NaN or +inf)
        return None
    data = {"name": name, "nan": seen.nan, "posinf": seen.posinf, "neginf": seen.neginf, "largest": seen.largest}
    evidence = f"{name}: {seen.describe()} before the forward pass"
    if not spread:
        evidence += "; nothing else that is not finite was traced to it"
    severity = Severity.ERROR if spread else Severity.WARNING
    advice = "look at how it was initialised or from which checkpoint it was loaded"
    return Finding(RULE, severity, evidence, advice, layer=name.rpartition(".")[0], data=data)
