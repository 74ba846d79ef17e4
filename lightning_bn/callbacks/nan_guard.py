# SPDX-License-Identifier: Apache-2.0
"""Stop on NaN, and say where it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_bn.callbacks.arguments import check_choice, check_count, check_flag, check_interval
from lightning_bn.callbacks.base import shielded, step_of
from lightning_bn.callbacks.due import is_due, window_closes
from lightning_bn.callbacks.eager_pass import goes_apart
from lightning_bn.callbacks.eval_guard import EvalGuard
from lightning_bn.callbacks.first_look import FirstLook
from lightning_bn.callbacks.guard import NOTHING, Action, Watch
from lightning_bn.callbacks.inquest import Verdict, inquire, merged
from lightning_bn.callbacks.retrace import Case, cannot_retrace
from lightning_bn.callbacks.snapshot import Snapshot
from lightning_bn.callbacks.watch import are_bad, gradients_in, gradients_of, has_scaler, scale_is_spent, unscaled
from lightning_bn.findings import Finding, NonFiniteError, Severity
from lightning_bn.first_pass import running_statistics
from lightning_bn.quarantine import lazy_tensors
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.sinks import Loggers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

TAG = "bn_first_pass"


class NaNGuard(EvalGuard):
    """Watch for NaN and infinity from the first forward pass to the last, and name what made them.

    The first batch is looked at in full: the batch (with the sample), parameters and buffers, what every module gets
    and puts out, running statistics of BatchNorm, the loss. From then on the loss of every step, the gradients before
    every optimizer step, the running statistics every ``every_n_steps`` steps, and the losses of validation and test.
    On a fault, while the weights are those before the update, the step is run again in quarantine under a watch on
    every operation: the report names module, operation, source line, the ranges of the inputs and what is to blame.
    With several processes all agree before any raises or stops.

    Costs two numbers on the host and a copy of the running statistics each step.

    Args:
        action: what to do about a fault: ``raise`` a NonFiniteError whose message is the report; ``stop`` the
            trainer after this step, without the weight update of it (Lightning goes on until ``min_epochs`` and
            ``min_steps`` are met); ``warn`` and let training go on; ``skip`` the step, so that weights, optimizer
            state and running statistics are as if the batch had not been seen.
        max_skips: how many steps in a row ``skip`` may drop; the next one raises.
        every_n_steps: how often the running statistics are looked at; None follows the trainer's
            ``log_every_n_steps``.
        save_batch: whether the batch that did it, random streams and the state before the step are saved beside the
            findings (``batch_step*.pt``), for ``lightning-bn replay``.
        ignore: slugs of findings that are neither reported nor acted upon, such as non-finite-input, non-finite-target,
            non-finite-parameter, non-finite-output, non-finite-loss, invalid-operation, invalid-gradient,
            overflow-by-range, overflow-by-initialisation, little-headroom, diverged-by-learning-rate,
            poisoned-running-statistics, overflowed-running-statistics, not-watched.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        ``Trainer(callbacks=[lightning_bn.NaNGuard()])``
    """

    stages: ClassVar[frozenset[str]] = frozenset({"fit", "validate", "test"})

    def __init__(
        self,
        action: Action = "raise",
        *,
        max_skips: int = 10,
        every_n_steps: int | None = None,
        save_batch: bool = False,
        ignore: list[str] | None = None,
    ) -> None:
        check_choice("action", action, get_args(Action))
        check_count("max_skips", max_skips)
        check_flag("save_batch", save_batch)
        super().__init__(action, max_skips=max_skips, save_batch=save_batch, ignore=ignore)
        self.every_n_steps = check_interval("every_n_steps", every_n_steps, default="the trainer's log_every_n_steps")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make ready; called by Lightning."""
        super().setup(trainer, pl_module, stage)
        self._watch = Watch()
        self._forget_evaluation()

    @shielded
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make ready for the first batch; called by Lightning."""
        judges = not has_scaler(trainer)
        self._watch = Watch(snapshot=Snapshot(pl_module), awaits_verdict=True, judges_gradients=judges)
        case = Case("training_step", None, 0)
        why = None if lazy_tensors(pl_module) else cannot_retrace(trainer, pl_module, case)
        if why is not None:
            self.emit(not_watched("the operation that makes a step bad", why))
        bad = (name for name, row in running_statistics(pl_module).items() if not row.is_finite)
        self._watch.spared = frozenset(bad)

    @shielded
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the state before the step, and listen to the first one; called by Lightning."""
        watch = self._watch
        if watch.snapshot is None:
            return
        watch.is_bad = False
        watch.case = Case("training_step", batch, batch_idx, snapshot=watch.snapshot)
        watch.snapshot.take()
        if watch.awaits_verdict:
            apart = goes_apart(trainer, pl_module)
            look = FirstLook(pl_module, batch, TAG, "First forward pass", eager=apart)
            for note in look.unseen():
                self.emit(note)
            if apart:
                self._listen_apart(trainer, pl_module, watch.case, look)
            else:
                self._listen_to(look)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Judge the loss, before the weights change; called by Lightning."""
        if self._watch.awaits_verdict:
            # With manual optimisation more forward passes, and more losses, may come in this batch.
            self._conclude(trainer, pl_module, loss, final=pl_module.automatic_optimization)
            return
        value = self._see_loss(trainer, pl_module, loss)
        if value is not None and not math.isfinite(value):
            self._judge_loss(trainer, pl_module, loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the loss where it had to be waited for, and judge what accumulates; called by Lightning."""
        if self._watch.loss.is_under_way:
            value = self._read_loss(trainer, pl_module)
            if value is not None and not math.isfinite(value):
                self._judge_loss(trainer, pl_module, torch.tensor(value))
        if not window_closes(trainer) and trainer.world_size == 1 and not self._watch.is_bad:
            self._judge_gradients(trainer, pl_module, gradients_in(pl_module))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the gradients, and drop the update of a step that is to be dropped; called by Lightning."""
        if not self._watch.drops_update:
            self._judge_gradients(trainer, pl_module, gradients_of(optimizer))
        if self._watch.drops_update:
            optimizer.zero_grad(set_to_none=True)  # an optimizer passes over parameters without a gradient
            self._undo()
        elif pl_module.automatic_optimization:
            self._watch.case = None  # from here on the weights change

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge a first step without a backward pass, and running statistics when due; called by Lightning."""
        watch = self._watch
        if watch.awaits_verdict:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            self._conclude(trainer, pl_module, loss if isinstance(loss, Tensor) else None)
        if watch.drops_update:
            self._undo()
        watch.spoilt = watch.is_bad and not watch.drops_update
        closes = window_closes(trainer)
        watch.drops_update = watch.drops_update and not closes
        watch.skipped = watch.skipped if watch.is_bad or not closes else 0
        watch.case = None
        if closes and is_due(trainer, self.every_n_steps):
            self._statistics_are_bad(trainer, pl_module)
            self._look_closer(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the running statistics that validation is about to use; called by Lightning."""
        if self._watch.snapshot is not None and not trainer.sanity_checking:
            self._statistics_are_bad(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the ranks meet, and let go of the model where a batch was broken off; called by Lightning."""
        self._watch.look = None
        self._let_go()
        self._statistics_are_bad(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Look before leaving: an exception out of a step may be ours to explain; called by Lightning."""
        memory = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
        if isinstance(exception, Exception) and not isinstance(exception, NonFiniteError | memory) and self._live:
            self._explain(trainer, pl_module)
        self._watch = Watch()
        self._forget_evaluation()
        super().on_exception(trainer, pl_module, exception)

    @shielded
    def _let_go(self) -> None:
        self.live.hooks.close()

    @shielded
    def _look_closer(self, trainer: Trainer) -> None:
        self._watch.judges_gradients = not has_scaler(trainer) or scale_is_spent(trainer)
        if self._watch.snapshot is not None:
            self._watch.snapshot.look_closer()

    @shielded
    def _explain(self, trainer: Trainer, pl_module: LightningModule) -> None:
        watch = self._watch
        case, found = watch.case or self._eval_case, list[Finding]()
        for verdict in watch.pending:
            found.extend(verdict.findings)
        if case is not None and not watch.is_bad:
            backward = trainer.world_size == 1
            verdict = inquire(trainer, pl_module, case, watch.course, loss=None, backward=backward)
            found.extend(verdict.findings if verdict.conclusive else ())
            if not verdict.conclusive and watch.look is not None:
                found.extend(watch.look.conclude(None, failed=True))
        for finding in found:
            self.emit(finding, any_rank=True)

    @shielded
    def _see_loss(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> float | None:
        """The loss, where it can be read without waiting; else it is sent off."""
        snapshot = self._watch.snapshot
        if snapshot is not None and snapshot.looks_closer:
            snapshot.notice()
        value = unscaled(trainer, loss) if has_scaler(trainer) else loss.detach()
        self._watch.loss.send(value)
        return self._read_loss(trainer, pl_module) if loss.device.type == "cpu" else None

    @shielded
    def _read_loss(self, trainer: Trainer, pl_module: LightningModule) -> float:
        value = self._watch.loss.read()
        if math.isfinite(value):
            whole = getattr(trainer, "accumulate_grad_batches", 1) if pl_module.automatic_optimization else 1
            self._watch.course.add(value * whole)
        return value

    def _judge_loss(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        verdict = self._inquire(trainer, pl_module, loss, backward=False)
        self._meet(trainer, pl_module, verdict, together=False)

    def _judge_gradients(self, trainer: Trainer, pl_module: LightningModule, gradients: list[Tensor]) -> None:
        """Where ranks share their gradients all see the same; else they ask each other."""
        bad = self._watch.judges_gradients and self._are_bad(gradients)
        together = trainer.world_size > 1 and window_closes(trainer)
        if together and not _shares_gradients(trainer):
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if not bad:
            return
        verdict = None if self._watch.is_bad else self._inquire(trainer, pl_module, None, backward=True)
        if together or not self._watch.is_bad:
            self._meet(trainer, pl_module, verdict, together=together)

    def _are_bad(self, gradients: list[Tensor]) -> bool:
        # Not shielded: a rank whose guard is off still has to come to where the others meet.
        try:
            return are_bad(gradients)
        except Exception as error:  # noqa: BLE001  (gradients of a kind that cannot be judged)
            self.fail("on_before_optimizer_step", error)
            return False

    def _conclude(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor | None, *, final: bool = True
    ) -> None:
        self._watch.awaits_verdict = not final
        verdict = self._judge_first(trainer, pl_module, loss, final=final)
        self._settle(trainer, pl_module, verdict or NOTHING, of_step=True)

    @shielded
    def _judge_first(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor | None, *, final: bool
    ) -> Verdict:
        watch, look = self._watch, self._watch.look
        if look is None:
            return NOTHING
        if final:
            self.live.hooks.close()
            watch.look = None
        plain = None if loss is None else unscaled(trainer, loss)
        found = [finding for finding in look.conclude(plain) if finding.rule not in self.ignore]
        self._begin_course(trainer, pl_module, look, plain)
        if any(finding.severity is Severity.ERROR for finding in found):
            watch.is_bad = True
            if loss is not None and not bool(torch.isfinite(loss).all()):
                verdict = self._inquire(trainer, pl_module, plain, backward=False)
                found = merged(found, verdict)
        if trainer.is_global_zero and (final or found):
            look.report(Loggers(trainer.loggers), found, step_of(trainer))
        return Verdict(found, conclusive=bool(found))

    def _begin_course(self, trainer: Trainer, pl_module: LightningModule, look: FirstLook, loss: Tensor | None) -> None:
        if self._watch.snapshot is not None:
            self._watch.snapshot.notice()
        self._watch.course.weight_at_start = look.largest_weight
        if loss is not None and loss.numel() == 1 and math.isfinite(float(loss)):
            whole = getattr(trainer, "accumulate_grad_batches", 1) if pl_module.automatic_optimization else 1
            self._watch.course.add(float(loss) * whole)


def _shares_gradients(trainer: Trainer) -> bool:
    """Whether every rank has the same gradients when the optimizer steps, as under DDP."""
    return any(base.__name__ == "DDPStrategy" for base in type(trainer.strategy).__mro__)
