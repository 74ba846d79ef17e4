# SPDX-License-Identifier: Apache-2.0
"""Of all that is non-finite in one forward pass, report what came first."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.first_pass import Pass
from lightning_bn.rules.non_finite_input import non_finite_input
from lightning_bn.rules.non_finite_loss import non_finite_loss
from lightning_bn.rules.non_finite_output import non_finite_output
from lightning_bn.rules.non_finite_parameter import non_finite_parameter
from lightning_bn.rules.poisoned_running_statistics import poisoned_running_statistics


def root_cause(seen: Pass) -> list[Finding]:
    """Judge one forward pass in the order of causes: batch, weights, modules, running statistics, loss.

    Only the first kind of fault that explains the rest is reported; a NaN in the batch makes every module and
    every running statistic non-finite, and those are no findings of their own.

    Args:
        seen: the recorded pass.

    Returns:
        The findings of the first cause; notes and warnings that harmed nothing come with the others.
    """
    poisoned = _poisoned(seen)
    loss_is_finite = seen.loss is None or seen.loss.is_finite
    # Infinities alone spread nothing while the loss is finite: masked attention scores are -inf on purpose.
    spread = bool(poisoned) or not loss_is_finite or any(call.outputs.nan for call in seen.calls)
    inputs = [non_finite_input(place.path, place.index, place.seen, spread=spread) for place in seen.batch]
    weights = [non_finite_parameter(name, found, spread=spread) for name, found in seen.weights.items()]
    outside = [finding for finding in (*inputs, *weights) if finding]
    inherited = [finding for finding in poisoned if not finding.data["finite_before"]]
    if inherited or any(finding.severity is Severity.ERROR for finding in outside):
        return [*outside, *inherited]
    harmless = loss_is_finite and not poisoned and not seen.failed
    inside = non_finite_output(seen.calls, harmless=harmless) if spread else None
    if inside:
        return [*outside, inside]
    loss = None if seen.loss is None else non_finite_loss(seen.loss)
    return [*outside, *poisoned, *([loss] if loss else [])]


def _poisoned(seen: Pass) -> list[Finding]:
    ran = {call.layer for call in seen.calls}
    judged = (
        poisoned_running_statistics(layer, before, after, used=layer in ran)
        for layer, (before, after) in seen.statistics.items()
    )
    return [finding for finding in judged if finding]
