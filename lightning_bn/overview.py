# SPDX-License-Identifier: Apache-2.0
"""Many layers in a few numbers: what the loggers get by default."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import median

from lightning_bn.stats.moments import Summary

SMALLEST = 1e-45  # float32's smallest subnormal: stands for 0 under a logarithm
PREFIX = "bn_overview/"


def spread(statistic: str, values: Iterable[float]) -> dict[str, float]:
    """Median, largest and smallest value over the layers; NaN is left out here and counted elsewhere.

    Example:
        >>> spread("gain", [1.0, 3.0, float("nan")])
        {'bn_overview/gain_median': 2.0, 'bn_overview/gain_max': 3.0, 'bn_overview/gain_min': 1.0}
    """
    known = _known(values)
    if not known:
        return {}
    parts = {"median": median(known), "max": max(known), "min": min(known)}
    return {f"{PREFIX}{statistic}_{name}": value for name, value in parts.items()}


def activation_overview(layers: Mapping[str, Summary]) -> dict[str, float]:
    """Overview scalars of one measured step.

    Args:
        layers: summary by layer.

    Returns:
        Median, largest and smallest over the layers of ``mean``, ``std_log10``, ``abs_max_log10`` (decimal
        logarithms, so that one exploding layer does not flatten the others; 0 reads as -45) and ``zero_share``;
        ``nonfinite_layers``, the number of layers with NaN or infinity.
    """
    rows = [row for row in layers.values() if row.count]
    finite = [row for row in rows if row.is_finite]
    return {
        **spread("mean", (row.mean for row in finite)),
        **spread("std_log10", (_log10(row.std) for row in finite)),
        **spread("abs_max_log10", (_log10(row.absmax) for row in finite if row.ranged)),
        **spread("zero_share", (row.zero_share for row in finite)),
        f"{PREFIX}nonfinite_layers": float(len(rows) - len(finite)),
    }


def unit_overview(dead: Iterable[float], saturated: Iterable[float]) -> dict[str, float]:
    """Overview scalars of the units of activation layers.

    Args:
        dead: for each rectifier the share of units that were never active in its last window.
        saturated: for each squashing layer the share of values that passed almost no gradient in its last window.

    Returns:
        ``dead_share`` and ``saturated_share`` as median, largest and smallest over the layers; without such layers, or
        before the first window is over, nothing.

    Example:
        >>> unit_overview([0.5], [])
        {'bn_overview/dead_share_median': 0.5, 'bn_overview/dead_share_max': 0.5, 'bn_overview/dead_share_min': 0.5}
    """
    return {**spread("dead_share", dead), **spread("saturated_share", saturated)}


def update_overview(ratios: Iterable[float]) -> dict[str, float]:
    """Overview scalars of one optimizer step.

    Args:
        ratios: ‖Δw‖/‖w‖ of each weight.

    Returns:
        ``update_ratio_log10``, the decimal logarithm, as median, largest and smallest over the weights; without
        weights nothing.

    Example:
        >>> update_overview([0.01])["bn_overview/update_ratio_log10_median"]
        -2.0
    """
    return spread("update_ratio_log10", map(_log10, ratios))


def rank_overview(ranks: Mapping[str, float]) -> dict[str, float]:
    """Overview scalars of the effective rank.

    Args:
        ranks: participation ratio by layer.

    Returns:
        ``effective_rank`` as median, largest and smallest over the layers; without layers nothing.

    Example:
        >>> rank_overview({"a": 3.0})["bn_overview/effective_rank_median"]
        3.0
    """
    return spread("effective_rank", ranks.values())


def gradient_overview(gradients: Mapping[str, Summary]) -> dict[str, float]:
    """Overview scalars of gradients with respect to outputs.

    Args:
        gradients: summary by layer.

    Returns:
        ``gradient_std_log10``, the decimal logarithm, as median, largest and smallest over the layers whose gradient is
        finite; without layers nothing.

    Example:
        >>> gradient_overview({"a": Summary(8, 0.0, 0.01, 0.1, 0.0)})["bn_overview/gradient_std_log10_max"]
        -2.0
    """
    return spread("gradient_std_log10", (_log10(row.std) for row in gradients.values() if row.is_finite))


def activation_table(
    layers: Mapping[str, Summary],
    ranks: Mapping[str, float] | None = None,
    gradients: Mapping[str, Summary] | None = None,
) -> str:
    """One row for each layer, in markdown.

    Args:
        layers: summary of each layer's output.
        ranks: effective rank by layer; where there are none they have no column.
        gradients: summary of the gradient with respect to each layer's output; likewise.
    """
    names = ["layer", "values", "mean", "std", "largest abs", "zeros", "non-finite"]
    names += ["effective rank"] * bool(ranks) + ["gradient std", "gradient non-finite"] * bool(gradients)
    lines = [names, ["---", *["---:"] * (len(names) - 1)]]
    for name, row in layers.items():
        zeros = "undefined" if math.isnan(row.zero_share) else f"{row.zero_share:.1%}"
        seen = [f"{row.absmax:.4g}", zeros] if row.ranged else ["", ""]
        cells = [f"`{name or '(the model)'}`", str(row.count), f"{row.mean:.4g}", f"{row.std:.4g}", *seen, _count(row)]
        if ranks:
            cells.append(f"{ranks[name]:.3g}" if name in ranks else "")
        if gradients:
            slope = gradients.get(name)
            cells += ["", ""] if slope is None else [f"{slope.std:.4g}", _count(slope)]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" if cells[0] != "---" else f"|{'|'.join(cells)}|" for cells in lines)


def first_pass_table(layers: Mapping[str, Summary], ends: Mapping[str, float]) -> str:
    """One row for each layer in the order in which they ran, in markdown.

    Args:
        layers: summary of each layer's output.
        ends: largest number of the dtype that each output is held in, by layer.

    Returns:
        The table; ``headroom`` is the factor by which the largest value may grow before that range ends. Empty without
        layers.
    """
    if not layers:
        return ""
    rows = ["| layer | std | largest abs | headroom |", "|---|---:|---:|---:|"]
    for name, row in layers.items():
        end = ends.get(name)
        left = f"× {end / row.absmax:.2g}" if end and row.absmax and math.isfinite(row.absmax) else ""
        rows.append(f"| `{name or '(the model)'}` | {row.std:.4g} | {row.absmax:.4g} | {left} |")
    return "\n".join(rows)


def drift_overview(
    since_start: Iterable[tuple[float, float]], since_best: Iterable[tuple[float, float]]
) -> dict[str, float]:
    """Overview scalars of γ and β drift.

    Args:
        since_start: for each layer the relative distance of γ and of β from the initial values.
        since_best: the same from the values at the best validation; empty before the first one.

    Returns:
        ``gamma_drift`` and ``beta_drift`` as median, largest and smallest over the layers;
        ``gamma_drift_since_best_max`` and ``beta_drift_since_best_max``.
    """
    found: dict[str, float] = {}
    for name, values in zip(("gamma_drift", "beta_drift"), zip(*since_start, strict=True), strict=False):
        found |= spread(name, values)
    for name, values in zip(("gamma_drift", "beta_drift"), zip(*since_best, strict=True), strict=False):
        found |= {f"{PREFIX}{name}_since_best_max": value for value in sorted(_known(values))[-1:]}
    return found


def speed_overview(speed: Iterable[tuple[float, float]], share: float) -> dict[str, float]:
    """Overview scalars of what one optimizer step did to γ and β.

    Args:
        speed: for each layer ‖Δγ‖/‖γ‖ and ‖Δβ‖/‖γ‖.
        share: part of the squared gradient norm that fell on γ and β; NaN where not known.

    Returns:
        ``gamma_speed_log10`` and ``beta_speed_log10``, decimal logarithms, as median, largest and smallest over the
        layers; ``affine_gradient_share``, where known.

    Example:
        >>> speed_overview([(0.01, 0.1)], 0.25)["bn_overview/gamma_speed_log10_median"]
        -2.0
    """
    found: dict[str, float] = {}
    for name, values in zip(("gamma_speed", "beta_speed"), zip(*speed, strict=True), strict=False):
        found |= spread(f"{name}_log10", map(_log10, values))
    return found | {f"{PREFIX}affine_gradient_share": value for value in _known([share])}


def _count(row: Summary) -> str:
    """Number of non-finite values, in words where nobody counted them."""
    return "not counted" if math.isnan(row.nonfinite) else str(row.nonfinite)


def _known(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _log10(value: float) -> float:
    return math.log10(max(value, SMALLEST))
