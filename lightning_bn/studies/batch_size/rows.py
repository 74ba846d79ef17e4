# SPDX-License-Identifier: Apache-2.0
"""The runs of the study of batch sizes, and how two of them compare over the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lightning_bn.studies.seeds import column, mean, spread
from lightning_bn.studies.study import Row

BATCHES = (2, 4, 8, 16, 32, 64)
ACCUMULATED = (4, 4)
"""Batch size and forward passes of a step where gradients are accumulated."""
LIMIT = 16
"""Batch size below which the claim advises against BatchNorm."""
USUAL = 32
"""Batch size for which the learning rates are; at batch B they are √(B/32) times that."""
FEWER = (2, 8, 32)
"""Batch sizes with LayerNorm, which does not see the batch, and so needs no more."""
SAME = (2, 8)
"""Batch sizes that are run with the learning rate of the usual one as well."""
NETWORKS = {"mlp": "MLP", "conv": "conv net"}
NAMES = {"batch": "BatchNorm", "group": "GroupNorm", "layer": "LayerNorm"}
CLEAR = 0.1
"""Part of the other loss by which a loss has to differ, beyond two standard errors."""


class Run(NamedTuple):
    """A run, seed apart."""

    network: str
    norm: str
    batch: int
    accumulate: int = 1
    rule: str = "root"


class Gap(NamedTuple):
    """Our value less theirs, in pairs of one seed.

    Args:
        mean: over the seeds.
        error: its standard error; NaN of one seed.
        theirs: mean of theirs.
    """

    mean: float
    error: float
    theirs: float

    @property
    def sign(self) -> int:
        """1 where ours is larger for sure, -1 where it is smaller, 0 where that is not known."""
        is_clear = abs(self.mean) > max(2 * self.error, CLEAR * self.theirs)
        return int(math.copysign(1, self.mean)) if is_clear and not math.isnan(self.error) else 0

    def __str__(self) -> str:
        """The mean with its sign, and the error."""
        return f"{self.mean:+.3f}" + ("" if math.isnan(self.error) else f" ± {self.error:.3f}")


def values(rows: Sequence[Row], run: Run, name: str = "val_loss") -> list[float]:
    """A column of a run, by seed."""
    return column(sorted(rows, key=lambda row: str(row["seed"])), name, run._asdict())


def gap(rows: Sequence[Row], ours: Run, theirs: Run, name: str = "val_loss") -> Gap:
    """How a column of two runs differs."""
    first, second = values(rows, ours, name), values(rows, theirs, name)
    apart = [one - other for one, other in zip(first, second, strict=True)]
    error = spread(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
    return Gap(mean(apart), error, mean(second))


def against(rows: Sequence[Row], network: str, batch: int, norm: str = "group") -> Gap:
    """Validation loss of BatchNorm less that of another normalisation."""
    return gap(rows, Run(network, "batch", batch), Run(network, norm, batch))


def samples(rows: Sequence[Row], network: str, batch: int) -> float:
    """m_eff of the layer that has fewest, mean over the seeds."""
    return mean(values(rows, Run(network, "batch", batch), "m_eff_min"))


def in_figures(value: float) -> str:
    """A number of samples to three figures, without a power of ten."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"  # noqa: PLR2004  (more would be written as 1e+03)


def are_several(rows: Sequence[Row]) -> bool:
    """Whether there are seeds enough to know a difference from chance."""
    return len({row["seed"] for row in rows}) > 1


def mismatch(rows: Sequence[Row], network: str, batch: int) -> float:
    """Part of BatchNorm's excess over GroupNorm that goes where its statistics are estimated anew."""
    ours = Run(network, "batch", batch)
    gained = mean(values(rows, ours)) - mean(values(rows, ours, "precise_loss"))
    return gained / against(rows, network, batch).mean
