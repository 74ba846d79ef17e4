# SPDX-License-Identifier: Apache-2.0
"""A statistic of all layers over a whole run in one picture: numbers in, matplotlib figure out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_bn.figures import MOST_NAMES, plain_text, short_name
from lightning_bn.stats.history import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BAD, UNMEASURED, HATCH = "#FF00FF", "#E4E4E4", "#FFFFFF"
"""Magenta, which to normal eyes and to all three kinds of colour blindness lies 34 CIELAB units or more from every
colour of both scales, and light grey, which is hatched besides."""
FENCE = 2.0  # interquartile ranges outside the quartiles, up to which colours tell values apart
FEW_DECADES = 3
NARROWEST = 1.0  # decades that a logarithmic scale spans at least, so that a steady signal looks steady
WIDTH, ROW, LOWEST, HIGHEST, AROUND = 10.5, 0.2, 1.0, 12.5, 2.3
"""Inches: width of the picture; height of a layer, of the field at least and at most, and of all else."""


@dataclass(frozen=True)
class Scale:
    """How one statistic is shown.

    Args:
        question: what the picture answers; its title.
        label: name of the statistic, with its unit.
        colours: name of a sequential colour map of matplotlib.
        limits: values at its two ends. None for decimal logarithms, whose limits follow from the values and are not
            moved by a few extreme ones; -inf, the logarithm of 0, then is the smallest of all values.
    """

    question: str
    label: str
    colours: str
    limits: tuple[float, float] | None = None


LOG_STD = Scale("Does the signal keep its size?", "standard deviation of the layer's output, log scale", "viridis")
DEAD_SHARE = Scale("Do units die?", "share of the layer's units that were never active", "cividis", (0.0, 1.0))


def heatmap(grid: Grid, scale: Scale) -> Figure:
    """Layers from top to bottom, optimizer steps from left to right, the statistic as colour.

    What is NaN or infinite is magenta, and the legend says where and when it began; what was not measured is
    light grey and hatched.

    Args:
        grid: the statistic, from :meth:`.stats.history.History.grid`.
        scale: how it is shown, such as :data:`LOG_STD` and :data:`DEAD_SHARE`.

    Returns:
        A figure of its own, without pyplot: nothing global is touched, and nothing has to be closed.

    Raises:
        ValueError: if the grid has no layer.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  (a heavy import, and pictures are few)

    if not grid.layers:
        raise ValueError("grid must have at least one layer, got none")
    field = min(max(ROW * len(grid.layers), LOWEST), HIGHEST)
    figure = Figure(figsize=(WIDTH, field + AROUND), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    fine = np.isfinite(grid.values) | (np.isneginf(grid.values) if scale.limits is None else False)
    bad = grid.measured & ~fine
    _hatch(axes)
    _paint(axes, grid, np.ma.array(grid.values, np.float64, mask=~(grid.measured & fine)), scale)
    if bad.any():
        _paint_bad(axes, grid, bad)
    _name_layers(axes, grid.layers, np.any(bad, axis=1))
    _name_steps(axes, grid)
    figure.suptitle(scale.question, fontsize=14)
    _legend(figure, grid, bad)
    return figure


def _edges(grid: Grid) -> tuple[list[float], list[float]]:
    return [*grid.steps, grid.end], [k - 0.5 for k in range(len(grid.layers) + 1)]


def _hatch(axes: Any) -> None:
    """The ground, which shows where nothing was measured."""
    from matplotlib.patches import Rectangle  # noqa: PLC0415  (as above)

    ground = Rectangle((0, 0), 1, 1, transform=axes.transAxes, facecolor=UNMEASURED, edgecolor=HATCH, linewidth=0)
    ground.set(hatch="////", zorder=0)
    axes.add_patch(ground)


def _paint(axes: Any, grid: Grid, values: Any, scale: Scale) -> None:
    """The cells, and their colour bar."""
    from matplotlib.ticker import FixedLocator, FuncFormatter  # noqa: PLC0415  (as above)

    known = values.compressed()
    low, high = scale.limits or _limits(known[np.isfinite(known)])
    beyond = bool((known < low).any()), bool((known > high).any())
    mesh = axes.pcolormesh(*_edges(grid), values.clip(low, high), cmap=scale.colours, vmin=low, vmax=high)
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[beyond]
    bar = axes.figure.colorbar(mesh, ax=axes, location="top", extend=extend, extendfrac=0.03, aspect=50, pad=0.02)
    show = _power if scale.limits is None else "{:g}".format
    bar.ax.xaxis.set_major_locator(FixedLocator(_ticks(low, high, logarithmic=scale.limits is None)))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    reach = {"down to": known.min, "up to": known.max}
    ends = [f"{word} {show(end())}" for (word, end), there in zip(reach.items(), beyond, strict=True) if there]
    clipped = f"\nbeyond the pointed ends, in their colours: {' and '.join(ends)}" if ends else ""
    bar.set_label(scale.label + clipped, fontsize=11)


def _ticks(low: float, high: float, *, logarithmic: bool) -> list[float]:
    """Round numbers between the ends; on a logarithmic scale powers of ten, and between few of them 2 and 5."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415  (as above)

    if logarithmic and high - low <= FEW_DECADES:
        powers = range(math.floor(low), math.ceil(high) + 1)
        found = [power + math.log10(factor) for power in powers for factor in (1, 2, 5)]
    else:
        found = list(MaxNLocator(8, steps=[1, 2, 5, 10], integer=logarithmic).tick_values(low, high))
    return [tick for tick in found if low <= tick <= high]


def _limits(known: NDArray[np.float64]) -> tuple[float, float]:
    """The range of the values, without those far outside the middle half (Tukey's fences), at least a decade."""
    if not len(known):
        return -NARROWEST / 2, NARROWEST / 2
    first, third = np.quantile(known, [0.25, 0.75])
    room = max(FENCE * (third - first), NARROWEST / 2)
    low, high = max(known.min(), first - room), min(known.max(), third + room)
    missing = max(NARROWEST - (high - low), 0.0) / 2
    return float(low - missing), float(high + missing)


def _power(exponent: float) -> str:
    """Ten to that power, in two digits."""
    if abs(exponent) <= FEW_DECADES or exponent == -math.inf:
        return f"{float(f'{10**exponent:.2g}'):g}"
    power = math.floor(exponent + 0.02)  # 9.6 and more is shown as the next power
    factor = f"{10 ** (exponent - power):.1f}"
    return f"$10^{{{power}}}$" if factor == "1.0" else rf"${factor} \cdot 10^{{{power}}}$"


def _paint_bad(axes: Any, grid: Grid, bad: NDArray[np.bool_]) -> None:
    """One colour over all, and a mark beside each row that has it, as one cell of many is small."""
    from matplotlib.colors import ListedColormap  # noqa: PLC0415  (as above)

    axes.pcolormesh(*_edges(grid), np.ma.array(np.ones(bad.shape), mask=~bad), cmap=ListedColormap([BAD]))
    rows = np.flatnonzero(bad.any(1))
    beside = {"transform": axes.get_yaxis_transform(), "clip_on": False}
    axes.plot([1.008] * len(rows), rows, linestyle="", marker="<", markersize=6, color=BAD, **beside)


def _name_layers(axes: Any, layers: Sequence[str], bad: NDArray[np.bool_]) -> None:
    """Of many layers as many names as are legible, first those of rows with bad cells."""
    apart = math.ceil(len(layers) / MOST_NAMES)
    places: list[int] = []
    for place in [*np.flatnonzero(bad).tolist(), *range(0, len(layers), apart)]:
        if all(abs(place - other) >= apart for other in places):
            places.append(place)
    within = _shared(layers)
    names = [plain_text(short_name(layers[place].removeprefix(within))) for place in places]
    axes.set_yticks(places, names, fontsize=9 if len(places) <= MOST_NAMES // 2 else 7)
    for place, label in zip(places, axes.get_yticklabels(), strict=True):
        if bad[place]:
            label.set(color=BAD, weight="bold")
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_ylabel(f"layer in {plain_text(within[:-1])}" if within else "layer", fontsize=11)


def _shared(layers: Sequence[str]) -> str:
    """The modules that all layers lie in, with the dot behind them."""
    depths = zip(*(layer.split(".")[:-1] for layer in layers), strict=False)
    return "".join(f"{words[0]}." for words in takewhile(lambda words: len(set(words)) == 1, depths))


def _name_steps(axes: Any, grid: Grid) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter  # noqa: PLC0415  (as above)

    axes.set_xlim(grid.steps[0], grid.end)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    mean = "" if grid.stride == 1 else f" (each column is the mean of {grid.stride} measured steps)"
    axes.set_xlabel(f"optimizer step{mean}", fontsize=11)


def _legend(figure: Figure, grid: Grid, bad: NDArray[np.bool_]) -> None:
    from matplotlib.patches import Patch  # noqa: PLC0415  (as above)

    entries = []
    if bad.any():
        entries.append(Patch(facecolor=BAD, label=f"NaN or infinite: {_first(grid, bad)}"))
    if not grid.measured.all():
        entries.append(Patch(facecolor=UNMEASURED, edgecolor=HATCH, hatch="////", linewidth=0, label="not measured"))
    if entries:
        figure.legend(handles=entries, loc="outside lower center", ncols=2, fontsize=11, frameon=False)


def _first(grid: Grid, bad: NDArray[np.bool_]) -> str:
    """Where and when it began; of layers in one column none is called the first."""
    column = int(np.any(bad, axis=0).argmax())
    rows = np.flatnonzero(bad[:, column])
    layer = plain_text(short_name(grid.layers[rows[0]].removeprefix(_shared(grid.layers))))
    together, later = len(rows) - 1, int(np.any(bad, axis=1).sum()) - len(rows)
    about = "about " if grid.stride > 1 else ""
    begin = f"from {about}step {grid.steps[column]:,} in {layer}" + (f" and {together} more" if together else "")
    return begin + (f", later in {later} more" if later else "")
