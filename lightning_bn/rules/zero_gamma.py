# SPDX-License-Identifier: Apache-2.0
"""γ = 0 in a BatchNorm layer that closes no residual branch: whatever comes in, β comes out."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.listing import listed, the_one

RULE = "zero-gamma"


def zero_gamma(layers: Sequence[str], *, zero_beta: bool, sure: bool) -> Finding | None:
    """Judge layers whose γ is 0 in every channel.

    Behind a skip connection γ = 0 is a good start (Goyal et al. 2017, sec. 5.1): such layers are not to be given here.

    Args:
        layers: the other layers.
        zero_beta: whether β is 0 in them too.
        sure: whether the forward around them was seen, so that they close no residual branch.

    Returns:
        A ``warning`` where it is sure, else an ``info``; None without layers.
    """
    if not layers:
        return None
    which = "γ = β = 0" if zero_beta else "γ = 0"
    out = "0" if zero_beta else "β"
    evidence = (
        f"{which} in {listed(layers)}: {out} comes out whatever comes in, and no gradient passes to what is in front"
    )
    if zero_beta:
        evidence += "; behind ReLU γ and β get none either and stay 0"
    if not sure:
        evidence += "; whether it closes a residual branch, where that is a good start, was not seen"
    advice = "set γ to 1: lightning_bn.initialize(model) does, and leaves the layers that close a residual branch"
    data = {"layers": list(layers), "zero_beta": zero_beta, "sure": sure}
    severity = Severity.WARNING if sure else Severity.INFO
    return Finding(RULE, severity, evidence, advice, layer=the_one(layers), data=data)
