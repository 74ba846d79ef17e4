# SPDX-License-Identifier: Apache-2.0
"""From layer to layer the signal shrinks, and no later layer recovers it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

from lightning_bn.findings import Finding, Severity

RULE = "vanishing-signal"
DECADES = 4.0
"""Powers of ten that standard deviations over whole tensors have to fall by. benchmarks/signals.py: healthy networks
have at most 2.9, and 3.5 with N(0, 0.01²) in three hidden layers, which trains; in five, which does not, 4.7."""
DECADES_OVER_SAMPLES = 6.0
"""The same for standard deviations over the samples alone: PyTorch's own start has 4.2 in ten hidden layers, which
train under Adam, and 7.6 in twenty, which do not."""
WIDEST_STEP = math.log10(30)
"""What a single layer counts for at most: a scale that changes once is no chain."""


@dataclass(frozen=True)
class Course:
    """How far a signal has got, in powers of ten, where nothing behind brings it back.

    Args:
        start: layer from which on it goes.
        end: last layer.
        far: first layer in which the limit is reached, None where it is not.
        decades: powers of ten in total, each layer with at most :data:`WIDEST_STEP`.
        layers: number of layers from ``start`` to ``end``.
        factor: factor from ``start`` to ``end``, per layer.
    """

    start: str
    end: str
    far: str | None
    decades: float
    layers: int
    factor: float


def vanishing_signal(stds: Mapping[str, float], varied: Mapping[str, float] | None = None) -> Finding | None:
    """Judge the outputs of the layers with weights in one step.

    Outputs that are exactly 0, as those of layers that start at zero, and outputs that are not finite are left out.

    Args:
        stds: standard deviation of the output of each linear and convolution layer, over the whole tensor, biased, by
            module path in the order in which they ran.
        varied: the same over samples and positions alone, which biases do not hide: the root of the mean over units
            of their variances. None where that is not known.

    Returns:
        A ``warning``, else None.
    """
    course = follow(stds, DECADES, max, -1)
    measured, over = stds, "the outputs"
    if varied and (course is None or course.far is None):
        course = follow(varied, DECADES_OVER_SAMPLES, max, -1)
        measured, over = varied, "the outputs from sample to sample"
    if course is None or course.far is None:
        return None
    first, last = measured[course.start], measured[course.end]
    evidence = (
        f"the standard deviation of {over} falls from {first:.3g} in {course.start} to {last:.3g} in {course.end}, by "
        f"a factor of {course.factor:.3g} per layer over {course.layers} layers, and no later layer recovers it; in "
        f"{course.far} it is {measured[course.far]:.3g}"
    )
    advice = "initialise the weights with He's scheme"
    data = {"from": course.start, "to": course.end, "std_from": first, "std_to": last, "factor": course.factor}
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=course.far, data=data)


def follow(stds: Mapping[str, float], limit: float, ahead: Callable[[float, float], float], sign: int) -> Course | None:
    """The course of an envelope through the layers.

    Args:
        stds: standard deviations by layer.
        limit: powers of ten.
        ahead: what the envelope keeps of a layer and of all behind it: ``max`` to follow a fall, ``min`` for a rise.
        sign: -1 for a fall, 1 for a rise.

    Returns:
        The course; None with fewer than two layers that are finite and not 0.
    """
    known = {layer: math.log10(std) for layer, std in stds.items() if std > 0 and math.isfinite(std)}
    if len(known) <= 1:
        return None
    names = list(known)
    envelope = list(accumulate(reversed(known.values()), ahead))[::-1]
    steps = [min(sign * (after - before), WIDEST_STEP) for before, after in pairwise(envelope)]
    reached = [0.0, *accumulate(steps)]
    begin = max(place for place, height in enumerate(envelope) if height == envelope[0])
    far = next((name for name, decades in zip(names, reached, strict=True) if decades >= limit), None)
    layers = len(names) - begin
    factor = 10 ** ((known[names[-1]] - known[names[begin]]) / max(layers - 1, 1))
    return Course(names[begin], names[-1], far, reached[-1], layers, factor)
