# SPDX-License-Identifier: Apache-2.0
"""A module turns finite inputs into NaN or infinity."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_bn.findings import Finding, Severity
from lightning_bn.first_pass import Call

RULE = "non-finite-output"


def non_finite_output(calls: Sequence[Call], *, harmless: bool) -> Finding | None:
    """Name the first module, in the order of execution, whose output is not finite while its inputs were.

    A module is heard when it returns, so the innermost one comes first; a container is named where its own code,
    between its submodules, made the value.

    Args:
        calls: the forward calls in the order in which they returned.
        harmless: whether the step went on, with a finite loss and finite running statistics.

    Returns:
        An ``error``, a ``warning`` where it was harmless, None where no module is to blame.
    """
    culprit = next((call for call in calls if call.is_culprit), None)
    if culprit is None:
        return None
    severity = Severity.WARNING if harmless else Severity.ERROR
    name = culprit.layer or "the model's own forward"
    evidence = (
        f"{name} ({culprit.kind}): {culprit.outputs.describe()} in its output ({_plain(culprit.dtype)}); its inputs "
        f"were finite, largest |x| {culprit.inputs.largest:.3g}, shapes {_shapes(culprit)}"
    )
    if culprit.largest_weight is not None:
        evidence += f"; largest |weight| {culprit.largest_weight:.3g}"
    if harmless:
        evidence += "; the loss is finite all the same"
    data = {
        "kind": culprit.kind,
        "dtype": _plain(culprit.dtype),
        "nan": culprit.outputs.nan,
        "posinf": culprit.outputs.posinf,
        "neginf": culprit.outputs.neginf,
        "largest_input": culprit.inputs.largest,
        "largest_weight": culprit.largest_weight,
        "shapes": [list(shape) for shape in culprit.shapes],
    }
    return Finding(RULE, severity, evidence, _advice(culprit), layer=culprit.layer, data=data)


def _advice(call: Call) -> str:
    top = torch.finfo(call.dtype).max
    if not call.outputs.nan and (call.outputs.posinf or call.outputs.neginf) and call.outputs.largest > top**0.5:
        return (
            f"values outgrew {_plain(call.dtype)} (at most {top:.3g}): start from smaller weights, or scale the input"
        )
    return f"look at what {call.kind} computes from these values: a logarithm, root or quotient, or values too large"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shapes(call: Call) -> str:
    return ", ".join(str(shape) for shape in call.shapes) or "none"
