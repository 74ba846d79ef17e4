# SPDX-License-Identifier: Apache-2.0
"""Numbers in, matplotlib figure out. Matplotlib is imported when the first picture is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STD, LARGEST, BAD = "#0072B2", "#E69F00", "#CC79A7"
"""Blue, orange and purple of Okabe & Ito's palette, which the colour-blind can tell apart."""
MOST_NAMES = 60  # more layer names than this are not legible one by one
LONGEST_NAME, SHORTEST_WORD = 28, 3
WIDEST_ENTRY = 5.2  # inches of a legend's entry with the longest name
IN_VIEW = 4  # decades to the end of the dtype: N(0, 1000²) at width 128 multiplies by 8000 a layer


def signal_propagation(
    layers: Sequence[str], stds: Sequence[float], *, absmax: Sequence[float], dtype_max: float, title: str
) -> Figure:
    """The signal over depth: standard deviation and largest absolute value of each layer's output.

    Layers whose output is 0 throughout, or constant, and layers that are not finite are marked as such and named in
    the legend; the end of the dtype's range is drawn where the signal comes within a factor of 10,000 of it.

    Args:
        layers: layer names, in the order in which they ran.
        stds: standard deviation of each layer's output.
        absmax: largest absolute value of each layer's output; NaN or infinity where it is not finite.
        dtype_max: largest number of the dtype that activations are held in.
        title: title of the picture.

    Returns:
        A figure of its own, without pyplot: nothing global is touched, and nothing has to be closed.

    Raises:
        ValueError: where the three sequences differ in length.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  (a heavy import, and pictures are few)

    if not len(layers) == len(stds) == len(absmax):
        raise ValueError(
            f"layers, stds and absmax must match, got {len(layers)}, {len(stds)} and {len(absmax)} entries"
        )
    shown = min(len(layers), MOST_NAMES)
    figure = Figure(figsize=(min(max(6.5, 2.5 + 0.24 * shown), 15.0), 4.8), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    finite = [math.isfinite(std) and math.isfinite(top) for std, top in zip(stds, absmax, strict=True)]
    _line(
        axes, [top if ok else math.nan for top, ok in zip(absmax, finite, strict=True)], LARGEST, "s", "largest |value|"
    )
    _line(axes, [std if ok else math.nan for std, ok in zip(stds, finite, strict=True)], STD, "o", "standard deviation")
    _scale(axes, [value for value in (*stds, *absmax) if math.isfinite(value) and value > 0], dtype_max)
    low, high = axes.get_ylim()
    bad = {k: layers[k] for k, ok in enumerate(finite) if not ok}
    flat = [k for k, ok in enumerate(finite) if ok and stds[k] == 0]
    _mark(axes, bad, high, marker="v", label="not finite")
    _mark(axes, {k: layers[k] for k in flat if absmax[k] == 0}, low, marker="^", label="exactly 0")
    _mark(axes, {k: layers[k] for k in flat if absmax[k] != 0}, low, marker="D", label="constant")
    _name_layers(axes, layers)
    axes.set_xlabel("layer, in the order in which they ran", fontsize=12)
    axes.set_ylabel("output, logarithmic", fontsize=12)
    figure.suptitle(plain_text(title), fontsize=13)
    axes.grid(visible=True, axis="y", alpha=0.3)
    _legend(figure, axes)
    return figure


def _line(axes: Any, values: Sequence[float], colour: str, marker: str, label: str) -> None:
    heights = [math.log10(value) if value > 0 else math.nan for value in values]
    size = 6 if len(values) <= MOST_NAMES else 2
    axes.plot(range(len(values)), heights, color=colour, marker=marker, markersize=size, linewidth=1.8, label=label)


def _scale(axes: Any, values: Sequence[float], dtype_max: float) -> None:
    """An axis of decimal logarithms: matplotlib's own logarithmic scale cannot show float64 to its ends."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: PLC0415  (as above)

    low, high = (math.log10(min(values)), math.log10(max(values))) if values else (0.0, 0.0)
    end = math.log10(dtype_max)
    if high + IN_VIEW > end:
        axes.axhline(end, color="black", linestyle="--", linewidth=1.3, label=f"end of the dtype ({dtype_max:.3g})")
        high = max(high, end)
    # At least one decade, so that a flat signal looks flat.
    room = max(1.0, 0.08 * (high - low))
    axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda decade, _: f"$10^{{{decade:.0f}}}$"))


def _mark(axes: Any, found: Mapping[int, str], height: float, *, marker: str, label: str) -> None:
    if found:
        first = plain_text(short_name(next(iter(found.values()))))
        named = f"{label}: {first}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
        heights = [height] * len(found)
        axes.plot(
            list(found), heights, linestyle="", color=BAD, marker=marker, markersize=10, label=named, clip_on=False
        )


def _legend(figure: Figure, axes: Any) -> None:
    """Above the picture, where it covers no mark; the picture grows for it."""
    columns = 2 if figure.get_figwidth() > 2 * WIDEST_ENTRY else 1
    handles, _ = axes.get_legend_handles_labels()
    figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(handles) / columns))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.03), ncols=columns, fontsize=11, frameon=False)


def _name_layers(axes: Any, layers: Sequence[str]) -> None:
    every = math.ceil(len(layers) / MOST_NAMES) if layers else 1
    places = list(range(0, len(layers), every))
    size = 9 if len(places) <= MOST_NAMES // 2 else 7
    axes.set_xticks(places, [plain_text(short_name(layers[k])) for k in places], rotation=90, fontsize=size)
    axes.set_xlim(-0.7, max(len(layers), 1) - 0.3)


def short_name(name: str) -> str:
    """A name that fits under an axis: of a long one the longest words are cut, and the numbers stay."""
    words = (name or "(the model)").split(".")
    while len(".".join(words)) > LONGEST_NAME and max(map(len, words)) > SHORTEST_WORD:
        longest = max(range(len(words)), key=lambda k: len(words[k]))
        words[longest] = f"{words[longest].rstrip('…')[:-1]}…"
    short = ".".join(words)
    return short if len(short) <= LONGEST_NAME else f"…{short[1 - LONGEST_NAME :]}"


def plain_text(text: str) -> str:
    """Text that matplotlib does not take for a formula."""
    return text.replace("$", r"\$")
