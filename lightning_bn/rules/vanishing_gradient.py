# SPDX-License-Identifier: Apache-2.0
"""The gradient fades on its way from the loss to the first layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_bn.findings import Finding, Severity

RULE = "vanishing-gradient"
FADED = 3e-4
"""Share of the largest gradient that none of the first layers' weights reaches; docs/rules has the evidence."""
FRONT = 0.25
"""Share of the weights, in the order of the model, that are the first layers."""
WEIGHTS, STEPS = 4, 2
"""How many weights a part must have to be judged, and how many due steps in a row must agree."""
OWN = 2
"""How many weights make a module a part of its own."""


@dataclass(frozen=True)
class Weight:
    """What one step did with one parameter; norms are Euclidean, NaN is "not measured".

    Args:
        shape: its shape.
        weight: its norm before the step.
        gradient: norm of its gradient, None where it has none.
        update: norm of what the step changed.
        lr: its learning rate in the step.
        largest_lr: the largest learning rate that is known of it: seen so far, or what its schedule works with.
    """

    shape: tuple[int, ...]
    weight: float
    gradient: float | None
    update: float
    lr: float
    largest_lr: float

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows and columns, as weights of layers have, and biases, γ and β do not."""
        return len(self.shape) > 1

    @property
    def slope(self) -> float:
        """Norm of the gradient; NaN where there is none."""
        return math.nan if self.gradient is None else self.gradient


Steps = Sequence[Mapping[str, Weight]]
"""The last few due steps, oldest first: each parameter by its name, in the order of the model."""


def vanishing_gradient(steps: Steps) -> Finding | None:
    """Judge how much of the gradient reaches the first layers.

    Args:
        steps: the last due steps.

    Returns:
        A ``warning`` where in two due steps in a row, up to the newest, no weight of the first quarter has a gradient
        of more than 3e-4 of the largest (of the network, or of one of its parts: see :func:`parts`), else None. Zeros
        alone do not count: what starts at zero has none behind it for some steps. Zeros in front of what has faded
        do: it went on fading, below what numbers can say.
    """
    shares = [front_share(step) for step in steps[-STEPS:]]
    if len(shares) < STEPS or not all(0 < share <= FADED for share in shares):  # NaN too
        return None
    part = min(parts(steps[-1]), key=_part_share)
    slopes = {name: row.slope for name, row in part.items()}
    weights = [name for name, row in part.items() if row.is_matrix]
    first, largest = weights[0], max(slopes, key=lambda name: slopes[name])
    evidence = (
        f"no weight of the first {_front(len(weights))} of {len(weights)} has a gradient of more than "
        f"{shares[-1]:.2g} of the largest: {slopes[first]:.2g} in {first}, {slopes[largest]:.2g} in {largest} "
        f"(norms; {len(shares)} due steps in a row)"
    )
    advice = "put a BatchNorm between each layer and its activation"
    data = {"shares": shares, "first": slopes[first], "largest": slopes[largest], "largest_in": largest}
    return Finding(RULE, Severity.WARNING, evidence, advice, layer=layer_of(first), data=data)


def front_share(step: Mapping[str, Weight]) -> float:
    """Largest gradient of a part's first quarter of the weights over its largest of all; the least of all parts.

    Where all of the quarter are 0, that of the first parameter that has any: a fading gradient ends in zeros, in front
    of parameters that have next to none. NaN where no part has enough weights.
    """
    return min(map(_part_share, parts(step)), default=math.nan)


def parts(step: Mapping[str, Weight]) -> list[dict[str, Weight]]:
    """What has a gradient, apart where a model consists of parts whose gradients need not be alike.

    Such are an actor and a critic, a generator and a discriminator, an encoder and a decoder: modules side by side
    with two or more weights each, and names that differ in more than a number. Layers between them belong to all.
    Left out are parts of fewer than four weights.
    """
    known = {name: row for name, row in step.items() if math.isfinite(row.slope)}
    columns = enumerate(zip(*(name.split(".") for name in known), strict=False))
    level = next((depth for depth, names in columns if len(set(names)) > 1), 0)
    families = {name: name.split(".")[level].rstrip("0123456789") for name in known}
    counts = Counter(families[name] for name, row in known.items() if row.is_matrix)
    large = [family for family, count in counts.items() if count >= OWN] or [""]
    found = [
        {name: row for name, row in known.items() if families[name] == family or families[name] not in large}
        for family in large
    ]
    return [part for part in found if sum(row.is_matrix for row in part.values()) >= WEIGHTS and _largest(part)]


def layer_of(parameter: str) -> str | None:
    """Path of the module that owns a parameter; None for the model itself."""
    return parameter.rpartition(".")[0] or None


def _part_share(part: Mapping[str, Weight]) -> float:
    weights = [row.slope for row in part.values() if row.is_matrix]
    front = max(weights[: _front(len(weights))]) or next(row.slope for row in part.values() if row.slope)
    return front / _largest(part)


def _largest(part: Mapping[str, Weight]) -> float:
    return max(row.slope for row in part.values())


def _front(weights: int) -> int:
    return math.ceil(FRONT * weights)
