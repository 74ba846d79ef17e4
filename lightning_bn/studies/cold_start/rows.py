# SPDX-License-Identifier: Apache-2.0
"""What the study ``cold_start`` varies, and its rows by part."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_bn.studies.seeds import Ends, column, mean
from lightning_bn.studies.starts import CHANCE
from lightning_bn.studies.study import Row, Setting

WIDTHS = (64, 128, 256, 512, 1024, 2304)  # 2304 is the fan-in of a 3 × 3 convolution of 256 channels
STDS = (100.0, 500.0, 1000.0)
PLACINGS = {1: "behind every layer", 2: "behind every 2nd", 5: "behind every 5th", 10: "behind every 10th"}
GAPS = tuple(PLACINGS)
BATCHES = (8, 64, 512)
HUGE = tuple(10.0 ** (quarter / 4) for quarter in range(70, 81))  # 10^17.5 to 10^20
DEPTH = 5
WIDE = 512  # wider networks are walked less deep

HE, LAST = "He everywhere", "norm behind the last layer"
RAISED = "norm behind the last layer, learning rate raised"
PLAIN, WITHOUT = "norm behind every hidden layer", "no norm"
CASES: dict[str, tuple[float, ...]] = {
    WITHOUT: (1000.0,),
    PLAIN: STDS,
    "norm on the input": (1000.0,),
    "He in the first layer": (1000.0,),
    "He in the third layer": (1000.0,),
    "He in the last layer": (1000.0,),
    LAST: (1000.0,),
    RAISED: (1000.0,),
    HE: (1000.0,),
}
"""The remedies, each beside BatchNorm behind every hidden layer, with the standard deviations they are tried at."""
EXTRA_NORMS: dict[str, dict[str, bool]] = {
    "norm on the input": {"first": True},
    LAST: {"last": True},
    RAISED: {"last": True},
}
HE_LAYERS = {
    "He in the first layer": slice(1),
    "He in the third layer": slice(2, 3),
    "He in the last layer": slice(-1, None),
    HE: slice(None),
}
"""The layers that He draws, all others being N(0, σ²)."""


def deepest(width: int) -> int:
    """How many layers of a width are walked."""
    return 50 if width <= WIDE else 20


def ends(rows: Sequence[Row], norm: str, dtype: str, *, width: int | None = None, std: float | None = None) -> Ends:
    """Where first forward passes stop being finite.

    Args:
        rows: the rows.
        norm: ``batch`` or ``none``.
        dtype: name of the precision.
        width: of networks of this width; None takes all.
        std: of weights of this standard deviation; None takes all.
    """
    asked = {"part": "range", "case": norm, "width": width, "std": std}
    where: Setting = {name: value for name, value in asked.items() if value is not None}
    return Ends(column(rows, f"{dtype}_ends", where), column(rows, f"{dtype}_predicted", where))


def trained(rows: Sequence[Row], case: str, name: str, std: float = 1000.0) -> list[float]:
    """A column of the runs of a remedy, one value for each seed."""
    return column(rows, name, {"part": "training", "case": case, "std": std})


def accuracies(rows: Sequence[Row], case: str, optimizer: str, std: float = 1000.0) -> list[float]:
    """The accuracies of a remedy; a run that ended in NaN knows nothing."""
    return [CHANCE if math.isnan(value) else value for value in trained(rows, case, optimizer, std)]


def sparse(rows: Sequence[Row], gap: int, name: str) -> list[float]:
    """A column of the runs with BatchNorm behind every so manieth layer only."""
    return column(rows, name, {"part": "gap", "case": f"norm behind every {gap}"})


def silent(rows: Sequence[Row], batch: int, std: float) -> float:
    """Share of channels of a BatchNorm layer that are exactly 0, for what comes in with a standard deviation."""
    return mean(column(rows, "silent", {"part": "silence", "batch": batch, "std": std}))
