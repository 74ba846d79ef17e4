# SPDX-License-Identifier: Apache-2.0
"""Of what the replay of a bad step showed, say what is to blame."""

from __future__ import annotations

import math

from lightning_bn.findings import Finding
from lightning_bn.operations import Fault, Outside
from lightning_bn.replay import Replayed
from lightning_bn.rules.account import place_of
from lightning_bn.rules.diverged_by_learning_rate import History, diverged_by_learning_rate
from lightning_bn.rules.invalid_gradient import invalid_gradient
from lightning_bn.rules.invalid_operation import invalid_operation
from lightning_bn.rules.non_finite_input import non_finite_input
from lightning_bn.rules.non_finite_loss import untraced_loss
from lightning_bn.rules.non_finite_parameter import non_finite_parameter
from lightning_bn.rules.non_finite_target import non_finite_target
from lightning_bn.rules.overflow_by_initialisation import overflowed_at_start
from lightning_bn.rules.overflow_by_range import is_exponential, is_narrow, is_overflow, overflow_by_range
from lightning_bn.rules.root_cause import statistics_fault

RUNNING = frozenset({"running_mean", "running_var"})


def traced_cause(seen: Replayed, history: History) -> list[Finding]:
    """Judge a replay: one finding for its cause, and notes about bad values of the batch that are not to blame.

    Args:
        seen: the replay.
        history: loss and weights before the step.

    Returns:
        The findings; none where the replay was finite, or where it cannot be told where bad values came from.
    """
    causes: list[Finding | None] = []
    if isinstance(seen.origin, Outside):
        causes = [_outside(seen, origin, history) for origin in (seen.origin, *seen.more)]
    elif isinstance(seen.origin, Fault):
        causes = [_operation(seen, seen.origin, history)]
    elif seen.phase == "gradient":
        causes = [invalid_gradient(None, parameter=seen.parameter, parameters=seen.parameters, loss=seen.loss)]
    elif seen.phase == "loss" and seen.loss is not None:
        causes = [untraced_loss(seen.loss)]
    notes = [non_finite_input(entry.path, entry.index, entry.seen, spread=False) for entry in seen.also]
    return [finding for finding in (*causes, *notes) if finding is not None]


def outcome(seen: Replayed) -> str:
    """What became of the step, in words."""
    if seen.phase == "loss":
        return f"the loss is {_word(seen.loss)}"
    if seen.phase == "gradient":
        return (
            f"the loss is finite, the gradients of {seen.parameters} parameters are not, first that of {seen.parameter}"
        )
    return f"the step then ended in {seen.error}" if seen.error else "the step went on"


def _operation(seen: Replayed, fault: Fault, history: History) -> Finding:
    after = outcome(seen)
    if is_overflow(fault):
        which = ", backward of what ran" if fault.operation.node else ""
        what = f"{fault.operation.name}{which} {place_of(fault.operation)}: beyond the range of {fault.output.dtype}"
        diverged = diverged_by_learning_rate(fault, history, what=what)
        if diverged is not None:
            return diverged
        by_start = not (history.step or is_narrow(fault) or is_exponential(fault) or fault.operation.node)
        return (overflowed_at_start(fault) if by_start else None) or overflow_by_range(fault, after=after)
    if fault.operation.node:
        return invalid_gradient(fault, parameter=seen.parameter, parameters=seen.parameters, loss=seen.loss)
    if seen.phase == "gradient":
        after = f"something behind it masks these values in the loss, but not in the gradients: {after}"
    course = history.describe() if history.rose else ""
    return invalid_operation(fault, after=f"{after}; {course}" if course else after)


def _outside(seen: Replayed, origin: Outside, history: History) -> Finding | None:
    path, found = origin.path, origin.seen
    if origin.kind == "batch":
        after = outcome(seen)
        if seen.without:
            after += "; with zeros in their place the same step is finite"
        if origin.mixed == "activation":
            return non_finite_target(path, origin.index, found, after=after)
        return non_finite_input(path, origin.index, found, spread=True, after=after)
    if origin.kind == "buffer" and path.rpartition(".")[2] in RUNNING:
        return statistics_fault(path.rpartition(".")[0], found, found, used=True)
    if origin.kind in {"parameter", "buffer"}:
        what = f"{path}: {found.describe()} after an update"
        diverged = diverged_by_learning_rate(None, history, what=what) if origin.kind == "parameter" else None
        return diverged or non_finite_parameter(path, found, spread=True)
    return None


def _word(loss: float | None) -> str:
    if loss is None:
        return "not known"
    return "NaN" if math.isnan(loss) else "+inf" if loss > 0 else "-inf"
