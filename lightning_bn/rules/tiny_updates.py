# SPDX-License-Identifier: Apache-2.0
"""The steps are so small, measured by the weights, that the weights stay where they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.vanishing_gradient import Steps, Weight

RULE = "tiny-updates"
TINY, LARGE = 2e-5, 100.0
"""A step relative to a weight, and a weight's norm for each unit that it makes, that together speak of its size."""
TINIEST, LOW = 1e-6, 1e-7
"""A relative step and a learning rate that together speak of the learning rate."""
TAIL = 0.1
"""Below this share of its largest value a learning rate is at the beginning or the end of a schedule."""
STEPS, WEIGHTS = 2, 2
"""How many due steps in a row must agree, and how many weights it takes to judge one."""


def tiny_updates(steps: Steps) -> Finding | None:
    """Judge ‖Δw‖/‖w‖ together with what made it small.

    A small ratio alone is no fault: networks that have learned, and such as are fine-tuned, have it too.

    Args:
        steps: the last due steps.

    Returns:
        A ``warning`` where in two due steps in a row, up to the newest, the median over the weights was at most 2e-5
        and their norm for each unit at least 100 (median), or the median was at most 1e-6 at a learning rate that
        stayed the same, at most 1e-7; else None. Left out are learning rates below a tenth of their largest value,
        and weights that did not change at all: no step was taken with them.
    """
    moved = [changed(step) for step in steps[-STEPS:]]
    if len(moved) < STEPS or not all(len(rows) >= WEIGHTS for rows in moved):
        return None
    ratios = [median(row.update / row.weight for row in rows) for rows in moved]
    sizes = [median(_size(row) for row in rows) for rows in moved]
    rates = [row.lr for rows in moved for row in rows]
    if max(ratios) <= TINY and min(sizes) >= LARGE:
        cause = f"the weights have a norm of {sizes[-1]:.3g} for each unit that they make"
        advice = "initialise the weights smaller, with he"
    elif max(ratios) <= TINIEST and _steady(moved) and max(rates) <= LOW:
        cause, advice = f"the learning rate is {max(rates):.3g}", "raise the learning rate"
    else:
        return None
    evidence = (
        f"a step changes a weight by {ratios[-1]:.2g} of its norm (median of {len(moved[-1])} weights; "
        f"{len(moved)} due steps in a row), {1 / ratios[-1]:.1g} such steps make 100 %; {cause}"
    )
    data = {"ratios": ratios, "sizes": sizes, "learning_rate": max(rates)}
    return Finding(RULE, Severity.WARNING, evidence, advice, data=data)


def changed(step: Mapping[str, Weight]) -> list[Weight]:
    """The weights that a step changed, at a learning rate that is not one of the ends of a schedule."""
    return [
        row
        for row in step.values()
        if row.is_matrix and 0 < row.update < math.inf and 0 < row.weight < math.inf
        if not row.lr < TAIL * row.largest_lr  # NaN is not known, and no schedule
    ]


def _size(row: Weight) -> float:
    return row.weight / math.sqrt(row.shape[0])


def _steady(moved: list[list[Weight]]) -> bool:
    """Whether the learning rates of the first of these steps are those of the last."""
    first, last = ({row.lr for row in rows} for rows in (moved[0], moved[-1]))
    return first == last
