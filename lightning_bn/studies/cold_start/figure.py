# SPDX-License-Identifier: Apache-2.0
"""The study ``cold_start`` as a picture: what overflows, what falls silent, what helps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_bn.studies.cold_start.rows import (
    BATCHES,
    CASES,
    HUGE,
    STDS,
    WIDTHS,
    accuracies,
    ends,
    silent,
    trained,
)
from lightning_bn.studies.seeds import mean, size
from lightning_bn.studies.starts import CHANCE
from lightning_bn.studies.study import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS, MARKERS, SIZES = ("#0072B2", "#D55E00", "#009E73"), ("o", "s", "^"), (13, 9, 5)
"""Blue, vermilion and green of Okabe & Ito's palette, which the colour-blind can tell apart; shapes besides."""


def draw(rows: list[Row]) -> Figure:
    """Overflows in float16 by fan-in, silent channels by what comes in, accuracy and first loss by remedy."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (a heavy import, and pictures are few)

    figure = Figure(figsize=(11.5, 9.2), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.35])
    upper, lower = halves
    left, right = upper.subplots(1, 2)
    _range(left, rows)
    _silence(right, rows)
    _training(lower.subplots(), rows)
    figure.suptitle("N(0, σ²) in front of BatchNorm", fontsize=14)
    return figure


def _range(axes: Any, rows: list[Row]) -> None:
    for std, colour, marker, width in zip(STDS, COLOURS, MARKERS, SIZES, strict=True):
        found = [ends(rows, "batch", "float16", width=fan_in, std=std) for fan_in in WIDTHS]
        shares = [len(end.hits) / len(end.seen) for end in found]
        axes.plot(range(len(WIDTHS)), shares, color=colour, marker=marker, markersize=width, label=f"σ = {std:g}")
    axes.set_xticks(range(len(WIDTHS)), list(map(str, WIDTHS)), fontsize=11)
    axes.set_xlabel("fan-in", fontsize=11)
    axes.set_ylabel("share of networks", fontsize=11)
    axes.set_title("Not finite in the first forward pass:\nfloat16, BatchNorm behind every layer", fontsize=11)
    _dress(axes, "upper left")


def _silence(axes: Any, rows: list[Row]) -> None:
    for batch, colour, marker, width in zip(BATCHES, COLOURS, MARKERS, SIZES, strict=True):
        shares = [silent(rows, batch, std) for std in HUGE]
        axes.semilogx(HUGE, shares, color=colour, marker=marker, markersize=width, label=f"batch size {batch}")
    axes.set_xlabel("standard deviation of what BatchNorm gets", fontsize=11)
    axes.set_ylabel("share of channels", fontsize=11)
    axes.set_title("Exactly 0 behind BatchNorm, without any NaN:\nfloat32, CPU", fontsize=11)
    _dress(axes, "lower right")


def _training(axes: Any, rows: list[Row]) -> None:
    runs = [(case, std) for case, stds in CASES.items() for std in stds]
    for place, (case, std) in enumerate(runs):
        for offset, name in ((-0.19, "adam"), (0.19, "sgd")):
            values = accuracies(rows, case, name, std)
            colour, hatch = (COLOURS[0], "") if name == "adam" else (COLOURS[1], "//")
            axes.barh(place + offset, mean(values), 0.36, color=colour, hatch=hatch, edgecolor="white", zorder=2)
            axes.plot(values, [place + offset] * len(values), "k|", markersize=8, zorder=3)
        loss = mean(trained(rows, case, "loss_ratio", std))
        axes.text(1.02, place, "not finite" if math.isnan(loss) else size(loss), va="center", fontsize=11)
    axes.text(1.02, -0.85, "first loss over ln 10", va="center", fontsize=11)
    axes.axvline(CHANCE, color="black", linestyle=":", linewidth=1.3, zorder=4)
    axes.set_yticks(range(len(runs)), [_label(case, std) for case, std in runs], fontsize=11)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_xlabel("accuracy after five epochs (bar: mean, strokes: seeds, dotted line: chance)", fontsize=11)
    names = (("Adam", COLOURS[0], ""), ("SGD", COLOURS[1], "//"))
    for name, colour, hatch in names:
        axes.barh(math.nan, 0, color=colour, hatch=hatch, edgecolor="white", label=name)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, fontsize=11, frameon=False)
    axes.grid(visible=True, axis="x", alpha=0.3)


def _label(case: str, std: float) -> str:
    words = case.replace(", ", ",\n")
    return words if len(CASES[case]) == 1 else f"{words}, σ = {std:g}"


def _dress(axes: Any, corner: str) -> None:
    axes.set_ylim(-0.05, 1.05)
    axes.legend(fontsize=11, loc=corner)
    axes.grid(visible=True, alpha=0.3)
