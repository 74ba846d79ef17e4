# SPDX-License-Identifier: Apache-2.0
"""Units of a rectifier are 0 whatever the network is shown."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity

RULE = "dead-units"
SAMPLES = 512
"""Fewest samples in which a unit that is never active is called dead."""
NOTE, SHARE, MORE = 0.5, 0.85, 0.2
"""Share of dead units above which it is noted, and above which it is a warning, if it is larger by so much than in the
first window. By benchmarks/signals.py networks that train have up to 0.81, those that do not almost 1."""
ALWAYS = 0.9
"""Share from which on it is said in any case."""
NARROW = 8
"""Most units of a layer in which chance alone can shut them all: the squeezed layer of a gate, which the network can
do without."""


def dead_units(layer: str, dead: int, units: int, samples: int, first: float | None) -> Finding | None:
    """Judge how many units of one rectifier were active over a window of samples.

    Args:
        layer: module path of the rectifier.
        dead: units that were active in no sample of the window and at no position.
        units: all units: features of a linear layer, channels of a convolution.
        samples: samples in the window that this layer was given; below 512 nothing is said.
        first: share of dead units in the first window of the run; None if this is the first.

    Returns:
        An ``info``, a ``warning`` or, where all are dead, an ``error``; of a layer of at most 8 units an ``info`` where
        all are dead; else None.
    """
    if samples < SAMPLES or not 0 < dead <= units:
        return None
    share = dead / units
    rose = first is not None and share >= first + MORE
    grave = share > ALWAYS or (rose and share > SHARE)
    if not (grave or (rose and share > NOTE)) or (units <= NARROW and dead < units):
        return None
    before = "" if first is None else f", {first:.0%} in the first window of the run"
    evidence = (
        f"{dead} of {units} units were active in none of {samples} samples ({share:.0%}{before}): "
        "their output is 0, and no gradient comes through them"
    )
    severity = Severity.WARNING if grave and units > NARROW else Severity.INFO
    if dead == units:
        severity = Severity.ERROR if units > NARROW else Severity.INFO
        evidence += "; the output of the layer is the same for every sample"
    early = first is None or first > ALWAYS
    advice = "start the biases in front of this layer at 0" if early else "lower the learning rate"
    data = {"dead": dead, "units": units, "samples": samples, "share": share, "first": first}
    return Finding(RULE, severity, evidence, advice, layer=layer, data=data)
