# SPDX-License-Identifier: Apache-2.0
"""Stop on NaN, and say where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bn.callbacks.arguments import check_choice
from lightning_bn.callbacks.base import Monitor, epoch_of, gather_objects, is_compiled, shielded, step_of, window_closes
from lightning_bn.findings import Finding, NonFiniteError, Severity
from lightning_bn.first_pass import Recorder
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.rules.root_cause import root_cause
from lightning_bn.sinks import Loggers, console_text, markdown_report
from lightning_bn.taps import listen

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Action = Literal["raise", "stop", "warn"]
TAG = "bn_first_pass"


class NaNGuard(Monitor):
    """Check the first training batch in full for NaN and infinity, and name where they came from.

    Looked at are the batch (with the sample), parameters and buffers, the output of every module, the running
    statistics of BatchNorm, and the loss. What came first is reported: a bad sample, a bad weight, or the first
    module that turned finite inputs into non-finite outputs. The verdict falls before backward, so that the weights
    are still those of before. With several processes all agree before any raises or stops.

    Costs a few reductions of every tensor of that pass, once at the start of each fit. Later batches, validation
    and gradients are not watched.

    Args:
        action: what to do about a fault: ``raise`` a NonFiniteError whose message is the report; ``stop`` the
            trainer after this step, without the weight update of it (Lightning goes on until ``min_epochs`` and
            ``min_steps`` are met); ``warn`` and let training go on.
        ignore: slugs of findings that are neither reported nor acted upon, out of non-finite-input,
            non-finite-parameter, non-finite-output, non-finite-loss, poisoned-running-statistics, not-watched.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        ``Trainer(callbacks=[lightning_bn.NaNGuard()])``
    """

    def __init__(self, action: Action = "raise", *, ignore: list[str] | None = None) -> None:
        super().__init__(ignore=ignore)
        check_choice("action", action, get_args(Action))
        self.action: Action = action
        self._forget()

    def _forget(self) -> None:
        self._recorder: Recorder | None = None
        self._awaits_verdict = False
        self._drops_update = False
        self._checked = ""
        self._saw_loss = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make ready for the first batch; called by Lightning."""
        self._forget()
        self._awaits_verdict = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Listen to the first batch; called by Lightning."""
        if self._awaits_verdict:
            self._listen(pl_module, batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Give the verdict before the weights change; called by Lightning."""
        if self._awaits_verdict:
            # With manual optimisation more forward passes, and more losses, may come in this batch.
            self._conclude(trainer, loss, final=pl_module.automatic_optimization)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the update of a step that stops training; called by Lightning."""
        if self._drops_update:
            optimizer.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the verdict on a first step without a backward pass; called by Lightning."""
        self._drops_update = self._drops_update and not window_closes(trainer)
        if self._awaits_verdict:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            self._conclude(trainer, loss if isinstance(loss, Tensor) else None)

    @shielded
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the model where the first batch was broken off; called by Lightning."""
        self.live.hooks.close()
        self._recorder = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Look before leaving: an exception out of the first step may be ours to explain; called by Lightning."""
        if self._recorder is not None and not isinstance(exception, NonFiniteError):
            self._explain()
        self._forget()
        super().on_exception(trainer, pl_module, exception)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the recording of a step in progress."""
        return {**super().__getstate__(), "_recorder": None}

    @shielded
    def _listen(self, pl_module: LightningModule, batch: Any) -> None:
        self.live.hooks.close()
        self._recorder = Recorder(pl_module, batch, compiled=is_compiled(pl_module))
        for name, why in self._recorder.unseen.items():
            how = "to see inside, fit once without torch.compile" if "compile" in why else ""
            self.emit(not_watched(f"the inside of {name or 'the model'}", why, how, layer=name or None))
        self.live.hooks.enter_context(listen(self._recorder.layers, self._hear, self._expect))

    @shielded
    def _expect(self, name: str, module: nn.Module, inputs: Any) -> None:
        if self._recorder is not None:
            self._recorder.expect(name, module, inputs)

    @shielded
    def _hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._recorder is not None:
            self._recorder.hear(name, module, inputs, output)

    @shielded
    def _explain(self) -> None:
        for finding in self._judge(None, failed=True) or ():
            self.emit(finding, any_rank=True)

    def _conclude(self, trainer: Trainer, loss: Tensor | None, *, final: bool = True) -> None:
        self._awaits_verdict = not final
        # Outside the shield: a rank whose guard failed still takes part in what all ranks do together.
        by_rank = gather_objects(trainer, self._judge(loss, final=final) or [])
        stamp: dict[str, Any] = {"step": step_of(trainer), "epoch": epoch_of(trainer)}
        found = [
            replace(finding, **stamp, data={**finding.data, "rank": rank} if len(by_rank) > 1 else finding.data)
            for rank, findings in enumerate(by_rank)
            for finding in findings
        ]
        self._tell(found, final=final)
        errors = [finding for finding in found if finding.severity is Severity.ERROR]
        if errors and self.action == "raise":
            raise NonFiniteError("\n".join(map(console_text, errors)), errors)
        if errors and self.action == "stop":
            trainer.should_stop = True
            self._drops_update = True

    @shielded
    def _judge(self, loss: Tensor | None, *, failed: bool = False, final: bool = True) -> list[Finding]:
        recorder = self._recorder
        if recorder is None:
            return []
        if final:
            self.live.hooks.close()
            self._recorder = None
        self._saw_loss = self._saw_loss or loss is not None
        # At the end of a batch of several losses the last one was judged: what is left are the modules.
        unseen_loss = torch.zeros(()) if self._saw_loss and not failed else None
        seen = recorder.finish(unseen_loss if loss is None else loss, failed=failed)
        self._checked = f"{len(seen.calls)} module calls, {len(seen.weights)} parameters"
        return [finding for finding in root_cause(seen) if finding.rule not in self.ignore]

    @shielded
    def _tell(self, found: list[Finding], *, final: bool) -> None:
        for finding in found:
            self.emit(finding)
        trainer = self.live.trainer
        if trainer.is_global_zero and (final or found):
            checked = f"{self._checked}, the batch, {'and the loss' if self._saw_loss else 'but no loss was seen'}"
            report = markdown_report(found) if found else f"All finite: {checked}."
            Loggers(trainer.loggers).text(TAG, f"First forward pass\n\n{report}", step_of(trainer))
