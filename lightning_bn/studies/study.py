# SPDX-License-Identifier: Apache-2.0
"""What an experiment is made of: settings, a measurement, and what to say of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = str | int | float | None
Setting = Mapping[str, Value]
"""Everything that decides a result, the seed among it: plain values by column."""

Row = dict[str, Value]
"""A setting and what was measured for it."""


@dataclass(frozen=True)
class Verdict:
    """What the numbers say of a claim.

    Args:
        claim: the claim, in one sentence.
        verdict: what became of it; ``not shown`` where the numbers of this study cannot tell.
        measured: the numbers of this study behind it.
        published: numbers from the literature with their source, where there are any.
    """

    claim: str
    verdict: Literal["holds", "holds if", "does not hold", "not shown"]
    measured: str
    published: str = ""


@dataclass(frozen=True)
class Study:
    """An experiment.

    Args:
        name: name of the study and of its files.
        settings: the runs for a list of seeds, in the order in which they are to be made.
        measure: makes one run and gives what was measured, by column. It is called in processes of its own, on one
            thread, and has to seed itself from the setting.
        tables: the rows, summed up as markdown tables.
        verdicts: what the rows say of each claim.
        summary: what was seen, in a few sentences.
        draw: the rows as a figure.
        seeds: number of seeds at the default size.
    """

    name: str
    settings: Callable[[Sequence[int]], list[Setting]]
    measure: Callable[[Setting], Row]
    tables: Callable[[list[Row]], str]
    verdicts: Callable[[list[Row]], list[Verdict]]
    summary: Callable[[list[Row]], str]
    draw: Callable[[list[Row]], Figure]
    seeds: int = 3
