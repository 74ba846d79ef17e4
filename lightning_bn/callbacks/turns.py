# SPDX-License-Identifier: Apache-2.0
"""Which steps a monitor measures, and what has to be said of those that it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_bn.callbacks.base import log_interval, step_of
from lightning_bn.callbacks.budget import Budget
from lightning_bn.callbacks.due import is_due
from lightning_bn.findings import Finding
from lightning_bn.rules.interval_widened import interval_widened
from lightning_bn.rules.not_watched import not_watched

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class Turns:
    """The first step of a run is measured, and each whose turn it is; fewer of them where measuring costs too much.

    Args:
        every_n_steps: interval; None follows the trainer's ``log_every_n_steps``.
        limit: largest share of the training time that measuring may take; None for none.
    """

    def __init__(self, every_n_steps: int | None, limit: float | None) -> None:
        self.budget = Budget(limit)
        self.started = False
        """The first step of the run is over."""
        self.was_any = False
        """A step was measured whose turn it was."""
        self._every, self._limit = every_n_steps, limit

    def interval(self, trainer: Trainer) -> int:
        """Steps from one turn to the next; 0 for never."""
        return (self._every or log_interval(trainer)) * self.budget.factor

    def pass_by(self, trainer: Trainer) -> bool:
        """Take note that a step was measured; whether it was its turn."""
        is_turn = is_due(trainer, self.interval(trainer))
        self.started, self.was_any = True, self.was_any or is_turn
        return is_turn

    def is_measured(self, trainer: Trainer) -> bool:
        """Whether the present step is measured."""
        interval = self.interval(trainer)
        return interval > 0 and (not self.started or is_due(trainer, interval))

    def judge(self, trainer: Trainer, spent: float, rest: float) -> Finding | None:
        """Take the seconds of one more measured step, and widen the interval where they are too many.

        Args:
            trainer: the trainer.
            spent: seconds that measuring took on the slowest rank.
            rest: seconds of the same step without it.
        """
        before = self.interval(trainer)
        share = self.budget.judge(spent, rest, before // self.budget.factor)
        if share is None or self._limit is None:
            return None
        return interval_widened(share, self._limit, before, self.interval(trainer))

    def never(self, trainer: Trainer) -> Finding | None:
        """Say it where no step will ever be measured."""
        if self._every is None and log_interval(trainer) < 1:
            return not_watched("any step", "log_every_n_steps is 0", "give ActivationMonitor every_n_steps")
        return None

    def too_few(self, trainer: Trainer) -> Finding | None:
        """At the end of a fit, say it where no step had its turn."""
        every = self.interval(trainer)
        if self.was_any or not every:
            return None
        how = "set every_n_steps, or log_every_n_steps of the trainer, to a smaller number"
        why = f"{step_of(trainer)} steps were taken, and every {every}th is measured"
        return not_watched("any later step", why, how)
