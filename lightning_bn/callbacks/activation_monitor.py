# SPDX-License-Identifier: Apache-2.0
"""Statistics of every layer's output, pooled over accumulation and ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_bn.callbacks.arguments import check_interval, check_strings
from lightning_bn.callbacks.base import Monitor, is_compiled, is_due, log_interval, shielded, step_of, window_closes
from lightning_bn.overview import activation_overview, activation_table
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.rules.unmatched_layers import unmatched_layers
from lightning_bn.sinks import Loggers
from lightning_bn.stats.finite import is_measurable
from lightning_bn.stats.moments import Summary, blank, complete, measure, pool, pool_into, summarize
from lightning_bn.taps import choose, listen, reachable, tensors_in

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class ActivationMonitor(Monitor):
    """Log mean, standard deviation, largest absolute value and share of zeros of every layer's output.

    On due steps the outputs of all chosen layers are measured on their device; one transfer brings the numbers of all
    layers to the host. They are pooled exactly over the micro-batches of an accumulated step and over all processes.
    The loggers get an overview (``bn_overview/...``: median, largest and smallest over the layers), TensorBoard's Text
    tab the last measured step layer by layer (``bn_activations``); ``statistics`` holds the same for your own use. On
    steps that are not due nothing is done at all; validation is not measured.

    Args:
        layers: shell patterns on module names, such as ``encoder.*``, one or a list; a star also crosses dots. A
            module that matches is measured, whether or not it has submodules. None measures every module without
            submodules.
        every_n_steps: measure each so many optimizer steps, at least 1; None follows the trainer's
            ``log_every_n_steps``.
        ignore: slugs of findings that are not to be reported, out of unmatched-layers, not-watched.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        ``Trainer(callbacks=[lightning_bn.ActivationMonitor()])``
    """

    watches = ("layers",)

    def __init__(
        self,
        layers: str | list[str] | None = None,
        *,
        every_n_steps: int | None = None,
        ignore: list[str] | None = None,
    ) -> None:
        super().__init__(ignore=ignore)
        self.layers = check_strings("layers", layers)
        self.every_n_steps = check_interval("every_n_steps", every_n_steps, default="the trainer's log_every_n_steps")
        self._forget()

    def _forget(self) -> None:
        self.statistics: dict[str, Summary] = {}
        self._chosen: dict[str, nn.Module] = {}
        self._rows: dict[str, int] = {}
        self._measured: list[tuple[int, int, Tensor]] = []
        self._state: Tensor | None = None
        self._switched_off = False
        self._heard = False
        self._was_due = False
        self._measured_at = 0

    @shielded
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the layers; called by Lightning."""
        # Not in setup: layers may not exist yet, and SyncBatchNorm conversion would replace them.
        self._forget()
        choice = choose(pl_module, self.layers)
        for glob, nearest in choice.unmatched.items():
            self.emit(unmatched_layers(glob, nearest))
        if is_compiled(pl_module):
            how = "compile a submodule instead, or fit once without torch.compile"
            self.emit(not_watched("the LightningModule", "it is compiled (torch.compile)", how))
        else:
            self._chosen = choice.layers
            for name, why in choice.unseen.items():
                self.emit(not_watched(name or "the model", why, layer=name))
        if self.every_n_steps is None and log_interval(trainer) < 1:
            self.emit(not_watched("any step", "log_every_n_steps is 0", "give ActivationMonitor every_n_steps"))
        self._rows = {name: place for place, name in enumerate(self._chosen)}
        self._state = blank(len(self._chosen), pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree with the other ranks on who measures; called by Lightning."""
        # Outside the shield, as every rank has to take part: all measure, or none.
        self._switched_off = trainer.strategy.reduce_boolean_decision(self.off, all=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen on due steps; called by Lightning."""
        if is_due(trainer, self.every_n_steps):
            self._listen(pl_module)

    @shielded
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let go of the model when the forward pass is over; called by Lightning."""
        if pl_module.automatic_optimization:
            self._stop_listening()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Pool and log what was heard; called by Lightning."""
        if not is_due(trainer, self.every_n_steps) or self._switched_off:
            return
        self._stop_listening()
        self._pool()
        if window_closes(trainer) and self._state is not None and len(self._state):
            ranks = self._gather(trainer, self._state)
            self._state = blank(len(self._state), self._state.device)
            self._switched_off = bool(ranks[:, -1].any())
            self._publish(ranks[:, :-1])

    @shielded
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the model where a batch was broken off; called by Lightning."""
        self._stop_listening()

    @shielded
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last measured step layer by layer; called by Lightning."""
        if self._chosen and not self._was_due and (self.every_n_steps or log_interval(trainer)):
            taken = step_of(trainer)
            every = self.every_n_steps or log_interval(trainer)
            how = "set every_n_steps, or log_every_n_steps of the trainer, to a smaller number"
            self.emit(not_watched("any step", f"{taken} steps were taken, and every {every}th is measured", how))
        if self.statistics and trainer.is_global_zero:
            Loggers(trainer.loggers).text("bn_activations", activation_table(self.statistics), self._measured_at)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the model's layers."""
        return {**super().__getstate__(), "_chosen": {}, "_rows": {}, "_measured": [], "_state": None}

    @shielded
    def _listen(self, pl_module: LightningModule) -> None:
        self.live.hooks.close()
        self._measured, self._was_due = [], True
        within_reach, _ = reachable(pl_module)  # modules may have gone into eval mode meanwhile
        chosen = {name: module for name, module in self._chosen.items() if name in within_reach}
        self.live.hooks.enter_context(listen(chosen, self._hear))

    @shielded
    def _stop_listening(self) -> None:
        self.live.hooks.close()

    @shielded
    def _hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._heard = True
        for _, x in tensors_in(output):
            if is_measurable(x) and x.dim() and not x.is_complex():
                with torch.autocast(x.device.type, enabled=False):
                    self._measured.append((self._rows[name], x.numel(), measure(x)))

    @shielded
    def _pool(self) -> None:
        state, measured, self._measured = self._state, self._measured, []
        if state is None or not measured:
            return
        places, counts, rows = zip(*measured, strict=True)
        wide = torch.stack([row.to(state.device, state.dtype, non_blocking=True) for row in rows])
        pool_into(state, places, complete(wide, torch.tensor(counts, device=state.device)))

    def _gather(self, trainer: Trainer, state: Tensor) -> Tensor:
        """State of all ranks, ``(ranks, layers + 1, 5)``; the last row says who is off. A collective."""
        signal = torch.full_like(state[:1], float(self.off))
        message = torch.cat([state, signal])
        gathered = trainer.strategy.all_gather(message) if trainer.world_size > 1 else message
        return gathered.reshape(-1, *message.shape).cpu()

    @shielded
    def _publish(self, ranks: Tensor) -> None:
        if self._switched_off:
            self.emit(not_watched("any further step", "the monitor failed on another process"))
            return
        pooled = ranks[0]
        for other in ranks[1:]:
            pooled = pool(pooled, other)
        rows = {name: summarize(pooled[place]) for name, place in self._rows.items()}
        self._measured_at = step_of(self.live.trainer)
        self.statistics = {name: row for name, row in rows.items() if row.count}
        if not self._heard:
            how = "call modules, not their forward methods"
            self.emit(not_watched(", ".join(rows), "no forward pass was heard in a whole step", how))
        if self.statistics and self.live.trainer.is_global_zero:
            Loggers(self.live.trainer.loggers).numbers(activation_overview(self.statistics), self._measured_at)
