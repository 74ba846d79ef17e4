# SPDX-License-Identifier: Apache-2.0
"""Of all that is non-finite in one forward pass, report what came first."""

from __future__ import annotations

from lightning_bn.findings import Finding, Severity
from lightning_bn.first_pass import Call, Pass
from lightning_bn.rules.non_finite_input import non_finite_input
from lightning_bn.rules.non_finite_loss import non_finite_loss
from lightning_bn.rules.non_finite_output import culprit_of, non_finite_output
from lightning_bn.rules.non_finite_parameter import non_finite_parameter
from lightning_bn.rules.poisoned_running_statistics import poisoned_running_statistics


def root_cause(seen: Pass) -> list[Finding]:
    """Judge one forward pass: what came first is reported, and what it alone explains is not.

    A module that makes NaN out of finite inputs is to blame, unless its own weights or running statistics were not
    finite: then those are. Without one it is the batch or the weights, then running statistics, then the loss.

    Args:
        seen: the recorded pass.

    Returns:
        The findings of the first cause; notes and warnings about what harmed nothing come with them.
    """
    poisoned = [finding for finding in _poisoned(seen) if finding]
    loss_is_finite = seen.loss is None or seen.loss.is_finite
    # Infinities alone spread nothing while the loss is finite: masked attention scores are -inf on purpose.
    came_out = any(call.outputs.nan or (seen.failed and call.outputs.posinf) for call in seen.calls)
    if loss_is_finite and not poisoned and not came_out:
        return _outside(seen, spread=False)
    culprit = culprit_of(seen.calls)
    inherited = [finding for finding in poisoned if not finding.data["finite_before"]]
    if culprit and _is_first(culprit):
        owned = [*_weights(seen, spread=True, below=culprit.layer), *_below(inherited, culprit.layer)]
        outside = [finding for finding in _outside(seen, spread=False) if finding.layer not in {f.layer for f in owned}]
        harmless = loss_is_finite and not poisoned and not seen.failed
        return [*outside, *(owned or [non_finite_output(culprit, harmless=harmless, unseen=seen.unseen)])]
    outside = [*_outside(seen, spread=True), *inherited]
    if any(finding.severity is Severity.ERROR for finding in outside):
        return outside
    if culprit:
        return [*outside, non_finite_output(culprit, harmless=loss_is_finite, unseen=seen.unseen)]
    arrived = next((call.layer for call in seen.calls if call.inputs.level > 1), None)
    loss = (
        None
        if seen.loss is None
        else non_finite_loss(seen.loss, heard=len(seen.calls), arrived=arrived, unseen=seen.unseen)
    )
    return [*outside, *(poisoned or ([loss] if loss else []))]


def _is_first(culprit: Call) -> bool:
    """Whether nothing non-finite can have come in: its tensors were found, and all were finite."""
    return bool(culprit.shapes) and culprit.inputs.is_finite


def _outside(seen: Pass, *, spread: bool) -> list[Finding]:
    inputs = (non_finite_input(place.path, place.index, place.seen, spread=spread) for place in seen.batch)
    return [*(finding for finding in inputs if finding), *_weights(seen, spread=spread)]


def _weights(seen: Pass, *, spread: bool, below: str = "") -> list[Finding]:
    judged = (non_finite_parameter(name, found, spread=spread) for name, found in seen.weights.items())
    return _below([finding for finding in judged if finding], below)


def _below(findings: list[Finding], top: str) -> list[Finding]:
    return [finding for finding in findings if f"{finding.layer}.".startswith(f"{top}." if top else "")]


def _poisoned(seen: Pass) -> list[Finding | None]:
    ran = {call.layer for call in seen.calls}
    return [
        # Statistics that this pass changed were used by it, heard or not.
        poisoned_running_statistics(layer, before, after, used=layer in ran or before.is_finite)
        for layer, (before, after) in seen.statistics.items()
    ]
