# SPDX-License-Identifier: Apache-2.0
"""The runs of the study ``small_data`` by group, their means, and their differences in pairs of one seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean, stdev
from typing import Any, Literal, cast

from lightning_bn.stats.attribution import Change, change
from lightning_bn.studies.study import Row

MARKS = (1, 3, 6, 10, 15, 20, 30, 40, 50, 60)
"""Epochs of which a row keeps the validation loss; the last one is the end."""
SURE = 3.0
"""Standard errors from which on a difference counts."""


@dataclass(frozen=True)
class Run:
    """All but the seed of a run.

    Args:
        norm: ``batch``, ``none``, ``group`` or ``layer``.
        depth: hidden layers.
        noise: share of the training labels that are drawn anew.
        dropout: ``no``, ``all`` for one behind each hidden layer, ``last`` for one in front of the head.
        affine: whether γ and β of BatchNorm are ``trained`` or ``fixed`` at 1 and 0.
        start: whether weights start as PyTorch has them or, those of the hidden layers, from He's normal distribution.
    """

    norm: str
    depth: int = 2
    noise: float = 0.0
    dropout: Literal["no", "all", "last"] = "no"
    affine: Literal["trained", "fixed"] = "trained"
    start: Literal["pytorch", "he"] = "pytorch"

    def rows(self, rows: Sequence[Row]) -> list[Row]:
        """The rows of this run, by seed."""
        mine = [row for row in rows if all(row[name] == value for name, value in vars(self).items())]
        return sorted(mine, key=lambda row: cast("int", row["seed"]))

    @property
    def label(self) -> str:
        """The network in words."""
        fixed = ", γ, β fixed" if self.affine == "fixed" else ""
        return f"{NAMES[self.norm]}{fixed}"

    @property
    def place(self) -> str:
        """The rest in words."""
        words = ["30% label noise" if self.noise else "true labels"]
        words += [f"{self.depth} layers"] if self.depth != Run.depth else []
        words += ["He's start"] if self.start == "he" else []
        words += [DROPOUT[self.dropout]] if self.dropout != "no" else []
        return ", ".join(words)


NAMES = {"batch": "BatchNorm", "none": "no norm", "group": "GroupNorm", "layer": "LayerNorm"}
DROPOUT = {"no": "no", "all": "dropout", "last": "dropout in front of the head"}
PLACES = (Run("batch"), Run("batch", noise=0.3), Run("batch", noise=0.3, depth=6))
"""Where BatchNorm is compared with other norms."""
STARTS = (*PLACES, *(Run("batch", noise=0.3, depth=depth, start="he") for depth in (2, 6)))
"""Where it is compared with none."""


def runs_of(rows: Sequence[Row]) -> list[Run]:
    """The runs that rows are of, in their order."""
    names = [entry.name for entry in fields(Run)]
    return list(dict.fromkeys(Run(**cast("Any", {name: row[name] for name in names})) for row in rows))


def values_of(rows: Sequence[Row], run: Run, column: str) -> list[float]:
    """What was measured for a run, by seed; seeds without a value are left out."""
    return [cast("float", row[column]) for row in run.rows(rows) if row[column] is not None]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, which is NaN of one value; both of none."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return (fmean(values) if values else math.nan), error


def in_words(values: Sequence[float], form: str = ".2f") -> str:
    """Mean ± standard error.

    Example:
        >>> in_words([1.0, 2.0, 3.0]), in_words([1.0]), in_words([])
        ('2.00 ± 0.58', '1.00', '')
    """
    mean, error = mean_and_error(values)
    if math.isnan(error):
        return f"{mean:{form}}" if values else ""
    return f"{mean:{form}} ± {error:{form}}"


def paired(rows: Sequence[Row], before: Run, after: Run, column: str) -> Change:
    """How a column changes from one run to another, in pairs of one seed; z is that of :func:`.change`."""
    first, second = ({row["seed"]: row[column] for row in run.rows(rows)} for run in (before, after))
    pairs = [(value, second.get(seed)) for seed, value in first.items()]
    known = [(cast("float", one), cast("float", two)) for one, two in pairs if one is not None and two is not None]
    if not known:
        return Change(math.nan, math.nan, math.nan)
    return change([one for one, _ in known], [two for _, two in known], [1] * len(known))


def is_sure(found: Change, sign: int) -> bool:
    """Whether a change has this sign by more than chance."""
    return found.z * sign >= SURE


Word = Literal["holds", "holds if", "does not hold", "not shown"]


def judged(changes: Sequence[Change], sign: int) -> Word:
    """What becomes of the claim that all these changes have this sign.

    ``holds`` where each has it for sure, ``holds if`` where some have, ``does not hold`` where none has and one has the
    other sign for sure, and ``not shown`` where nothing is sure.

    Example:
        >>> judged([Change(1.0, 2.0, 4.0), Change(1.0, 1.1, 0.5)], 1)
        'holds if'
        >>> judged([Change(1.0, 2.0, 4.0), Change(1.0, 1.1, 0.5)], -1)
        'does not hold'
    """
    agree = sum(is_sure(found, sign) for found in changes)
    if changes and agree == len(changes):
        return "holds"
    if agree:
        return "holds if"
    return "does not hold" if any(is_sure(found, -sign) for found in changes) else "not shown"
