# SPDX-License-Identifier: Apache-2.0
"""Which optimizer steps are measured, and where one ends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_bn.callbacks.base import log_interval, step_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def is_due(trainer: Trainer, every_n_steps: int | None) -> bool:
    """Whether the present step is logged, on every micro-batch of its accumulation window.

    Args:
        trainer: the trainer, inside a training batch.
        every_n_steps: interval; None follows ``trainer.log_every_n_steps``, where 0 means never.
    """
    return not steps_until_due(trainer, every_n_steps)


def steps_until_due(trainer: Trainer, every_n_steps: int | None) -> float:
    """Steps from the present one to the next that is due; 0 if it is this one, infinite where none is.

    Args:
        trainer: the trainer, inside a training batch.
        every_n_steps: interval; None follows ``trainer.log_every_n_steps``, where 0 means never.
    """
    interval = log_interval(trainer) if every_n_steps is None else every_n_steps
    return -(step_of(trainer) + 1) % interval if interval > 0 else math.inf


def window_closes(trainer: Trainer) -> bool:
    """Whether the optimizer steps on this batch, so that no further micro-batch belongs to the step.

    Private, as Lightning tells nobody else; without it every batch counts as a window.
    """
    if getattr(trainer, "accumulate_grad_batches", 0) == 1:
        return True
    accumulates = getattr(trainer.fit_loop, "_should_accumulate", None)
    return not accumulates() if accumulates else True
