# SPDX-License-Identifier: Apache-2.0
"""Pictures of the verdict on overfitting: losses by epoch, who carries their rise, how noisy batch statistics are."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from lightning_bn.figures import BAD, LARGEST, MOST_NAMES, STD, plain_text, short_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARRIED = "#56B4E9"  # sky blue of the same palette, on which black lines are seen well
TITLE, LETTERS = 64, 100  # in a line of a title, and of the caption below it
FLATTEST = 0.2  # part of the loss that a linear axis spans at least, so that a flat curve looks flat
FEW_DECADES = 3
HALF = 0.5  # share of the rise that decides the verdict
LEFT, RIGHT = -0.5, 1.5  # shares beyond these are drawn at the edge
LARGE = 10_000.0  # share from which on its percentage has three digits and a power of ten
WIDTH, ROW, LOWEST, HIGHEST = 9.0, 0.2, 1.4, 12.5
"""Inches: width of a picture; height of a layer, and of all layers together at least and at most."""


def loss_curves(
    epochs: Sequence[float], train: Sequence[float], valid: Sequence[float], *, best: int, name: str, verdict: str
) -> Figure:
    """Training and validation loss by epoch, the best validation, and the verdict in words.

    The axis of the loss is logarithmic where all losses are positive and span more than a decade. What is NaN or
    infinite leaves a gap in its curve and has a mark at the upper edge, which the legend explains.

    Args:
        epochs: epoch of each validation, finite; fractions where there are several in one epoch.
        train: mean training loss in front of each validation.
        valid: loss of each validation.
        best: place of the best validation in these sequences, counted from 0; not marked where its loss is not finite.
        name: name of the validation loss.
        verdict: what is said about overfitting, of any length; empty where there is nothing to say.

    Returns:
        A figure of its own, without pyplot: nothing global is touched, and nothing has to be closed.

    Raises:
        ValueError: where there is no validation, the sequences differ in length, or ``best`` is no place in them.
    """
    _require_match(epochs=epochs, train=train, valid=valid)
    if not 0 <= best < len(valid):
        raise ValueError(f"best must be a place among {len(valid)} validations, counted from 0, got {best}")
    figure, axes = _sheet(f"Training loss and {name} by epoch", verdict, height=4.6)
    logarithmic = _scale_losses(axes, [value for value in (*train, *valid) if math.isfinite(value)])
    _curve(axes, epochs, train, "training loss", color=LARGEST, marker="s", linestyle="--")
    shown = f"validation loss, {plain_text(short_name(name))}"
    _curve(axes, epochs, valid, shown, color=STD, marker="o", linestyle="-")
    if math.isfinite(valid[best]):
        label = f"best validation: {valid[best]:.4g} in epoch {epochs[best]:.6g}"
        axes.axvline(epochs[best], color="black", linestyle=":", linewidth=1.3, zorder=1)
        axes.plot([epochs[best]], [valid[best]], linestyle="", color="black", marker="*", markersize=15, label=label)
    for values, label, marker, height in ((train, "training", "v", 0.92), (valid, "validation", "X", 0.97)):
        bad = [epoch for epoch, value in zip(epochs, values, strict=True) if not math.isfinite(value)]
        _mark_bad(axes, bad, f"{label} loss NaN or infinite", marker=marker, height=height)
    _scale_epochs(axes, epochs)
    axes.set_ylabel("loss, logarithmic" if logarithmic else "loss", fontsize=12)
    axes.grid(visible=True, axis="y", alpha=0.3)
    return _finish(figure, axes, "epoch")


def attribution(before: float, after: float, first: float, last: float, *, name: str, best_epoch: int) -> Figure:
    """Which part of the rise of the loss γ and β carry, and which part the other weights.

    The part is measured in both orders: (first − before)/(after − before), where γ and β move first, and (after −
    last)/(after − before), where they move last. Bars meet at the mean of both, and an error bar goes from one to the
    other; see :attr:`.stats.attribution.Losses.shares`. What lies beyond the axis is drawn as an arrow at its edge,
    with its number in the labels.

    Args:
        before: loss with all weights of the best validation.
        after: loss with all weights of the end.
        first: loss with weights of the best validation, and γ and β of the end.
        last: loss with weights of the end, and γ and β of the best validation.
        name: name of the validation loss.
        best_epoch: epoch of the best validation.

    Returns:
        A figure of its own, without pyplot.

    Raises:
        ValueError: where the loss did not rise by a finite number, as there are no parts of it.
    """
    rise = after - before
    if not 0 < rise < math.inf:
        raise ValueError(f"after must be above before by a finite number, got before={before} and after={after}")
    shares = (first - before) / rise, (after - last) / rise
    mean = (shares[0] + shares[1]) / 2
    caption = f"from {before:.4g} with the weights of epoch {best_epoch} to {after:.4g} with the weights of the end"
    figure, axes = _sheet(f"Who carries the rise of {name}?", caption, height=2.8)
    if math.isfinite(mean):
        bars = {"height": 0.84, "edgecolor": "black", "linewidth": 0.8}
        axes.barh([0], [mean], color=CARRIED, **bars)
        axes.barh([1], [1 - mean], left=mean, color=LARGEST, hatch="//", **bars)
    _orders(axes, shares)
    decides = f"{HALF:.0%}: γ and β drive the rise if both orders lie at it or above"
    axes.axvline(HALF, color="black", linestyle="--", linewidth=1.5, label=decides)
    _scale_shares(axes, [share for share in (0.0, 1.0, *shares) if not math.isnan(share)])
    words = f"γ and β\n{_interval(*shares)}", f"other weights\n{_interval(1 - shares[0], 1 - shares[1])}"
    axes.set_yticks([0, 1], words, fontsize=12)
    axes.set_ylim(1.5, -0.5)
    return _finish(figure, axes, "share of the rise", columns=1)


def effective_samples(layers: Sequence[str], values: Sequence[float], *, noted: float, severe: float) -> Figure:
    """By how many independent values each channel is normalised, layer by layer, and what is too few.

    Layers lie from top to bottom; up to 60 are named, more are counted. Infinite m_eff is marked at the right edge,
    NaN at the left one.

    Args:
        layers: names of the BatchNorm layers, in the order of the model.
        values: effective samples per channel m_eff of each, positive, or NaN where it is not known; see
            :func:`.stats.attribution.effective_samples`.
        noted: m_eff below which a layer is noted.
        severe: m_eff below which the median over the layers is a warning.

    Returns:
        A figure of its own, without pyplot.

    Raises:
        ValueError: for no layer, sequences that differ in length, a value not positive, or thresholds not in order.
    """
    _require_match(layers=layers, values=values)
    if any(value <= 0 for value in values):
        raise ValueError(f"values must be positive or NaN, got {min(value for value in values if value <= 0)}")
    if not 0 < severe < noted < math.inf:
        raise ValueError(f"severe must be positive and below a finite noted, got severe={severe} and noted={noted}")
    known = [value for value in values if not math.isnan(value)]
    few = sum(value < noted for value in known)
    caption = f"median {median(known):.3g}; {few} of {len(known)} below {noted:g}" if known else "not known"
    height = 1.2 + min(max(ROW * len(layers), LOWEST), HIGHEST)
    figure, axes = _sheet("How many independent values normalise each channel?", caption, height=height, pad=20.0)
    finite = [value for value in (1.0, *known, noted, severe) if math.isfinite(value)]
    axes.set_xscale("log")
    axes.set_xlim(min(finite) / 1.3, max(finite) * 2)
    _name_decades(axes.xaxis, math.log10(max(finite) / min(finite)))
    _threshold(axes, noted, f"{noted:g}: a layer below it is noted", line="--", shift=2)
    _threshold(axes, severe, f"{severe:g}: a median over the layers below it is a warning", line=":", shift=-2)
    _layer_marks(axes, values, noted, severe)
    _name_layers(axes, layers)
    return _finish(figure, axes, "effective samples per channel, logarithmic")


def _require_match(**sequences: Sequence[object]) -> None:
    lengths = [*map(len, sequences.values())]
    if len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(f"{', '.join(sequences)} must have one and the same length, not 0, got {lengths}")


def _sheet(title: str, caption: str, *, height: float, pad: float = 6.0) -> tuple[Figure, Any]:
    """A figure with one pair of axes, a title and a caption below it; it grows with their lines."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (a heavy import, and pictures are few)

    heading, lines = textwrap.wrap(title, TITLE), textwrap.wrap(caption, LETTERS)
    height += 0.22 * len(heading) + 0.18 * len(lines)
    figure = Figure(figsize=(WIDTH, height), dpi=110, layout="constrained")
    figure.suptitle(plain_text("\n".join(heading)), fontsize=13)
    axes = figure.add_subplot()
    axes.set_title(plain_text("\n".join(lines)), fontsize=10.5, multialignment="left", pad=pad)
    return figure, axes


