# SPDX-License-Identifier: Apache-2.0
"""What a fit does to γ and β and in the batch statistics, followed from batch to batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.parameter import is_lazy

from lightning_bn.callbacks.arguments import check_interval
from lightning_bn.callbacks.base import Monitor, shielded, step_of
from lightning_bn.callbacks.drift import References
from lightning_bn.callbacks.due import steps_until_due, window_closes
from lightning_bn.callbacks.response import Action, Response
from lightning_bn.callbacks.speed import Speed, overview
from lightning_bn.callbacks.statistics_watch import StatisticsWatch
from lightning_bn.sinks import Loggers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn
    from torch.optim import Optimizer


class AffineWatch(Monitor):
    """Logs drift and speed of γ and β on due steps, and hears the batch statistics of some batches.

    All other batches feel a few flags.

    Args:
        every_n_steps: interval of due steps; None follows the trainer's ``log_every_n_steps``.
        on_overfitting: what is done about overfitting.
        ignore: slugs of findings that are not to be reported.
    """

    def __init__(self, every_n_steps: int | None, on_overfitting: Action, *, ignore: list[str] | None) -> None:
        super().__init__(ignore=ignore)
        self.on_overfitting = on_overfitting
        self.every_n_steps = check_interval("every_n_steps", every_n_steps, default="the trainer's log_every_n_steps")

    def _forget(self) -> None:
        """Begin a new history."""
        self._references, self._speed = References(), Speed()
        self._statistics: StatisticsWatch | None = None
        self._is_due = self._is_heard = False  # this batch
        self._wakes, self._passed = 0.0, 0  # first batch of the epoch that may be either; batches since the last look
        self._response = Response(self.on_overfitting)

    def _begin_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._statistics = StatisticsWatch(pl_module, trainer.world_size, self.live.hooks, self._hear)

    def _end(self) -> None:
        super()._end()
        self._statistics = None
        self._speed.forget_layers()

    @shielded
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the first batch and for the layers anew; called by Lightning."""
        self._wakes = 0.0
        self._speed.forget_layers()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the values before the first update, and listen where the batch is to be heard; called by Lightning."""
        self._passed += 1
        if batch_idx >= self._wakes:
            self._begin_batch(trainer, pl_module, batch_idx)

    @shielded
    def _begin_batch(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        wait = steps_until_due(trainer, self.every_n_steps)  # of which a batch makes one or none
        self._is_due = not wait and trainer.is_global_zero
        # Here SyncBatchNorm is in place and checkpoints are restored.
        if self._references.awaits_start and not any(map(is_lazy, pl_module.parameters())):
            self._references.begin_from(pl_module)
        passed, self._passed = self._passed, 0
        self._is_heard = self._statistics is not None and self._statistics.begin_batch(passed)
        if self._statistics is not None and not (self._is_due or self._is_heard or self._references.awaits_start):
            self._wakes = batch_idx + min(wait or 1, self._statistics.until_heard())

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep γ and β where lazy layers got them only now, and let go of the model; called by Lightning."""
        if self._is_heard or self._references.awaits_start:
            self._end_forward(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at γ, β and gradients on due steps, and hold γ and β where that was asked for; called by Lightning."""
        if self._is_due or self._response.frozen:
            self._begin_step(pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the drift on due steps; called by Lightning."""
        if self._is_due or self._is_heard:
            self._end_batch(trainer, pl_module)

    @shielded
    def _end_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._statistics is not None:
            self._statistics.end_batch(step_of(trainer))
        if self._is_due and self._references.start and window_closes(trainer):
            report = self._speed.after(pl_module, self._references)
            if trainer.loggers:
                Loggers(trainer.loggers).numbers(overview(report), step_of(trainer))

    @shielded
    def _end_forward(self, pl_module: LightningModule) -> None:
        if self._statistics is not None:
            self._statistics.end_forward(pl_module)
        if self._references.awaits_start:
            self._references.begin_from(pl_module)

    @shielded
    def _begin_step(self, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._is_due and self._references.start:
            self._speed.before(pl_module, optimizer)
        self._response.hold(pl_module)

    @shielded
    def _hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._statistics is not None:
            self._statistics.hear(name, module, inputs, output)
