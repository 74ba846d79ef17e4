# SPDX-License-Identifier: Apache-2.0
"""An operation's result is beyond the range of its dtype."""

from __future__ import annotations

import torch

from lightning_bn.findings import Finding, Severity
from lightning_bn.operations import Fault
from lightning_bn.rules.account import before_it, growth, inputs_of, outcome_of, place_of, plain

RULE = "overflow-by-range"
EXPONENTIALS = frozenset({"exp", "exp2", "expm1", "sinh", "cosh", "exponential"})
NARROW = 1e6  # between the largest float16 (65504) and the largest float32 and bfloat16 (3.4e38)


def overflow_by_range(fault: Fault, *, after: str) -> Finding:
    """Report where values outgrew their dtype.

    Args:
        fault: the operation; in float64 it is finite, or it is an exponential.
        after: what became of the step, in words.

    Returns:
        An ``error``.
    """
    end = range_of(fault)
    how = "; in float64 the same operation is finite" if fault.wide == "finite" else ""
    direction = (
        f", backward of what ran {place_of(fault.operation)}"
        if fault.operation.node
        else f" {place_of(fault.operation)}"
    )
    factor = growth(fault.sizes)
    grew = "" if factor is None else f"; the largest value grew by {factor:.3g} a layer up to here"
    evidence = (
        f"{fault.operation.name}{direction}: {outcome_of(fault.output)}, beyond the range of {fault.output.dtype} "
        f"(largest {end:.5g}), out of {inputs_of(fault)}{how}{grew}{before_it(fault)}; {after}"
    )
    layer = fault.operation.spot.layer or None
    return Finding(RULE, Severity.ERROR, evidence, _advice(fault), layer=layer, data=plain(fault))


def is_overflow(fault: Fault) -> bool:
    """Whether values were too large for their dtype, and no operation was undefined for them."""
    infinite = fault.output.seen is not None and bool(fault.output.seen.posinf + fault.output.seen.neginf)
    return fault.wide == "finite" or (is_exponential(fault) and infinite)


def is_exponential(fault: Fault) -> bool:
    """Whether the operation grows so fast that no dtype is wide enough."""
    return fault.operation.name.removesuffix("_") in EXPONENTIALS


def range_of(fault: Fault) -> float:
    """Largest number of the output's dtype."""
    return float(torch.finfo(getattr(torch, fault.output.dtype)).max) if hasattr(torch, fault.output.dtype) else 0.0


def is_narrow(fault: Fault) -> bool:
    """Whether the dtype itself is to blame: float16, whose range ends at 65504."""
    return range_of(fault) < NARROW


def _advice(fault: Fault) -> str:
    if is_exponential(fault):
        return "subtract the maximum before the exponential (logsumexp and softmax do), or clamp its argument"
    if is_narrow(fault):
        return "use bfloat16 or float32 for this operation, or smaller weights in front of it"
    return "bound what comes in: a norm layer, a smaller start, or a clamp"
