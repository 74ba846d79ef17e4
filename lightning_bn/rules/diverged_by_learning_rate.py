# SPDX-License-Identifier: Apache-2.0
"""Training diverged: weights and loss grew from step to step until the numbers ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_bn.findings import Finding, Severity
from lightning_bn.operations import Fault
from lightning_bn.rules.account import place_of, plain

RULE = "diverged-by-learning-rate"
ROSE = 2.0
"""By what the last finite loss must exceed the first one; see docs/rules for the evidence."""
GREW = 30.0
"""By what the largest weight must exceed that of the first step."""


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
        return bool(self.step and self.losses and self.first and abs(self.losses[-1]) > ROSE * abs(self.first))

    @property
    def grew(self) -> bool:
        """Whether the weights had grown out of proportion."""
        known = self.weight_at_start and self.weight
        return bool(self.step and known and self.weight > GREW * self.weight_at_start)  # type: ignore[operator]

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
        An ``error`` where it is not the first step, and either the loss had risen above twice that of the first step
        or the largest weight had grown thirtyfold; else None.
    """
    if not (history.rose or history.grew):
        return None
    rates = ", ".join(f"{rate:g}" for rate in history.learning_rates)
    evidence = f"{what}, first in step {history.step}; {history.describe()}"
    if rates:
        evidence += f"; learning rate {rates}"
    if fault is not None:
        evidence += f"; the numbers ended in {fault.operation.name} {place_of(fault.operation)}"
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
