# SPDX-License-Identifier: Apache-2.0
"""Run a step of a LightningModule again, as it was, and find the operation that made it bad."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_bn.callbacks.rehearsal import apart, arguments, cannot_repeat, cannot_unwrap, loss_of
from lightning_bn.callbacks.snapshot import Snapshot
from lightning_bn.callbacks.still import Judge, hold_still
from lightning_bn.replay import Replayed, replay

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Stage = Literal["training_step", "validation_step", "test_step"]


@dataclass
class Case:
    """A step in progress.

    Args:
        stage: which step.
        batch: what it got.
        batch_idx: its number in the epoch.
        dataloader_idx: the number of its loader.
        snapshot: the state before it; None for a step that changes none.
    """

    stage: Stage
    batch: Any
    batch_idx: int
    dataloader_idx: int = 0
    snapshot: Snapshot | None = None


def cannot_retrace(trainer: Trainer, pl_module: LightningModule, case: Case) -> str | None:
    """Why a step cannot be run again, in words; None where it can."""
    return cannot_unwrap(trainer) or cannot_repeat(pl_module, case.stage)


def retrace(
    trainer: Trainer,
    pl_module: LightningModule,
    case: Case,
    *,
    backward: bool,
    divisor: float = 1.0,
) -> Replayed:
    """Run a step again in quarantine, from the state and the random streams that it had.

    With manual optimisation the optimizers stand still: what ran before the fault in the same step sees the weights
    as they are now.

    Args:
        trainer: the trainer, between the hooks of a fit, before the weights change.
        pl_module: its model.
        case: the step.
        backward: whether to run the backward pass too. With several processes this is allowed only where no real
            backward pass is due, and on all of them.
        divisor: what the loss is divided by before backward, as by Lightning for gradient accumulation.

    Returns:
        What the replay showed.
    """
    trains = case.stage == "training_step"

    @contextmanager
    def quarantined() -> Iterator[None]:
        precision = trainer.precision_plugin
        context = precision.train_step_context() if trains else precision.val_step_context()
        with apart(trainer, pl_module), nullcontext() if trains else torch.no_grad(), context:
            if case.snapshot is not None:
                case.snapshot.put_back()
                case.snapshot.rewind()
            yield

    def step(batch: Any, judge: Judge) -> None:
        args, kwargs = arguments(getattr(pl_module, case.stage), batch, case.batch_idx, case.dataloader_idx)
        if trains and not pl_module.automatic_optimization:
            hold_still(pl_module, judge)
        if not trains:
            vars(pl_module).update(log=_judging(judge), log_dict=_judging_all(judge))
        loss = loss_of(getattr(pl_module, case.stage)(*args, **kwargs))
        if loss is not None and (not trains or pl_module.automatic_optimization):
            judge(loss / divisor if divisor != 1 else loss)

    run_backward = pl_module.backward if backward and trains else None
    return replay(pl_module, case.batch, step, quarantined, run_backward, alone=trainer.world_size > 1)


def _judging(judge: Judge) -> Callable[..., None]:
    """What ``log`` does in the replay of a validation step, whose losses are seen nowhere else."""

    def log(name: str, value: Any = None, *_: Any, **__: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and "loss" in name:
            judge(value)

    return log


def _judging_all(judge: Judge) -> Callable[..., None]:
    def log_dict(values: Any, *_: Any, **__: Any) -> None:
        for name, value in dict(values).items():
            _judging(judge)(str(name), value)

    return log_dict
