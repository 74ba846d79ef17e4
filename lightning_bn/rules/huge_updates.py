# SPDX-License-Identifier: Apache-2.0
"""A step changes the weights so much that little is left of what they were."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.vanishing_gradient import Steps, Weight

RULE = "huge-updates"
HUGE, LARGE = 1.0, 1.5
"""A step relative to a weight, and its norm for each unit, from which on both together are said."""
RISING = 1.01
"""By what factor a learning rate may exceed that of the due step before and not be on its way up."""
WEIGHTS = 2
"""How many weights it takes."""


def huge_updates(steps: Steps) -> Finding | None:
    """Judge ‖Δw‖/‖w‖ together with the size of the step itself.

    A large ratio alone is no fault: small weights have it in their first steps.

    Args:
        steps: the last due steps.

    Returns:
        A ``warning`` where in the newest of them the medians over the weights of the relative change and of the
        change's norm for each unit are above 1 and 1.5, else None. A learning rate that rises from the due step
        before is not judged: it is being warmed up, or its limit is looked for.
    """
    rows = changed(steps[-1]) if steps else []
    if len(rows) < WEIGHTS or (len(steps) > 1 and rises(steps[-2], steps[-1])):
        return None
    ratio = median(row.update / row.weight for row in rows)
    size = median(row.update / math.sqrt(row.shape[0]) for row in rows)
    if not (ratio > HUGE and size > LARGE):
        return None
    rates = sorted({row.lr for row in rows if math.isfinite(row.lr)})
    evidence = (
        f"a step changed a weight by {ratio:.3g} times its norm (median of {len(rows)} weights), "
        f"by {size:.3g} for each unit that it makes"
    )
    if rates:
        evidence += f"; learning rate {', '.join(f'{rate:g}' for rate in rates)}"
    advice = "lower the learning rate by ten"
    data = {"ratio": ratio, "size": size, "learning_rates": rates}
    return Finding(RULE, Severity.WARNING, evidence, advice, data=data)


def changed(step: Mapping[str, Weight]) -> list[Weight]:
    """The weights that a step changed, to something finite."""
    return [row for row in step.values() if row.is_matrix and 0 < row.update < math.inf and 0 < row.weight < math.inf]


def rises(before: Mapping[str, Weight], now: Mapping[str, Weight]) -> bool:
    """Whether a learning rate is above that of the due step before."""
    pairs = [(before[name].lr, row.lr) for name, row in now.items() if name in before]
    return any(new > RISING * old for old, new in pairs)
