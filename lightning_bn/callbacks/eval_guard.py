# SPDX-License-Identifier: Apache-2.0
"""Watch the losses of validation and test loops."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_bn.callbacks.base import shielded
from lightning_bn.callbacks.eager_pass import goes_apart, has_compiled
from lightning_bn.callbacks.first_look import FirstLook
from lightning_bn.callbacks.guard import NOTHING, Guard
from lightning_bn.callbacks.inquest import Verdict, inquire, merged, placed
from lightning_bn.callbacks.rehearsal import loss_of
from lightning_bn.callbacks.retrace import Case, Stage
from lightning_bn.callbacks.watch import LossReader
from lightning_bn.findings import Severity
from lightning_bn.rules.non_finite_loss import untraced_loss
from lightning_bn.sinks import Loggers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

TAG = "bn_first_validation"


class EvalGuard(Guard):
    """A guard that also watches evaluation: the first batch in full, then what each step returns or logs as a loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forget_evaluation()

    def _forget_evaluation(self) -> None:
        self._eval_case: Case | None = None
        self._sent: tuple[Case, LossReader] | None = None
        self._bad_before: set[str] = set()  # what was logged as bad before the loop began
        self._looked = False
        self._told = False

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what belongs to a fit in progress."""
        return {**super().__getstate__(), "_eval_case": None, "_sent": None}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take note of a batch; called by Lightning."""
        self._begin_evaluation(trainer, pl_module, Case("validation_step", batch, batch_idx, dataloader_idx))

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take note of a batch; called by Lightning."""
        self._begin_evaluation(trainer, pl_module, Case("test_step", batch, batch_idx, dataloader_idx))

    def on_validation_batch_end(  # noqa: PLR0917  (Lightning's signature)
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Judge a batch; called by Lightning."""
        self._end_evaluation(trainer, pl_module, outputs)

    def on_test_batch_end(  # noqa: PLR0917  (the same)
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Judge a batch; called by Lightning."""
        self._end_evaluation(trainer, pl_module, outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last batch and the logged loss, and let the ranks meet; called by Lightning."""
        self._close_evaluation(trainer, pl_module, "validation_step")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last batch and the logged loss, and let the ranks meet; called by Lightning."""
        self._close_evaluation(trainer, pl_module, "test_step")

    @shielded
    def _begin_evaluation(self, trainer: Trainer, pl_module: LightningModule, case: Case) -> None:
        if self._watch.spoilt:
            return
        self._eval_case = case
        if case.batch_idx == 0 and case.dataloader_idx == 0:
            self._told = False
            self._bad_before = _bad_losses(trainer)
        if not self._looked:
            self._looked = True
            self._begin_look(trainer, pl_module, case)

    def _begin_look(self, trainer: Trainer, pl_module: LightningModule, case: Case) -> None:
        apart = goes_apart(trainer, pl_module, case.stage)
        look = FirstLook(pl_module, case.batch, TAG, "First forward pass in validation", eager=apart)
        if apart:
            self._listen_apart(trainer, pl_module, case, look)
            return
        for note in look.unseen() if has_compiled(pl_module) else ():
            self.emit(note)
        self._listen_to(look)

    def _end_evaluation(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        case, look = self._eval_case, self._watch.look
        if look is not None:
            self._conclude_look(trainer, pl_module, outputs)
        elif case is not None:
            self._judge_sent(trainer, pl_module)
            self._send(case, outputs)

    @shielded
    def _send(self, case: Case, outputs: Any) -> None:
        loss = loss_of(outputs)
        if loss is not None and loss.numel():
            reader = LossReader()
            reader.send(loss)
            self._sent = (case, reader)  # read one batch later, when it has long been computed

    @shielded
    def _judge_sent(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sent, self._sent = self._sent, None
        if sent is None or self._told:
            return
        case, reader = sent
        loss = reader.read()
        if not math.isfinite(loss):
            self._told = True
            self._watch.bad_case = case
            verdict = inquire(trainer, pl_module, case, self._watch.course, loss=None, backward=False)
            found = verdict if verdict.conclusive else Verdict([untraced_loss(loss)], conclusive=False)
            self._watch.pending.append(found)

    def _conclude_look(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        verdict = self._judge_look(trainer, pl_module, outputs)
        self._settle(trainer, pl_module, verdict or NOTHING)

    @shielded
    def _judge_look(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> Verdict:
        look, case = self._watch.look, self._eval_case
        self.live.hooks.close()
        self._watch.look = None
        if look is None or case is None:
            return NOTHING
        found = [placed(finding, case) for finding in look.conclude(loss_of(outputs))]
        if any(finding.severity is Severity.ERROR for finding in found):
            self._watch.bad_case = case
            verdict = inquire(trainer, pl_module, case, self._watch.course, loss=None, backward=False)
            found = merged(found, verdict)
        if trainer.is_global_zero:
            look.report(Loggers(trainer.loggers), found, trainer.global_step)
        return Verdict(found, conclusive=bool(found))

    def _close_evaluation(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        self._judge_sent(trainer, pl_module)
        self._judge_logged(trainer, pl_module, stage)
        self._eval_case = None
        if self._live is not None:
            self._statistics_are_bad(trainer, pl_module)

    @shielded
    def _judge_logged(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """The loss of a step that returns none is seen in what it logged, at the end."""
        case = self._eval_case
        names = sorted(_bad_losses(trainer) - self._bad_before)
        if self._told or not names or case is None or case.stage != stage:
            return
        self._told = True
        verdict = inquire(trainer, pl_module, case, self._watch.course, loss=None, backward=False)
        self._watch.bad_case = case if verdict.conclusive else None
        plain = untraced_loss(float(trainer.logged_metrics[names[0]]), name=names[0])
        self._watch.pending.append(verdict if verdict.conclusive else Verdict([plain], conclusive=False))


def _bad_losses(trainer: Trainer) -> set[str]:
    """Names of the logged losses that are not finite; reads the host."""
    return {name for name, value in trainer.logged_metrics.items() if "loss" in name and not math.isfinite(value)}
