# SPDX-License-Identifier: Apache-2.0
"""BatchNorm layers take the same batch into their running statistics more than once."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_bn.findings import Finding, Severity

RULE = "statistics-updated-twice"


def statistics_updated_twice(repeated: Mapping[str, int], momentum: float | None) -> Finding | None:
    """Judge updates of running statistics that no forward pass of the step's own made.

    Args:
        repeated: by layer the number of such updates in the batches that were looked at.
        momentum: of the first of these layers.

    Returns:
        An ``info``; None where there were none.
    """
    if not repeated:
        return None
    layer = next(iter(repeated))
    evidence = (
        f"{len(repeated)} BatchNorm layers took batches into their running statistics more often than they were "
        f"called, first {layer}: backward ran them again, as activation checkpointing does"
    )
    if momentum is not None:
        evidence += f"; momentum {momentum:g} acts as {1 - (1 - momentum) ** 2:.2g}"
    advice = "nothing, or half the momentum of these layers"
    return Finding(RULE, Severity.INFO, evidence, advice, layer=layer, data={"repeated": dict(repeated)})
