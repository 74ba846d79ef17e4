# SPDX-License-Identifier: Apache-2.0
"""A module turns finite inputs into NaN or infinity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_bn.findings import Finding, Severity
from lightning_bn.first_pass import Call
from lightning_bn.taps import is_below

RULE = "non-finite-output"


def culprit_of(calls: Sequence[Call]) -> Call | None:
    """The first module, in the order of execution, whose output is worse than its inputs and stays so.

    A module is heard when it returns, so the innermost one comes first; a container is named where its own code,
    between its submodules, made the value. A value that a later module takes up and turns into finite ones, as a
    softmax does with masked scores of -inf, is no fault; nor is one that does not leave its container.

    Args:
        calls: the forward calls in the order in which they returned.

    Returns:
        The call, or None where none made its output worse.
    """
    suspect: Call | None = None
    cleared: Call | None = None
    for call in calls:
        came, went = call.inputs.level, call.outputs.level
        taken_up = suspect and (suspect.outputs.level <= came or _holds(call, suspect))
        if suspect and taken_up and went == 0:
            suspect, cleared = None, suspect
        elif suspect is None and went > came:
            suspect = call
        elif suspect is None and cleared and went >= cleared.outputs.level:
            suspect = cleared  # it was taken up in one branch alone
        elif suspect and came == 0 and went > suspect.outputs.level and not _holds(call, suspect):
            suspect = call
    return suspect


def non_finite_output(culprit: Call, *, harmless: bool, outcome: str, unseen: Mapping[str, str]) -> Finding:
    """Report the module that made a value non-finite.

    Args:
        culprit: the call that :func:`culprit_of` found.
        harmless: whether this is a warning and no error.
        outcome: what became of the step, in words.
        unseen: modules that could not be listened to, with the reason; the fault may lie in one of them.

    Returns:
        An ``error``, or a ``warning`` where it was harmless.
    """
    name = culprit.layer or "the model's own forward"
    evidence = f"{name} ({culprit.kind}): {culprit.outputs.describe()} in its output ({_plain(culprit.dtype)}); "
    evidence += _inputs(culprit)
    if culprit.largest_weight is not None:
        evidence += f"; largest |weight| {culprit.largest_weight:.3g}"
    inside = [f"{other} ({why})" for other, why in unseen.items() if is_below(other, culprit.layer)]
    if inside:
        evidence += f"; not listened to inside: {', '.join(inside)}"
    evidence += f"; {outcome}"
    severity = Severity.WARNING if harmless else Severity.ERROR
    return Finding(RULE, severity, evidence, _advice(culprit), layer=culprit.layer, data=_data(culprit))


def _inputs(call: Call) -> str:
    if not call.shapes:
        return "no tensor was found among its inputs"
    shapes = ", ".join(map(str, call.shapes))
    were = "were finite" if call.inputs.is_finite else f"held {call.inputs.describe()}"
    return f"its inputs {were}, largest |x| {call.inputs.largest:.3g}, shapes {shapes}"


def _advice(call: Call) -> str:
    if not call.shapes:
        return f"look at what comes into {call.kind} as well: it could not be looked into"
    top = torch.finfo(call.dtype).max
    if not call.outputs.nan and (call.outputs.posinf or call.outputs.neginf) and call.outputs.largest > top**0.5:
        return (
            f"values outgrew {_plain(call.dtype)} (at most {top:.3g}): start from smaller weights, or scale the input"
        )
    return f"look at what {call.kind} computes from these values: a logarithm, root or quotient, or values too large"


def _data(call: Call) -> dict[str, Any]:
    return {
        "kind": call.kind,
        "dtype": _plain(call.dtype),
        "nan": call.outputs.nan,
        "posinf": call.outputs.posinf,
        "neginf": call.outputs.neginf,
        "largest_input": call.inputs.largest,
        "largest_weight": call.largest_weight,
        "shapes": [list(shape) for shape in call.shapes],
    }


def _holds(container: Call, call: Call) -> bool:
    return is_below(call.layer, container.layer)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
