# SPDX-License-Identifier: Apache-2.0
"""The runs of the study ``small_data`` as a figure: validation loss by epoch, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_bn.studies.small_data.rows import MARKS, NAMES, Run, mean_and_error, runs_of, values_of
from lightning_bn.studies.study import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = {"batch": ("#0072B2", "o"), "none": ("#E69F00", "s"), "group": ("#009E73", "^"), "layer": ("#CC79A7", "D")}
"""Blue, orange, green and purple of Okabe & Ito's palette, which the colour-blind can tell apart, and a marker each."""
CURVES = {
    "30% label noise, no dropout": Run("batch", noise=0.3),
    "30% label noise, dropout": Run("batch", noise=0.3, dropout="all"),
    "30% label noise, 6 layers, no dropout": Run("batch", noise=0.3, depth=6),
}
PLACES = {
    "true labels": Run("batch"),
    "true labels,\ndropout": Run("batch", dropout="all"),
    "30% noise": Run("batch", noise=0.3),
    "30% noise,\ndropout": Run("batch", noise=0.3, dropout="all"),
    "30% noise,\n6 layers": Run("batch", noise=0.3, depth=6),
}
ENDS = {
    "rise": "rise: last − best validation loss, logarithmic",
    "last_loss": "last validation loss, logarithmic",
    "last_acc": "last validation accuracy",
}


def draw(rows: list[Row]) -> Figure:
    """Mean validation loss by epoch, and mean ± standard error of rise, last loss and last accuracy."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (a heavy import)

    figure = Figure(figsize=(13.5, 8.2), layout="constrained")
    axes = figure.subplots(2, len(CURVES))
    for axis, (title, run) in zip(axes[0], CURVES.items(), strict=True):
        _curves(axis, rows, run)
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("epoch", fontsize=11)
    axes[0][0].set_ylabel("validation loss", fontsize=11)
    axes[0][1].sharey(axes[0][0])
    for axis, (column, title) in zip(axes[1], ENDS.items(), strict=True):
        _ends(axis, rows, column)
        axis.set_title(title, fontsize=12)
        if column != "last_acc":  # a deep network without norm is far from all others
            axis.set_yscale("log", nonpositive="clip")
            axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
    figure.suptitle("100 digits in batches of 8: validation loss by epoch (above), and where it ends", fontsize=14)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(NAMES), fontsize=12, frameon=False)
    return figure


def _curves(axis: Any, rows: Sequence[Row], place: Run) -> None:
    known = runs_of(rows)
    for norm, (colour, marker) in LOOKS.items():
        run = Run(norm, place.depth, place.noise, place.dropout)
        if run in known:
            means = [mean_and_error(values_of(rows, run, f"loss_{epoch}"))[0] for epoch in MARKS]
            axis.plot(MARKS, means, color=colour, marker=marker, markersize=6, linewidth=1.8, label=NAMES[norm])
    axis.grid(visible=True, axis="y", alpha=0.3)


def _ends(axis: Any, rows: Sequence[Row], column: str) -> None:
    known = runs_of(rows)
    for shift, (norm, (colour, marker)) in enumerate(LOOKS.items()):
        for spot, place in enumerate(PLACES.values()):
            run = Run(norm, place.depth, place.noise, place.dropout)
            if run in known:
                mean, error = mean_and_error(values_of(rows, run, column))
                look = {"color": colour, "marker": marker, "markersize": 7, "capsize": 3}
                axis.errorbar(spot + (shift - 1.5) * 0.18, mean, yerr=error, **look)
    axis.set_xticks(range(len(PLACES)), list(PLACES), fontsize=9)
    axis.grid(visible=True, axis="y", alpha=0.3)
