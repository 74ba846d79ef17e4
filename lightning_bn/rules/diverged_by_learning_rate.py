# SPDX-License-Identifier: Apache-2.0
"""Training diverged: weights and loss grew from step to step until the numbers ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_bn.findings import Finding, Severity
from lightning_bn.operations import Fault
from lightning_bn.rules.account import plain

RULE = "diverged-by-learning-rate"
GREW = 100.0
"""By what factor the largest weight must exceed that of the first step; docs/rules has the evidence."""
ROSE, GREW_WITH_LOSS = 2.0, 3.0
"""What is enough where both loss and weights tell: factors of the last finite loss and of the largest weight."""


@dataclass(frozen=True)
class History:
    """What the steps before a fault showed.

    Args:
        step: the step of the fault, counted from 0.
        first: the first loss of the run; None where it is not known.
        losses: the last finite losses, oldest first.
        weight_at_start: largest absolute weight before the first step; None where it is not known.
        weight: largest absolute weight now.
        learning_rates: of all parameter groups, distinct.
    """

    step: int = 0
    first: float | None = None
    losses: Sequence[float] = ()
    weight_at_start: float | None = None
    weight: float | None = None
    learning_rates: Sequence[float] = ()

    @property
    def rose(self) -> bool:
        """Whether the loss had risen well above that of the first step."""
        if not self.step or not self.losses or self.first is None:
            return False
        return self.losses[-1] > self.first + (ROSE - 1) * abs(self.first)

    @property
    def growth(self) -> float:
        """Factor by which the largest weight has grown since the first step; 1 where it is not known."""
        known = self.step and self.weight_at_start and self.weight
        return self.weight / self.weight_at_start if known else 1.0  # type: ignore[operator]

    @property
    def diverged(self) -> bool:
        """Whether the weights had grown out of proportion, or well beyond their start while the loss rose."""
        return self.growth > GREW or (self.rose and self.growth > GREW_WITH_LOSS)

    def describe(self) -> str:
        """The course of loss and weights in words; empty where nothing is known."""
        parts = []
        if self.step and self.first is not None and self.losses:
            course = ", ".join(f"{loss:.3g}" for loss in self.losses[-5:])
            parts.append(f"the loss was {self.first:.3g} in the first step and {course} in the last ones")
        if self.step and self.weight_at_start and self.weight:
            parts.append(f"the largest weight was {self.weight_at_start:.3g} and is {self.weight:.3g}")
        return "; ".join(parts)


def diverged_by_learning_rate(fault: Fault | None, history: History, *, what: str) -> Finding | None:
    """Judge whether an overflow is the end of a divergence.

    Args:
        fault: the operation whose result overflowed; None where it is not known.
        history: loss and weights before.
        what: what is not finite, in words.

    Returns:
        An ``error`` where it is not the first step, and the largest weight had grown a hundredfold, or threefold while
        the loss had risen above twice that of the first step; else None.
    """
    if not history.diverged:
        return None
    rates = ", ".join(f"{rate:g}" for rate in history.learning_rates)
    evidence = f"{what}, first in step {history.step}; {history.describe()}"
    if rates:
        evidence += f"; learning rate {rates}"
    advice = "lower the learning rate (by ten, to begin with), warm it up, or clip the gradient norm"
    data = {
        "first_step": history.step,
        "first_loss": history.first,
        "losses": list(history.losses),
        "weight_at_start": history.weight_at_start,
        "weight": history.weight,
        "learning_rates": list(history.learning_rates),
        **(plain(fault) if fault else {}),
    }
    return Finding(
        RULE, Severity.ERROR, evidence, advice, layer=fault.operation.spot.layer if fault else None, data=data
    )
