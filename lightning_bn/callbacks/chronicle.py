# SPDX-License-Identifier: Apache-2.0
"""What TensorBoard shows of BatchNorm over a whole fit: losses, drift of γ and β, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_bn.callbacks.drift import Pairs
from lightning_bn.heatmaps import Scale, heatmap
from lightning_bn.rules.affine_drift import Watched
from lightning_bn.rules.noisy_batch_statistics import NOISY, SEVERE
from lightning_bn.sinks import Loggers
from lightning_bn.stats.attribution import Losses
from lightning_bn.stats.history import History
from lightning_bn.verdict_figures import attribution, effective_samples, loss_curves

MAPS = {
    "gamma": ("bn_heatmap/gamma_drift", Scale("How far does γ move?", "‖γ − γ₀‖ / ‖γ₀‖, log scale", "viridis")),
    "beta": ("bn_heatmap/beta_drift", Scale("How far does β move?", "‖β − β₀‖ / ‖γ₀‖, log scale", "viridis")),
}


class Chronicle:
    """One entry for each validation, in memory that grows by three numbers for each."""

    def __init__(self) -> None:
        self._drift = History()
        self._curve: list[tuple[float, float, float]] = []
        self.verdict = ""
        """What was said about overfitting."""
        self.effective: Mapping[str, float] = {}
        """m_eff by layer."""

    def add(self, step: int, epoch: float, losses: tuple[float, float], since_start: Pairs) -> None:
        """Take in a validation.

        Args:
            step: optimizer steps taken before.
            epoch: its epoch.
            losses: mean training loss in front of it, and validation loss.
            since_start: drift of γ and β from the start, by layer.
        """
        self._curve.append((epoch, *losses))
        rows = {name: {"gamma": _log10(gamma), "beta": _log10(beta)} for name, (gamma, beta) in since_start.items()}
        if rows:
            self._drift.add(step, rows)

    def draw(self, loggers: Loggers, step: int, watched: Watched | None, losses: Losses | None) -> None:
        """Write all pictures to TensorBoard.

        Args:
            loggers: where to.
            step: optimizer steps taken before.
            watched: the watched metric.
            losses: losses in all settings; None where nothing was assessed.
        """
        if not loggers.have_tensorboard:
            return
        for statistic in self._drift.statistics:
            tag, scale = MAPS[statistic]
            loggers.figure(tag, heatmap(self._drift.grid(statistic), scale), step)
        if watched is not None and self._curve:
            epochs, train, valid = zip(*self._curve, strict=True)
            known = [(value, place) for place, value in enumerate(valid) if math.isfinite(value)]
            best = min(known)[1] if known else 0
            figure = loss_curves(epochs, train, valid, best=best, name=watched.name, verdict=self.verdict)
            loggers.figure("bn_verdict/losses", figure, step)
        if watched is not None and losses is not None and losses.shares is not None and losses.rise.after < math.inf:
            loggers.figure("bn_verdict/attribution", _attribution(losses, watched), step)
        if self.effective:
            names, values = zip(*self.effective.items(), strict=True)
            loggers.figure("bn_verdict/noise", effective_samples(names, values, noted=NOISY, severe=SEVERE), step)

    def state_dict(self) -> dict[str, Any]:
        """Plain types and CPU tensors."""
        return {"drift": self._drift.state_dict(), "curve": [list(entry) for entry in self._curve]}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on where :meth:`state_dict` was taken; an older checkpoint has none."""
        if state is not None:
            self._drift.load_state_dict(state["drift"])
            self._curve = [(entry[0], entry[1], entry[2]) for entry in state["curve"]]


def _attribution(losses: Losses, watched: Watched) -> Any:
    rise, (first, last) = losses.rise, losses.shares or (math.nan, math.nan)
    total = rise.after - rise.before
    moved, put_back = rise.before + first * total, rise.after - last * total
    return attribution(rise.before, rise.after, moved, put_back, name=watched.name, best_epoch=watched.best_epoch)


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf if value == 0 else math.nan
