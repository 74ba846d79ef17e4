# SPDX-License-Identifier: Apache-2.0
"""The sizes in the study of undoing BatchNorm, and what theory says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_bn.studies.seeds import column
from lightning_bn.studies.study import Row, Value

BATCHES = (2, 4, 8, 16, 32, 64)
RATIOS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e4, 1e6)
"""Values of σ²/ε."""
DTYPES = ("float32", "float64")
INPUTS = {
    "normal": "normal values",
    "mlp": "digits, first layer of the MLP",
    "conv": "digits, first layer of the conv net",
}
NETWORKS = {"mlp": "MLP", "conv": "conv net"}


def shrinkage(batch: float) -> float:
    """Mean standard deviation E[s] of ``batch`` normal values of variance 1, s² being their biased variance.

    √(2/m)·Γ(m/2)/Γ((m − 1)/2), about 1 − 3/(4m).

    Args:
        batch: number of values m, more than 1; m_eff need not be whole.

    Example:
        >>> round(shrinkage(2), 4), round(shrinkage(64), 4)
        (0.5642, 0.9882)
    """
    return math.sqrt(2 / batch) * math.exp(math.lgamma(batch / 2) - math.lgamma((batch - 1) / 2))


def constant_error(batch: float) -> float:
    """Error that γ = σ, β = μ leave in training mode on normal values: √(2(1 − E[s])), about √(3/(2m)).

    Root mean square of (y − x)/σ with y = μ + σ(x − x̄)/s: the mean x̄ adds 1/m, the deviation s adds E[(1 − s)²].

    Args:
        batch: values m that a channel is normalised by.
    """
    return math.sqrt(2 * (1 - shrinkage(batch)))


def least_error(batch: float) -> float:
    """Error that the best constants leave in training mode on normal values: √(1 − E[s]²), with γ = E[s]·σ.

    Args:
        batch: values m that a channel is normalised by.
    """
    return math.sqrt(1 - shrinkage(batch) ** 2)


def forgotten_error(ratio: float) -> float:
    """Error that γ = σ instead of √(σ² + ε) leaves in evaluation mode: 1 − 1/√(1 + ε/σ²).

    Args:
        ratio: σ²/ε.
    """
    return -math.expm1(-math.log1p(1 / ratio) / 2)


def chosen(rows: Sequence[Row], name: str, **where: Value) -> list[float]:
    """The values of a column in the rows that have the given values in other columns."""
    return column(rows, name, where)


def power(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent of the power law that fits best, by least squares of the logarithms.

    Args:
        sizes: positive, at least two different ones.
        values: positive, one for each size.

    Example:
        >>> round(power([1, 4, 16], [8, 4, 2]), 6)
        -0.5
    """
    x, y = ([math.log(value) for value in values_of] for values_of in (sizes, values))
    middle, height = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True))
    return across / sum((a - middle) ** 2 for a in x)
