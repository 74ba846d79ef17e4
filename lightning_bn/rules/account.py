# SPDX-License-Identifier: Apache-2.0
"""How an operation and its surroundings are told, in words and in plain data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from lightning_bn.operations import Fault, Operation, Range

WITH_NUMBERS = frozenset({"pow", "div", "mul", "add", "sub", "rsub", "clamp", "clamp_min", "clamp_max"})
"""Operations whose numbers are operands; those of others are axes and sizes."""


def place_of(operation: Operation) -> str:
    """Module, class and source line of an operation, with the preposition that belongs in front."""
    here = operation.spot
    where = f"in {here.layer} ({here.kind})" if here.layer else f"in {here.kind}'s own code" if here.kind else ""
    line = operation.at or here.line
    parts = [
        where,
        f"at {line.describe()}" if line else "",
        f"called at {here.caller.describe()}" if here.caller else "",
    ]
    return ", ".join(part for part in parts if part) or "in a place that is not known"


def inputs_of(fault: Fault) -> str:
    """The inputs of an operation with their ranges, and its numbers."""
    tensors = [entry.describe() for entry in fault.inputs]
    numbers = [f"{number:g}" for number in fault.scalars] if fault.operation.name.strip("_") in WITH_NUMBERS else []
    return "; ".join(tensors + numbers) or "nothing"


def before_it(fault: Fault) -> str:
    """The operations before it, the latest first; empty where there is none."""
    if not fault.before:
        return ""
    steps = [f"{entry.describe()}{_short(entry, fault.operation)}" for entry in fault.before]
    return f"; before it: {', '.join(steps)}"


def outcome_of(output: Range) -> str:
    """What came out, as far as it is bad."""
    return output.seen.describe() if output.seen is not None else output.describe()


def plain(fault: Fault) -> dict[str, Any]:
    """The numbers behind a finding, plain JSON types."""
    operation = fault.operation
    line = operation.at or operation.spot.line
    return {
        "operation": operation.name,
        "node": operation.node,
        "kind": operation.spot.kind,
        "file": line.file if line else None,
        "line": line.number if line else None,
        "function": line.function if line else None,
        "code": line.code if line else None,
        "inputs": [_row(entry) for entry in fault.inputs],
        "scalars": list(fault.scalars),
        "output": _row(fault.output),
        "in_float64": fault.wide,
        "before": [entry.describe() for entry in fault.before],
    }


def growth(sizes: Sequence[tuple[str, float]]) -> float | None:
    """Factor by which the largest value grows from one multiplying layer to the next, the geometric mean.

    Args:
        sizes: largest absolute value behind each layer, in order.

    Returns:
        The factor; None with fewer than two layers or a value of 0.
    """
    values = [size for _, size in sizes]
    if len(values) < 2 or min(values[0], values[-1]) <= 0:  # noqa: PLR2004  (one step takes two layers)
        return None
    return float((values[-1] / values[0]) ** (1 / (len(values) - 1)))


def _short(operation: Operation, culprit: Operation) -> str:
    """The line of an operation outside of all submodules, where it is another one than the culprit's."""
    line = operation.spot.line
    if line is None or operation.spot.layer or line == culprit.spot.line:
        return ""
    return f" ({PurePath(line.file).name}:{line.number})"


def _row(entry: Range) -> dict[str, Any]:
    seen = entry.seen
    counts = {} if seen is None else {"nan": seen.nan, "posinf": seen.posinf, "neginf": seen.neginf}
    return {
        "name": entry.name,
        "shape": list(entry.shape),
        "dtype": entry.dtype,
        "low": entry.low,
        "high": entry.high,
        "zeros": entry.zeros,
        **counts,
    }
