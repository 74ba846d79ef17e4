# SPDX-License-Identifier: Apache-2.0
"""A bounded nonlinearity stands at its bounds, where it passes almost no gradient."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity

RULE = "saturated-units"
SHARE = {"tanh": 0.65, "softsign": 0.65, "hardtanh": 0.65, "sigmoid": 0.5, "hardsigmoid": 0.5}
"""Share of saturated values from which on it is said of the first window. benchmarks/signals.py: healthy networks start
with 0.10 at most; N(0, 1) has at least 0.73 with tanh, 0.56 with sigmoid."""
UNITS = 0.9
"""Share of saturated units from which on it is said of a later window. Healthy layers become steep while they learn, up
to 0.85 of the values of hidden ones, but their units still move."""
VALUES_OF, UNITS_OF = 32, 512
"""Fewest samples for a share of values, and for units."""


def saturated_units(  # noqa: PLR0917  (what is known of one window, in the order in which it is told)
    layer: str,
    kind: str,
    share: float,
    saturated: int,
    units: int,
    samples: int,
    first: float | None,
    *,
    last: bool = False,
    direct: bool = True,
) -> Finding | None:
    """Judge how many values of one bounded nonlinearity passed almost no gradient in a window.

    Args:
        layer: module path of the nonlinearity.
        kind: ``tanh``, ``sigmoid``, ``hardtanh``, ``hardsigmoid`` or ``softsign``.
        share: share of the values that pass almost no gradient: beyond 0.99 of the range to one side for tanh, outside
            0.01 to 0.99 for sigmoid, beyond 0.9 for softsign, outside the linear part for the hard ones.
        saturated: units of whose values at least 99 % are such.
        units: all units: features of a linear layer, channels of a convolution.
        samples: samples in the window.
        first: ``share`` in the first window of the run; None if this is the first.
        last: whether it is the last nonlinearity in front of the output, or ends a part that produces something of its
            own, such as a generator. There saturation means being sure, and nothing is said.
        direct: whether a layer with weights or a norm takes the output as it is (through dropout, pooling, reshaping).
            A gate, whose output is a factor, may stand open or closed, and nothing is said.

    Returns:
        A ``warning``, else None.
    """
    limit = SHARE.get(kind)
    if limit is None or last or not direct or units < 1 or samples < VALUES_OF:
        return None
    early = first is None or first >= limit
    if not (share >= limit if early else samples >= UNITS_OF and saturated / units >= UNITS):
        return None
    before = "" if first is None else f", {first:.0%} in the first window of the run"
    evidence = (
        f"{share:.0%} of the values of this {kind} are at its bounds, where it passes almost no gradient{before}; "
        f"{saturated} of {units} units are there in at least 99 % of {samples} samples"
    )
    advice = "initialise the weights in front with Xavier's scheme" if early else "lower the learning rate"
    data = {"kind": kind, "share": share, "saturated": saturated, "units": units, "samples": samples, "first": first}
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=layer, data=data)
