# SPDX-License-Identifier: Apache-2.0
"""Find out what made a step bad: by a replay where there can be one, else by what can be looked at."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_bn.callbacks.base import step_of
from lightning_bn.callbacks.retrace import Case, cannot_retrace, retrace
from lightning_bn.callbacks.watch import are_bad, largest_weight, learning_rates
from lightning_bn.findings import Finding, Severity
from lightning_bn.first_pass import Recorder, running_statistics
from lightning_bn.rules.diverged_by_learning_rate import History
from lightning_bn.rules.invalid_gradient import invalid_gradient
from lightning_bn.rules.non_finite_loss import non_finite_loss
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.rules.root_cause import from_outside, statistics_fault
from lightning_bn.rules.traced_cause import traced_cause
from lightning_bn.stats.finite import NOTHING
from lightning_bn.taps import plain_name

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

LAST = 8


@dataclass
class Course:
    """Loss and weights since the fit began.

    Args:
        first: the first loss; None before it is known.
        losses: the last finite losses, oldest first.
        weight_at_start: largest absolute weight before the first step.
    """

    first: float | None = None
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))
    weight_at_start: float | None = None

    def add(self, loss: float) -> None:
        """Remember a finite loss."""
        self.first = loss if self.first is None else self.first
        self.losses.append(loss)

    def history(self, trainer: Trainer, pl_module: LightningModule) -> History:
        """All that is known up to the present step; reads the weights on the host."""
        now = largest_weight(pl_module)
        losses = tuple(self.losses)
        return History(step_of(trainer), self.first, losses, self.weight_at_start, now, learning_rates(trainer))


@dataclass(frozen=True)
class Verdict:
    """What an inquest found.

    Args:
        findings: the findings.
        conclusive: whether a replay showed the cause; what else can be seen is only said where no rank has a cause.
    """

    findings: list[Finding]
    conclusive: bool


def inquire(
    trainer: Trainer,
    pl_module: LightningModule,
    case: Case,
    course: Course,
    *,
    loss: Tensor | None,
    backward: bool,
) -> Verdict:
    """Find out what made a step bad.

    Args:
        trainer: the trainer, before the weights change.
        pl_module: its model.
        case: the step.
        course: loss and weights before it.
        loss: its loss, where that is what is bad; None where the gradients are.
        backward: whether the replay may run a backward pass.
    """
    reason = cannot_retrace(trainer, pl_module, case)
    if reason is None:
        divisor = float(getattr(trainer, "accumulate_grad_batches", 1)) if pl_module.automatic_optimization else 1.0
        try:
            seen = retrace(trainer, pl_module, case, backward=backward, divisor=divisor)
        except Exception as error:  # noqa: BLE001  (a batch that cannot be copied, a step that waits for other ranks)
            reason = f"its replay failed: {type(error).__name__}: {error}"
        else:
            history = course.history(trainer, pl_module)
            if case.stage != "training_step" and not trainer.sanity_checking:
                history = replace(history, step=max(history.step, 1))  # no weights to start from
            if found := traced_cause(seen, history):
                return Verdict([placed(finding, case) for finding in found], conclusive=True)
            reason = "a replay of the step was finite, so it depends on something that no replay restores"
    note = not_watched(f"the operation that made {'the loss' if loss is not None else 'a gradient'} bad", reason)
    return Verdict([*looked_at(pl_module, case, loss), note], conclusive=False)


def placed(finding: Finding, case: Case) -> Finding:
    """A finding that says in which step of evaluation it was made; one of training has its step anyway."""
    if case.stage == "training_step":
        return finding
    where = f"in {case.stage}, batch {case.batch_idx}"
    where += f" of loader {case.dataloader_idx}" if case.dataloader_idx else ""
    data = {**finding.data, "stage": case.stage, "batch_idx": case.batch_idx, "dataloader_idx": case.dataloader_idx}
    return replace(finding, evidence=f"{where}: {finding.evidence}", data=data)


def merged(seen: list[Finding], verdict: Verdict | None) -> list[Finding]:
    """What a full look at a pass showed, with what its replay showed in the place of its errors, where it did.

    Args:
        seen: findings of the full look.
        verdict: that of the replay; None where there was none.
    """
    if verdict is None:
        return seen
    if not verdict.conclusive:  # why there is no more to say
        return [*seen, *(finding for finding in verdict.findings if finding.severity is Severity.INFO)]
    return [*verdict.findings, *(finding for finding in seen if finding.severity is not Severity.ERROR)]


def looked_at(pl_module: LightningModule, case: Case, loss: Tensor | None) -> list[Finding]:
    """What batch, weights, loss and gradients alone show."""
    recorder = Recorder(pl_module, case.batch)
    seen = recorder.finish(loss)
    outside = [finding for finding in from_outside(seen, spread=True) if finding.severity is Severity.ERROR]
    if outside:
        return outside
    if loss is not None and seen.loss is not None:
        found = non_finite_loss(seen.loss, heard=0, arrived=None, unseen=seen.unseen)
        return [found] if found else []
    named = ((plain_name(name), x.grad) for name, x in pl_module.named_parameters() if x.grad is not None)
    bad = [name for name, grad in named if are_bad([grad])]
    return [invalid_gradient(None, parameter=bad[0], parameters=len(bad), loss=None)] if bad else []


def statistics_faults(pl_module: LightningModule, spared: frozenset[str]) -> list[Finding]:
    """BatchNorm layers whose running statistics became NaN or infinite since the last look.

    Args:
        pl_module: the model.
        spared: layers that are not judged.
    """
    rows = running_statistics(pl_module).items()
    judged = (statistics_fault(name, NOTHING, row, used=True) for name, row in rows if name not in spared)
    return [finding for finding in judged if finding is not None]
