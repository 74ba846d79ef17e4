# SPDX-License-Identifier: Apache-2.0
"""Numbers over seeds, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lightning_bn.studies.study import Row, Value

SHOWN = 0.015  # a spread of accuracies over seeds from here on is shown


class Ends(NamedTuple):
    """Where first forward passes stop being finite.

    Args:
        seen: place of the layer, for each seed; NaN where all is finite.
        predicted: place as predicted from the weights, likewise.
    """

    seen: list[float]
    predicted: list[float]

    @property
    def hits(self) -> list[float]:
        """The places, of the seeds that have one."""
        return [place for place in self.seen if not math.isnan(place)]

    def __str__(self) -> str:
        """The places in words: seen, in how many seeds, and in brackets predicted."""
        often = "" if len(self.hits) in {0, len(self.seen)} else f" in {len(self.hits)} of {len(self.seen)}"
        return f"{places(self.seen)}{often} ({places(self.predicted)})"


def number(value: Value) -> float:
    """A measured value as a number; NaN where there is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def column(rows: Sequence[Row], name: str, where: Mapping[str, Value]) -> list[float]:
    """The values of a column in the rows that have the values asked for in other columns."""
    return [number(row[name]) for row in rows if all(row[key] == value for key, value in where.items())]


def mean(values: Sequence[float]) -> float:
    """Mean of the values; NaN of none."""
    return sum(values) / len(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """Unbiased standard deviation of the values; 0 of fewer than two."""
    if len(values) < 2:  # noqa: PLR2004  (one value has no spread)
        return 0.0
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def difference(ours: Sequence[float], theirs: Sequence[float], *, least: float) -> int:
    """1 where our values are larger, -1 where theirs are, 0 where neither can be said.

    Said it is where the means differ by more than two standard errors, and by more than ``least``.
    """
    gap = mean(ours) - mean(theirs)
    error = math.hypot(spread(ours) / math.sqrt(len(ours)), spread(theirs) / math.sqrt(len(theirs)))
    return int(math.copysign(1, gap)) if abs(gap) > max(2 * error, least) else 0


def of_seeds(values: Sequence[float]) -> str:
    """Mean and spread of the accuracies of the seeds, those that are NaN counted apart."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "NaN"
    text = f"{mean(known):.2f}" + (f" ± {spread(known):.2f}" if spread(known) >= SHOWN else "")
    return text if len(known) == len(values) else f"{text}, NaN in {len(values) - len(known)} of {len(values)}"


def between(values: Sequence[float]) -> str:
    """Smallest and largest value, or one where they look the same."""
    return " to ".join(dict.fromkeys((f"{min(values):.2f}", f"{max(values):.2f}")))


def places(values: Sequence[float]) -> str:
    """Places of layers as a range; a dash for none."""
    known = [int(value) for value in values if not math.isnan(value)]
    return "–".join(map(str, sorted({min(known), max(known)}))) if known else "-"


def size(value: float) -> str:
    """A number of any size, short."""
    if math.isnan(value):
        return "NaN"
    return f"{value:.2f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.1e}"  # noqa: PLR2004  (three digits)


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A markdown table; its first column is text, the others are centred."""
    rule = ["---", *[":---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *lines))
