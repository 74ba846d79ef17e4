# SPDX-License-Identifier: Apache-2.0
"""How far γ and β have moved, and what the validation loss did meanwhile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from lightning_bn.findings import Finding, Severity
from lightning_bn.rules.listing import counted

RULE = "affine-drift"


@dataclass(frozen=True)
class Watched:
    """The watched metric at its best and at its last validation.

    Args:
        name: name of the metric; smaller is better.
        best: smallest value seen.
        best_epoch: epoch of that value, counted from 0.
        last: latest value.
    """

    name: str
    best: float
    best_epoch: int
    last: float


Drift = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Pace:
    """What measured optimizer steps did to γ and β.

    Args:
        speed: for each layer ‖Δγ‖/‖γ‖ and ‖Δβ‖/‖γ‖ of the last measured step; √C stands for ‖γ‖ where γ = 0.
        share: part of the squared norm of all gradients that fell on γ and β in that step; None where not known.
        mean_share: its mean over all measured steps.
        steps: number of these steps.
    """

    speed: Drift
    share: float | None = None
    mean_share: float | None = None
    steps: int = 0

    def words(self) -> str:
        """Both in words."""
        gamma, beta = (f"{100 * value:.2g}%" for value in self._middles())
        moved = f"in the last measured step γ moved by {gamma} of its norm (median), β by {beta}"
        if self.share is None or self.mean_share is None:
            return moved
        return (
            f"{moved}, and {self.share:.1%} of the squared gradient norm fell on γ and β "
            f"(mean of {counted(self.steps, 'measured step')}: {self.mean_share:.1%})"
        )

    def data(self) -> dict[str, Any]:
        """Over the layers the median of ‖Δγ‖/‖γ‖ and of ‖Δβ‖/‖γ‖, and the mean share."""
        return {"affine_speed": self._middles(), "affine_gradient_share": self.mean_share}

    def _middles(self) -> list[float]:
        return [_middle(list(values)) for values in zip(*self.speed.values(), strict=True)]


def affine_drift(
    since_start: Drift, since_best: Drift | None, watched: Watched | None, pace: Pace | None = None
) -> Finding | None:
    """Say how far γ and β moved; movement alone is no fault and no proof.

    Args:
        since_start: for each layer ‖γ − γ₀‖/‖γ₀‖ and ‖β − β₀‖/‖γ₀‖ against the initial values.
        since_best: the same against the values at the best validation; None without a validation.
        watched: the validation metric; None where it was never logged.
        pace: step-to-step speed and gradient share; None where no step was measured.

    Returns:
        An ``info``; None without layers.
    """
    if not since_start:
        return None
    layers = f"{len(since_start)} BatchNorm layer{'s' if len(since_start) > 1 else ''}"
    parts = [f"{layers}; since the start {_words(since_start)}"]
    if since_best is None or watched is None:
        parts.append("whether the validation loss rose meanwhile was not assessed")
    elif watched.last <= watched.best:
        parts.append(f"{watched.name} is at its best ({watched.best:.4g}, epoch {watched.best_epoch})")
    elif not math.isfinite(watched.last):
        parts.append(f"{watched.name} ended as {watched.last}")
    else:
        rise = watched.last - watched.best
        parts.append(
            f"since the best {watched.name} ({watched.best:.4g}, epoch {watched.best_epoch}) {_words(since_best)}, "
            f"while {watched.name} rose by {rise:.3g} ({_percent(rise, watched.best)})"
        )
    if pace is not None:
        parts.append(pace.words())
    evidence = "; ".join(parts) + ". Movement alone is not a fault"
    data = {
        "since_start": _pairs(since_start),
        "since_best": _pairs(since_best),
        "watched": vars(watched) if watched else None,
        "speed": _pairs(pace.speed) if pace else None,
        "gradient_share": {"last": pace.share, "mean": pace.mean_share, "steps": pace.steps} if pace else None,
    }
    return Finding(RULE, Severity.INFO, evidence, "", data=data)


def _words(drift: Drift) -> str:
    gammas, betas = (sorted(values, key=_rank) for values in zip(*drift.values(), strict=True))
    top = max(drift, key=lambda layer: _rank(drift[layer][0]))
    return (
        f"γ moved by {_middle(gammas):.1%} of its norm (median; most {drift[top][0]:.1%} in {top}), "
        f"β by {_middle(betas):.1%} (most {betas[-1]:.1%})"
    )


def _middle(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _percent(rise: float, base: float) -> str:
    return f"{rise / abs(base):+.0%}" if base else "from 0"


def _pairs(drift: Drift | None) -> dict[str, list[float]] | None:
    return None if drift is None else {layer: list(pair) for layer, pair in drift.items()}
