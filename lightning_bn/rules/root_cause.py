# SPDX-License-Identifier: Apache-2.0
"""Of all that is non-finite in one forward pass, report what came first."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.first_pass import Call, Pass
from lightning_bn.rules.non_finite_input import non_finite_input
from lightning_bn.rules.non_finite_loss import non_finite_loss
from lightning_bn.rules.non_finite_output import culprit_of, non_finite_output
from lightning_bn.rules.non_finite_parameter import non_finite_parameter
from lightning_bn.rules.overflowed_running_statistics import overflowed_running_statistics
from lightning_bn.rules.poisoned_running_statistics import poisoned_running_statistics
from lightning_bn.stats.finite import Census
from lightning_bn.taps import is_below


def root_cause(seen: Pass) -> list[Finding]:
    """Judge one forward pass: what came first is reported, and what it alone explains is not.

    A module that makes NaN out of finite inputs is to blame, unless its own weights or running statistics were not
    finite: then those are. Without one it is the batch or the weights, then running statistics, then the loss.

    Args:
        seen: the recorded pass.

    Returns:
        The findings of the first cause; notes and warnings about what harmed nothing come with them.
    """
    poisoned = _poisoned(seen)
    loss_is_bad = seen.loss is not None and not seen.loss.is_finite
    # Infinities alone spread nothing while the loss is finite: masked attention scores are -inf on purpose.
    came_out = any(call.outputs.nan or (seen.failed and call.outputs.posinf) for call in seen.calls)
    if not loss_is_bad and not poisoned and not came_out:
        return from_outside(seen, spread=False)
    culprit = culprit_of(seen.calls)
    inherited = [finding for finding in poisoned if not finding.data["finite_before"]]
    if culprit and _is_first(culprit):
        owned = [*_owned(seen, culprit), *_below(inherited, culprit.layer)]
        outside = [
            finding for finding in from_outside(seen, spread=False) if finding.layer not in {f.layer for f in owned}
        ]
        return [*outside, *(owned or [_blame(seen, culprit, harmed=loss_is_bad or bool(poisoned))])]
    outside = [*from_outside(seen, spread=True), *inherited]
    if any(finding.severity is Severity.ERROR for finding in outside):
        return outside
    if culprit:
        return [*outside, _blame(seen, culprit, harmed=loss_is_bad or bool(poisoned))]
    return [*outside, *(_made_here(seen, poisoned) or _loss(seen) or poisoned)]


def _blame(seen: Pass, culprit: Call, *, harmed: bool) -> Finding:
    """A warning where the step went on unharmed, or failed beside an infinity that may be meant."""
    if seen.failed:
        harmless, outcome = not any(call.outputs.nan for call in seen.calls), "the step then ended in an exception"
    elif seen.loss is None:
        harmless, outcome = False, "the loss was not seen"
    else:
        harmless, outcome = not harmed, "the loss is finite" if seen.loss.is_finite else "the loss is not finite"
    return non_finite_output(culprit, harmless=harmless, outcome=outcome, unseen=seen.unseen)


def _loss(seen: Pass) -> list[Finding]:
    arrived = next((call.layer for call in seen.calls if call.inputs.level > 1), None)
    heard = len(seen.calls)
    found = seen.loss and non_finite_loss(seen.loss, heard=heard, arrived=arrived, unseen=seen.unseen)
    return [found] if found else []


def _made_here(seen: Pass, poisoned: list[Finding]) -> list[Finding]:
    """Running statistics that are no victims: nothing non-finite came into their layer."""
    victims = {call.layer for call in seen.calls if call.inputs.level > 1}
    return [finding for finding in poisoned if finding.layer not in victims]


def _is_first(culprit: Call) -> bool:
    """Whether nothing non-finite can have come in: its tensors were found, and all were finite."""
    return bool(culprit.shapes) and culprit.inputs.is_finite


def from_outside(seen: Pass, *, spread: bool) -> list[Finding]:
    """What was not finite before anything ran: batch, parameters, buffers."""
    inputs = (non_finite_input(place.path, place.index, place.seen, spread=spread) for place in seen.batch)
    return [*(finding for finding in inputs if finding), *_weights(seen, spread=spread)]


def _owned(seen: Pass, culprit: Call) -> list[Finding]:
    """Weights of the culprit or of what it holds that were not finite, and buffers of its own."""
    own = {name: found for name, found in seen.buffers.items() if name.rpartition(".")[0] == culprit.layer}
    judged = (non_finite_parameter(name, found, spread=True) for name, found in own.items())
    return [*_below(_weights(seen, spread=True), culprit.layer), *(finding for finding in judged if finding)]


def _weights(seen: Pass, *, spread: bool) -> list[Finding]:
    judged = (non_finite_parameter(name, found, spread=spread) for name, found in seen.weights.items())
    return [finding for finding in judged if finding]


def _below(findings: list[Finding], top: str) -> list[Finding]:
    return [finding for finding in findings if finding.layer == top or is_below(finding.layer or "", top)]


def statistics_fault(layer: str, before: Census, after: Census, *, used: bool) -> Finding | None:
    """Running statistics of one layer: what NaN poisoned, or what overflowed."""
    poisoned = poisoned_running_statistics(layer, before, after, used=used)
    return poisoned or overflowed_running_statistics(layer, before, after, used=used)


def _poisoned(seen: Pass) -> list[Finding]:
    ran = {call.layer for call in seen.calls}
    judged = (
        # Statistics that this pass changed were used by it, heard or not.
        statistics_fault(layer, before, after, used=layer in ran or before.is_finite)
        for layer, (before, after) in seen.statistics.items()
    )
    return [finding for finding in judged if finding]