def _finish(figure: Figure, axes: Any, label: str, *, columns: int = 2) -> Figure:
    """Name the horizontal axis, with the legend below it, where it covers no mark; the picture grows for it."""
    axes.set_xlabel(label, fontsize=12)
    handles, _ = axes.get_legend_handles_labels()
    figure.set_figheight(figure.get_figheight() + 0.24 * math.ceil(len(handles) / columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=11, frameon=False)
    return figure


def _curve(axes: Any, epochs: Sequence[float], values: Sequence[float], label: str, **look: str) -> None:
    """A line with a mark at each of up to 60 validations, at some of more, and at each between two gaps."""
    heights = [value if math.isfinite(value) else math.nan for value in values]
    gaps = [True, *map(math.isnan, heights), True]
    every = math.ceil(len(values) / MOST_NAMES)
    marks = [k for k in range(len(values)) if k % every == 0 or (gaps[k] and gaps[k + 2])]
    axes.plot(epochs, heights, label=label, markevery=marks, markersize=6, linewidth=1.8, **look)


def _mark_bad(axes: Any, places: Sequence[float], label: str, *, marker: str, height: float) -> None:
    """Marks in the room at the upper edge, which no curve reaches."""
    if places:
        label += f": epoch {places[0]:.6g}" + (f" and {len(places) - 1} more" if len(places) > 1 else "")
        look = {"color": BAD, "marker": marker, "markersize": 9, "linestyle": "", "label": label}
        axes.plot(places, [height] * len(places), transform=axes.get_xaxis_transform(), **look)


def _scale_losses(axes: Any, known: Sequence[float]) -> bool:
    """Choose the axis of the loss, with room for marks above the curves; True where it is logarithmic."""
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if low > 0 and high > 10 * low:
        decades = math.log10(high / low)
        axes.set_yscale("log")
        axes.set_ylim(low * 10 ** (-0.06 * decades), high * 10 ** (0.18 * decades))
        _name_decades(axes.yaxis, decades)
        return True
    middle, span = (low + high) / 2, max(high - low, FLATTEST * max(abs(low), abs(high)), 1e-30)
    axes.set_ylim(middle - 0.56 * span, middle + 0.68 * span)
    axes.yaxis.set_major_formatter("{x:.4g}")
    return False


def _name_decades(axis: Any, decades: float) -> None:
    """Plain numbers on a logarithmic axis where there are few powers of ten, with 2 and 5 between them."""
    if decades <= FEW_DECADES:
        axis.get_major_locator().set_params(subs=(1, 2, 5))
        axis.set_major_formatter("{x:g}")


def _scale_epochs(axes: Any, epochs: Sequence[float]) -> None:
    room = max(0.03 * (max(epochs) - min(epochs)), 0.5 if len(epochs) == 1 else 0.05)
    axes.set_xlim(min(epochs) - room, max(epochs) + room)
    whole = all(float(epoch).is_integer() for epoch in epochs)
    axes.locator_params(axis="x", nbins=10, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1)
    axes.xaxis.set_major_formatter("{x:.6g}")


def _orders(axes: Any, shares: tuple[float, float]) -> None:
    """The interval between both orders, and its ends, which have different marks as either may be the larger."""
    ends = [min(max(share, LEFT), RIGHT) for share in shares]
    if not any(math.isnan(share) for share in shares):
        middle, half = sum(ends) / 2, abs(ends[1] - ends[0]) / 2
        axes.errorbar([middle], [0], xerr=[half], fmt="none", ecolor="black", elinewidth=2, capsize=9, capthick=2)
    looks = ("o", 12, "white", "before"), ("s", 6, "black", "after")
    for share, end, (marker, size, fill, when) in zip(shares, ends, looks, strict=True):
        arrow = "<" if share < LEFT else ">" if share > RIGHT else marker
        beyond = ", beyond the axis" if arrow != marker else ""
        label = f"γ and β moved {when} the other weights: {_percent(share)}{beyond}"
        look = {"markersize": size, "markerfacecolor": fill, "markeredgecolor": "black"}
        axes.plot([end], [0], linestyle="", marker=arrow, clip_on=False, zorder=5, label=label, **look)


def _scale_shares(axes: Any, shares: Sequence[float]) -> None:
    axes.set_xticks([quarter / 4 for quarter in range(-2, 7)])
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlim(max(min(shares) - 0.03, LEFT), min(max(shares) + 0.03, RIGHT))
    axes.vlines([0, 1], -0.5, 1.5, color="black", linewidth=0.8, zorder=0)


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return "NaN" if math.isnan(share) else "∞" if share > 0 else "−∞"
    return (f"{share:,.0%}" if abs(share) < LARGE else f"{100 * share:.3g}%").replace("-", "−")


def _interval(*shares: float) -> str:
    """A share in words, with its mean where both orders are finite."""
    mean, low, high = _percent(sum(shares) / len(shares)), _percent(min(shares)), _percent(max(shares))
    if any(map(math.isnan, shares)):
        return "not known"
    if any(map(math.isinf, shares)):
        return f"{low} to {high}"
    return low if low == high else f"{mean} ({low} to {high})"


def _threshold(axes: Any, value: float, label: str, *, line: str, shift: int) -> None:
    """A line with its number at its head, on the side where no other line is."""
    axes.axvline(value, color="black", linestyle=line, linewidth=1.6, zorder=1, label=label)
    place = {"xycoords": ("data", "axes fraction"), "xytext": (shift, 2), "textcoords": "offset points"}
    axes.annotate(f"{value:g}", (value, 1), ha="left" if shift > 0 else "right", va="bottom", fontsize=10, **place)


def _layer_marks(axes: Any, values: Sequence[float], noted: float, severe: float) -> None:
    """One mark for each layer; kinds differ in shape and colour, and the legend counts them."""
    low, high = axes.get_xlim()
    size = 7 if len(values) <= MOST_NAMES else 4
    kinds = (
        (f"at least {noted:g}", "o", STD, lambda value: noted <= value < math.inf, None),
        (f"{severe:g} to {noted:g}", "s", LARGEST, lambda value: severe <= value < noted, None),
        (f"below {severe:g}", "D", BAD, lambda value: value < severe, None),
        ("infinite, no noise seen", ">", STD, math.isinf, high),
        ("NaN, not known", "x", "black", math.isnan, low),
    )
    for label, marker, colour, belongs, edge in kinds:
        rows = [row for row, value in enumerate(values) if belongs(value)]
        places = [values[row] if edge is None else edge for row in rows]
        named = f"{label}: {len(rows)} layer{'s' * (len(rows) != 1)}"
        look = {"color": colour, "marker": marker, "markersize": size, "markeredgewidth": 1.5, "linestyle": ""}
        if rows:
            axes.plot(places, rows, label=named, zorder=3, clip_on=edge is None, **look)


def _name_layers(axes: Any, layers: Sequence[str]) -> None:
    named = len(layers) <= MOST_NAMES
    if named:
        axes.set_yticks(range(len(layers)), [plain_text(short_name(layer)) for layer in layers], fontsize=9)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_ylabel("layer, in model order" + ("" if named else ", counted from 0"), fontsize=12)
    axes.grid(visible=True, alpha=0.3)
