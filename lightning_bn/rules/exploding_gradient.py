# SPDX-License-Identifier: Apache-2.0
"""The gradient grows from layer to layer on its way from the loss to the first layers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import StatisticsError, correlation, linear_regression

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.vanishing_gradient import Steps, Weight, layer_of

RULE = "exploding-gradient"
GREW = 500.0
"""Factor from the last to the first of the layers from which on it is said; docs/rules has the evidence."""
EVEN = 0.9
"""How closely (correlation) its logarithm must follow depth: growth by layers, not one layer that stands out."""
LAYERS = 8
"""How many weights of one shape it takes."""

Growth = tuple[float, list[str]]


def exploding_gradient(steps: Steps) -> Finding | None:
    """Judge how the gradient grows over layers of equal shape.

    Compared is ‖gradient‖·‖weight‖, what a relative change of the weight does to the loss: where a norm undoes the
    scale of a weight, it does not depend on that scale, as the gradient alone does.

    Args:
        steps: the last due steps.

    Returns:
        A ``warning`` where in the newest of them the line through its logarithm over eight or more weights of one
        shape rises by a factor of 500 or more towards the input and correlates with their order by 0.9, else None.
    """
    if not steps:
        return None
    growth, names = max(growths(steps[-1]), key=lambda entry: entry[0], default=(math.nan, []))
    if not growth >= GREW:  # NaN too
        return None
    rows = [steps[-1][name] for name in names]
    shape = " x ".join(map(str, rows[0].shape))
    each = growth ** (1 / (len(names) - 1))
    evidence = (
        f"over {len(names)} weights of shape {shape} the gradient grows {growth:.2g} times from {names[-1]} to "
        f"{names[0]}, {each:.3g} times a layer (norms {rows[-1].slope:.2g} and {rows[0].slope:.2g})"
    )
    data = {
        "growth": growth,
        "per_layer": each,
        "layers": len(names),
        "first": rows[0].slope,
        "last": rows[-1].slope,
    }
    advice = "add a skip connection around every two or three of these layers"
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=layer_of(names[0]), data=data)


def growths(step: Mapping[str, Weight]) -> list[Growth]:
    """Of the weights of each shape: the factor by which the product grows towards the input, and their names."""
    groups: dict[tuple[int, ...], list[tuple[str, float]]] = defaultdict(list)
    for name, row in step.items():
        product = row.slope * row.weight
        if row.is_matrix and product > 0 and math.isfinite(product):
            groups[row.shape].append((name, math.log(product)))
    alike = [group for group in groups.values() if len(group) >= LAYERS]
    return [(_line([value for _, value in group]), [name for name, _ in group]) for group in alike]


def _line(values: Sequence[float]) -> float:
    """Factor between the ends of the line through logarithms, backwards; 1 where they follow no line."""
    order = range(len(values))
    try:
        fits = -correlation(order, values) >= EVEN
    except StatisticsError:  # all alike
        return 1.0
    return math.exp(min(-linear_regression(order, values).slope * (len(values) - 1), 700)) if fits else 1.0
