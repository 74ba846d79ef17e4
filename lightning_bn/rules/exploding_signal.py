# SPDX-License-Identifier: Apache-2.0
"""From layer to layer the signal grows, and no later layer tames it."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.vanishing_signal import Course, follow

RULE = "exploding-signal"
DECADES, FACTOR = 3.0, 3.0
"""Powers of ten, and growth per layer, from which on it is said. benchmarks/signals.py: healthy networks have at most
2.1 powers of ten; N(0, 1) without norm in five hidden layers at least 3.7, at a factor of 5 or more."""
DECADES_IN_ALL = 5.0
"""Powers of ten from which on it is said however slow the growth: residual networks without norm, from He's weights,
have up to 2.7 in 16 blocks, and train."""


def exploding_signal(stds: Mapping[str, float], first: Mapping[str, float] | None = None) -> Finding | None:
    """Judge the outputs of the layers with weights in one step.

    Outputs that are exactly 0 and outputs that are not finite are left out: the latter are other rules' matter.

    Args:
        stds: standard deviation of the output of each linear and convolution layer, over the whole tensor, biased, by
            module path in the order in which they ran.
        first: the same of the first measured step of the run; None if this is it. A signal that did not explode then
            has grown by learning, as where targets are large and a regression has to reach them, and is not spoken of.

    Returns:
        A ``warning``, else None.
    """
    course = _explosion(stds)
    if course is None or course.far is None or (first is not None and _explosion(first) is None):
        return None
    low, high = stds[course.start], stds[course.end]
    evidence = (
        f"the standard deviation of the outputs grows from {low:.3g} in {course.start} to {high:.3g} in "
        f"{course.end}, by a factor of {course.factor:.3g} per layer over {course.layers} layers, and no later layer "
        f"brings it back; in {course.far} it is {stds[course.far]:.3g}"
    )
    advice = "initialise the weights with He's scheme"
    data = {"from": course.start, "to": course.end, "std_from": low, "std_to": high, "factor": course.factor}
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=course.far, data=data)


def _explosion(stds: Mapping[str, float]) -> Course | None:
    course = follow(stds, DECADES, min, 1)
    if course is None or course.far is None or (course.factor < FACTOR and course.decades < DECADES_IN_ALL):
        return None
    return course
