# SPDX-License-Identifier: Apache-2.0
"""What the loggers show of the layers of one fit: overview, table, maps of layer by step, histograms of sick layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_bn.callbacks.verdicts import overview
from lightning_bn.callbacks.windows import Window
from lightning_bn.figures import signal_propagation
from lightning_bn.findings import Finding, Severity
from lightning_bn.heatmaps import DEAD_SHARE, LOG_STD, heatmap
from lightning_bn.overview import activation_table
from lightning_bn.rules.vanishing_gradient import Weight
from lightning_bn.sinks import Loggers
from lightning_bn.stats.histogram import BINS, raw_histogram
from lightning_bn.stats.history import History
from lightning_bn.stats.moments import Summary

MOST_FLAGGED = 8
"""Layers with histograms; more are no help to the eye."""
FLOAT32 = 3.4028234663852886e38
"""Its largest number."""
MAPS = {"log_std": ("bn_heatmap/std", LOG_STD), "dead": ("bn_heatmap/dead_share", DEAD_SHARE)}


@dataclass(frozen=True)
class Page:
    """One measured step.

    Args:
        step: its number.
        order: layers in the order in which they ran.
        statistics: summary by layer.
        units: last window by activation layer.
        weights: what the step did, by parameter; empty where that is not measured.
        bins: by layer what :func:`~lightning_bn.stats.histogram.bin_counts` gave.
        ranks: effective rank by layer; empty where it is not measured.
        gradients: summary of the gradient with respect to each layer's output; likewise.
    """

    step: int
    order: tuple[str, ...]
    statistics: Mapping[str, Summary]
    units: Mapping[str, Window]
    weights: Mapping[str, Weight]
    bins: Mapping[str, list[int]]
    ranks: Mapping[str, float]
    gradients: Mapping[str, Summary]


class Album:
    """Writes measured steps to the loggers, and draws the whole run at its end.

    Args:
        pictures: whether to draw maps and histograms at all.
    """

    def __init__(self, *, pictures: bool) -> None:
        self._pictures = pictures
        self._flagged: dict[str, None] = {}
        self._history = History()
        self._new = False  # since the maps were drawn
        self._logged_at = -1

    def binned(self, step: int, pace: int) -> Collection[str]:
        """Layers of which the histogram of a step is wanted.

        Args:
            step: its number.
            pace: ``log_every_n_steps`` of the trainer; 0 for never.
        """
        return self._flagged if self._pictures and self._turn(step, pace) else ()

    def flag(self, findings: Iterable[Finding], layers: Collection[str]) -> None:
        """Have histograms of the layers that a warning or an error names, the first few of them."""
        for finding in findings:
            name = finding.layer
            if name in layers and finding.severity is not Severity.INFO and len(self._flagged) < MOST_FLAGGED:
                self._flagged.setdefault(str(name))

    def log(self, loggers: Loggers, page: Page, pace: int) -> None:
        """If it is their turn, write a step's overview and histograms, and keep what the maps need of it."""
        if self._turn(page.step, pace):
            self._log(loggers, page)

    def finish(self, loggers: Loggers, page: Page, *, log: bool) -> None:
        """Write the last measured step layer by layer, and draw the maps.

        Args:
            loggers: where to.
            page: that step.
            log: whether it is to be logged, unless it was.
        """
        if log and self._logged_at < page.step:
            self._log(loggers, page)
        loggers.text("bn_activations", activation_table(page.statistics, page.ranks, page.gradients), page.step)
        if self._new:
            for statistic in self._history.statistics:
                tag, scale = MAPS[statistic]
                loggers.figure(tag, heatmap(self._history.grid(statistic), scale), page.step)
            self._draw_depth(loggers, page)
        self._new = False

    def state_dict(self) -> dict[str, Any]:
        """Plain types and CPU tensors."""
        return {"history": self._history.state_dict(), "flagged": list(self._flagged)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._history.load_state_dict(state["history"])
        self._flagged = dict.fromkeys(state["flagged"])

    def _turn(self, step: int, pace: int) -> bool:
        """Whether a step measured now is to be logged."""
        return pace > 0 and (step + 1) // pace > (self._logged_at + 1) // pace

    def _log(self, loggers: Loggers, page: Page) -> None:
        self._logged_at = page.step
        shown = overview(page.statistics, page.units, page.weights, page.ranks, page.gradients)
        loggers.numbers(shown, page.step)
        if self._pictures and loggers.have_tensorboard:
            self._history.add(page.step, {name: _cells(name, page) for name in page.order})
            self._new = True
            self._write_histograms(loggers, page)

    def _draw_depth(self, loggers: Loggers, page: Page) -> None:
        """The signal over depth in one step, of the layers whose range was measured."""
        rows = [(name, page.statistics[name]) for name in page.order if name in page.statistics]
        shown = [(name, row) for name, row in rows if row.ranged]
        if shown:
            names, stds, largest = zip(*((name, row.std, row.absmax) for name, row in shown), strict=True)
            title = f"Signal over depth, step {page.step}"
            figure = signal_propagation(names, stds, absmax=largest, dtype_max=FLOAT32, title=title)
            loggers.figure("bn_activations/signal_propagation", figure, page.step)

    def _write_histograms(self, loggers: Loggers, page: Page) -> None:
        """Histograms of flagged layers, and beside each the number of values that it cannot show."""
        for name, counts in page.bins.items():
            row = page.statistics[name]
            raw = raw_histogram(counts, low=row.low, high=row.high, mean=row.mean, std=row.std)
            if raw is not None:
                loggers.histogram(f"bn_flagged/{name}", raw, page.step)
            loggers.numbers({f"bn_flagged/{name}/nonfinite": float(sum(counts[BINS:]))}, page.step)


def _cells(name: str, page: Page) -> dict[str, float]:
    """What the maps show of one layer."""
    row, window, cells = page.statistics.get(name), page.units.get(name), {}
    if row is not None and not (row.is_finite and math.isnan(row.std)):  # in that case the spread was not measured
        cells["log_std"] = math.log10(row.std) if row.std > 0 else -math.inf if row.std == 0 else math.nan
    if window is not None and not window.bounded:
        cells["dead"] = window.dead / window.units
    return cells
