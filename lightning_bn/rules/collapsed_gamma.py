# SPDX-License-Identifier: Apache-2.0
"""Most channels of a BatchNorm layer are switched off by a γ near 0."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity

RULE = "collapsed-gamma"
SMALL, SHARE = 1e-2, 0.3
"""|γ| below which a channel is switched off, and share of such channels above which it is said."""


def collapsed_gamma(layer: str, small: int, channels: int, first: float, decay: float | None) -> Finding | None:
    r"""Judge the γ of one layer that does not close a residual block.

    Args:
        layer: module path.
        small: channels with \|γ\| below 0.01.
        channels: all channels.
        first: share of such channels at the start of the run.
        decay: weight decay on γ, by the optimizer's parameter groups; None where it is not known.

    Returns:
        A ``warning``; None where most channels are on.
    """
    share = small / channels if channels else 0.0
    if share <= SHARE:
        return None
    evidence = (
        f"{small} of {channels} channels have |γ| below {SMALL:g} ({share:.0%}, {first:.0%} at the start): what the "
        "layer puts out there is β, whatever it gets"
    )
    advice = (
        "start γ at 1"
        if first > SHARE
        else "take γ and β out of the weight decay"
        if decay
        else "lower the learning rate of γ"
    )
    if decay:
        evidence += f"; the weight decay on γ is {decay:g}"
    data = {"small": small, "channels": channels, "share": share, "first": first, "decay": decay}
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=layer, data=data)
