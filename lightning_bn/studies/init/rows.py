# SPDX-License-Identifier: Apache-2.0
"""What the study ``init`` varies, and its rows by cell of the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from lightning_bn.studies.seeds import Ends, column, difference, mean
from lightning_bn.studies.starts import CHANCE, DTYPES, OPTIMIZERS
from lightning_bn.studies.study import Row

STARTS = {
    "he": "He",
    "xavier": "Xavier, gain 1",
    "naive": "N(0, 0.01²)",
    "uniform": "U(−0.05, 0.05)",
    "normal_1": "N(0, 1)",
    "normal_1000": "N(0, 1000²)",
}
"""Start by its name in the rows; the first two are made for the network, the next two are simple, the last terrible."""
MADE, SIMPLE, TERRIBLE = tuple(STARTS)[:2], tuple(STARTS)[2:4], tuple(STARTS)[4:]
NORMS = {"none": "without BatchNorm", "batch": "with BatchNorm"}
TITLES = {"adam": "Adam", "sgd": "SGD"}
DEPTHS = (5, 20, 50)
GAMMAS = (0.0, 0.1, 1.0, 10.0)
NOTABLE = 0.02  # a difference in accuracy or in a loss over ln 10 that is smaller is called none


class Cell(NamedTuple):
    """One start, norm and depth: a cell of the table."""

    start: str
    norm: str
    depth: int

    def values(self, rows: Sequence[Row], name: str) -> list[float]:
        """The values of a column, one for each seed; NaN where there is none."""
        gamma = None if self.norm == "none" else 1.0
        where = {**self._asdict(), "network": "mlp", "gamma": gamma}
        return column(rows, name, where)

    def accuracies(self, rows: Sequence[Row], optimizer: str) -> list[float]:
        """The accuracies after training, one for each seed; a run that ended in NaN knows nothing."""
        return [CHANCE if math.isnan(value) else value for value in self.values(rows, optimizer)]

    def accuracy(self, rows: Sequence[Row], optimizer: str) -> float:
        """The mean accuracy after training."""
        return mean(self.accuracies(rows, optimizer))

    def __str__(self) -> str:
        """The cell in words."""
        return f"{STARTS[self.start]} {NORMS[self.norm]} at depth {self.depth}"


class Score(NamedTuple):
    """How often one group of starts did better than another, of how many comparisons."""

    better: int
    worse: int
    of: int

    def __str__(self) -> str:
        """The score in words."""
        return f"better in {self.better} and worse in {self.worse} of {self.of} comparisons"


def span(rows: Sequence[Row], starts: Sequence[str], norm: str, depth: int) -> tuple[float, float]:
    """Smallest and largest mean accuracy of some starts, over both optimizers."""
    means = [Cell(start, norm, depth).accuracy(rows, name) for start, name in product(starts, OPTIMIZERS)]
    return min(means), max(means)


def compare(rows: Sequence[Row], norm: str, *, loss: bool = False, depths: Sequence[int] = DEPTHS) -> Score:
    """He and Xavier against the two simple starts, each with each, by depth and optimizer.

    A difference counts where it is more than two standard errors and ``NOTABLE``.

    Args:
        rows: the rows.
        norm: with which norm.
        loss: whether the mean training loss of the last epoch is compared, instead of the accuracy after it.
        depths: at which depths.
    """
    found = []
    for made, simple, depth, name in product(MADE, SIMPLE, depths, OPTIMIZERS):
        pair = (Cell(made, norm, depth), Cell(simple, norm, depth))
        if loss:
            ours, theirs = (cell.values(rows, f"{name}_loss_last") for cell in pair)
            found.append(-difference(ours, theirs, least=NOTABLE))
        else:
            ours, theirs = (cell.accuracies(rows, name) for cell in pair)
            found.append(difference(ours, theirs, least=NOTABLE))
    return Score(found.count(1), found.count(-1), len(found))


def ends(rows: Sequence[Row], cell: Cell, dtype: str) -> Ends:
    """Where the first forward pass of a cell stops being finite."""
    return Ends(cell.values(rows, f"{dtype}_ends"), cell.values(rows, f"{dtype}_predicted"))


def predictions(rows: Sequence[Row]) -> dict[str, int]:
    """How many first forward passes were predicted from the weights: exactly, one layer beside, further off, missed.

    ``alarms`` are those that were predicted to end and are finite.
    """
    counts = dict.fromkeys(("exact", "beside", "further", "missed", "alarms"), 0)
    for start, norm, depth, dtype in product(STARTS, NORMS, DEPTHS, DTYPES):
        for seen, said in zip(*ends(rows, Cell(start, norm, depth), dtype), strict=True):
            if math.isnan(seen):
                counts["alarms"] += not math.isnan(said)
            elif math.isnan(said):
                counts["missed"] += 1
            else:
                counts[{0: "exact", 1: "beside"}.get(int(abs(seen - said)), "further")] += 1
    return counts
