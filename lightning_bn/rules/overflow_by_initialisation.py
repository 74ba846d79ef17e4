# SPDX-License-Identifier: Apache-2.0
"""The initial weights make the signal so large that it leaves the range of its dtype."""

from __future__ import annotations

import torch

from lightning_bn.findings import Finding, Severity
from lightning_bn.operations import Fault
from lightning_bn.outlook import Prediction
from lightning_bn.rules.account import growth, inputs_of, outcome_of, place_of, plain

RULE = "overflow-by-initialisation"
GROWTH = 2.0
"""Growth of the largest value per layer from which a start is blamed; He keeps it near 1, N(0, 1) has √(fan/2)."""


def overflow_by_initialisation(ahead: Prediction | None, scheme: str) -> Finding | None:
    """Say where the first forward pass is predicted to overflow.

    Args:
        ahead: the prediction; None is none.
        scheme: what initialised the weights; a number is the standard deviation of a normal.

    Returns:
        A ``warning`` for the layer; None without a prediction.
    """
    if ahead is None:
        return None
    dtype, widest = _name(ahead.dtype), torch.promote_types(ahead.dtype, torch.float32)
    size = f"root mean square 10^{ahead.log10_rms:.1f}"
    if ahead.kind == "variance":
        end = f"what {ahead.layer} normalises has {size}: its variance is beyond {_range(widest)}"
    else:
        end = f"its output has {size} and values beyond {_range(ahead.dtype)}"
    evidence = (
        f"{_drawn(scheme)} multiplies the signal by {ahead.growth:.4g} in layer {ahead.place} of {ahead.of}; {end}. "
        "Predicted from the weights alone: input of root mean square 1, layers in module order, no skip connections"
    )
    advice = "initialise with he, which keeps the size of the signal from layer to layer"
    data = {
        "place": ahead.place,
        "of": ahead.of,
        "growth": ahead.growth,
        "log10_rms": ahead.log10_rms,
        "dtype": dtype,
        "kind": ahead.kind,
        "scheme": scheme,
    }
    return Finding(RULE, Severity.WARNING, evidence, advice, ahead.layer, data=data)


def overflowed_at_start(fault: Fault) -> Finding | None:
    """Judge whether an overflow in the very first step is the end of a signal that grew from layer to layer.

    Args:
        fault: the operation whose result overflowed; in float64 it is finite.

    Returns:
        An ``error`` where the largest value of the layers before grew by at least :data:`GROWTH` a layer; else None.
    """
    factor = growth(fault.sizes)
    if factor is None or factor < GROWTH:
        return None
    place, last = len(fault.sizes) + 1, fault.sizes[-1][1]
    evidence = (
        f"{fault.operation.name} {place_of(fault.operation)}: {outcome_of(fault.output)}, beyond the range of "
        f"{fault.output.dtype}; in the first step, with the weights it started from, the largest value grew by "
        f"{factor:.4g} a layer from {fault.sizes[0][1]:.3g} behind {fault.sizes[0][0]} to {last:.3g} behind "
        f"{fault.sizes[-1][0]}, and this is layer {place}; its inputs: {inputs_of(fault)}"
    )
    advice = "initialise with he (WeightInit('he')), which keeps the size of the signal from layer to layer"
    data = {**plain(fault), "place": place, "growth": factor, "dtype": fault.output.dtype}
    return Finding(RULE, Severity.ERROR, evidence, advice, fault.operation.spot.layer or None, data=data)


def _drawn(scheme: str) -> str:
    try:
        return f"N(0, {float(scheme):g}²)"
    except ValueError:
        return scheme


def _range(dtype: torch.dtype) -> str:
    return f"the range of {_name(dtype)} (largest {torch.finfo(dtype).max:.5g})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
