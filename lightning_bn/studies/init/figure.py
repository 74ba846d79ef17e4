# SPDX-License-Identifier: Apache-2.0
"""The study ``init`` as a picture: accuracy by start, depth, norm and optimizer."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any

from lightning_bn.studies.init.rows import DEPTHS, NORMS, STARTS, TITLES, Cell
from lightning_bn.studies.seeds import mean
from lightning_bn.studies.starts import OPTIMIZERS
from lightning_bn.studies.study import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DARK = 0.55  # accuracies below have a dark cell, and a light number in it
COLUMNS = list(product(OPTIMIZERS, DEPTHS))


def draw(rows: list[Row]) -> Figure:
    """Two fields, without and with BatchNorm: a row for each start, a column for each optimizer and depth."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (a heavy import, and pictures are few)

    figure = Figure(figsize=(11.5, 4.9), layout="constrained")
    fields = figure.subplots(1, len(NORMS), sharey=True)
    for axes, norm in zip(fields, NORMS, strict=True):
        image = _field(axes, rows, norm)
    bar = figure.colorbar(image, ax=list(fields), location="right", pad=0.02, aspect=30)
    bar.set_label("accuracy after five epochs; 0.1 is chance", fontsize=11)
    figure.suptitle("Which starts train? Mean over seeds", fontsize=14)
    return figure


def _field(axes: Any, rows: list[Row], norm: str) -> Any:
    cells = [[Cell(start, norm, depth) for _, depth in COLUMNS] for start in STARTS]
    values = [[cell.accuracy(rows, name) for cell, (name, _) in zip(line, COLUMNS, strict=True)] for line in cells]
    image = axes.imshow(values, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto")
    for y, line in enumerate(cells):
        for x, (cell, (name, _)) in enumerate(zip(line, COLUMNS, strict=True)):
            colour = "white" if values[y][x] < DARK else "black"
            axes.text(x, y, _text(rows, cell, name), ha="center", va="center", color=colour, fontsize=11)
    axes.axvline(len(DEPTHS) - 0.5, color="white", linewidth=3)
    axes.set_xticks(range(len(COLUMNS)), [str(depth) for _, depth in COLUMNS], fontsize=11)
    axes.set_yticks(range(len(STARTS)), list(STARTS.values()), fontsize=11)
    axes.set_xlabel("hidden layers", fontsize=11)
    for place, name in enumerate(OPTIMIZERS):
        centre = place * len(DEPTHS) + (len(DEPTHS) - 1) / 2
        axes.text(centre, -0.62, TITLES[name], ha="center", va="bottom", fontsize=11)
    axes.set_title(NORMS[norm], fontsize=13, pad=22)
    return image


def _text(rows: list[Row], cell: Cell, optimizer: str) -> str:
    known = [value for value in cell.values(rows, optimizer) if not math.isnan(value)]
    return f"{mean(known):.2f}" if known else "NaN"
