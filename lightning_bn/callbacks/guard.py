# SPDX-License-Identifier: Apache-2.0
"""What a guard does with a bad step: agree on it with all ranks, report it, act."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_bn.callbacks.base import Monitor, epoch_of, gather_objects, shielded, step_of
from lightning_bn.callbacks.black_box import pack, write_case
from lightning_bn.callbacks.console import print_above_bar
from lightning_bn.callbacks.eager_pass import hear_apart
from lightning_bn.callbacks.first_look import FirstLook
from lightning_bn.callbacks.inquest import Course, Verdict, inquire, statistics_faults
from lightning_bn.callbacks.rehearsal import rehearse, rehearse_evaluation
from lightning_bn.callbacks.retrace import Case
from lightning_bn.callbacks.snapshot import Snapshot
from lightning_bn.callbacks.watch import LossReader, are_bad, statistics_in
from lightning_bn.findings import Finding, NonFiniteError, Severity
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.sinks import FOLDER, console_text
from lightning_bn.taps import listen

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Action = Literal["raise", "stop", "warn", "skip"]
NOTHING = Verdict([], conclusive=False)
MOST_INQUESTS = 20
"""Replays in one fit: a run that goes on over NaN after NaN is not slowed down for ever."""


@dataclass
class Watch:
    """What a guard knows of a fit in progress.

    Args:
        case: the step in progress; None between steps, and behind the update of the weights.
        bad_case: the step of evaluation that was judged bad, until it is saved.
        snapshot: buffers and random streams before it.
        look: the full look at the first pass, while it lasts.
        drops_update: whether the optimizer step of this window is dropped.
        is_bad: whether the present batch was judged bad.
        spoilt: whether the last one was and its update was not dropped: every later step is bad, as was said when it
            began.
        inquests: how many replays there were.
        skipped: how many steps were dropped in a row.
        pending: what this rank found and the others do not know yet.
        judges_gradients: whether bad gradients are a fault; not while a gradient scaler looks for its scale.
        spared: BatchNorm layers whose statistics were bad before anything ran.
    """

    case: Case | None = None
    bad_case: Case | None = None
    snapshot: Snapshot | None = None
    look: FirstLook | None = None
    loss: LossReader = field(default_factory=LossReader)
    course: Course = field(default_factory=Course)
    awaits_verdict: bool = False
    drops_update: bool = False
    is_bad: bool = False
    spoilt: bool = False
    inquests: int = 0
    skipped: int = 0
    pending: list[Verdict] = field(default_factory=list)
    spared: frozenset[str] = frozenset()
    judges_gradients: bool = True
    statistics: list[Tensor] = field(default_factory=list)


class Guard(Monitor):
    """Reports what is not finite and acts upon it.

    Args:
        action: what to do about a fault.
        max_skips: how many steps in a row may be dropped.
        save_batch: whether the batch that did it is kept.
        ignore: slugs of rules that are not to be reported.
    """

    def __init__(self, action: Action, *, max_skips: int, save_batch: bool, ignore: list[str] | None) -> None:
        super().__init__(ignore=ignore)
        self.action: Action = action
        self.max_skips = max_skips
        self.save_batch = save_batch
        self._watch = Watch()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what belongs to a fit in progress."""
        return {**super().__getstate__(), "_watch": Watch()}

    def _listen_to(self, look: FirstLook) -> None:
        self.live.hooks.close()
        self._watch.look = look
        self.live.hooks.enter_context(listen(look.layers, self._hear, self._expect))

    @shielded
    def _listen_apart(self, trainer: Trainer, pl_module: LightningModule, case: Case, look: FirstLook) -> None:
        """Listen to a pass of its own, which runs compiled modules eagerly and leaves no trace."""
        self._watch.look = look
        listening = listen(look.layers, self._hear, self._expect)
        if case.stage == "training_step":
            run = partial(rehearse, trainer, pl_module, case.batch, case.batch_idx, listening)
        else:
            which = (case.stage, case.batch, case.batch_idx, case.dataloader_idx)
            run = partial(rehearse_evaluation, trainer, pl_module, *which, listening)
        self.emit(hear_apart(run))

    @shielded
    def _expect(self, name: str, module: torch.nn.Module, inputs: Any) -> None:
        if self._watch.look is not None:
            self._watch.look.expect(name, module, inputs)

    @shielded
    def _hear(self, name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if self._watch.look is not None:
            self._watch.look.hear(name, module, inputs, output)

    def _meet(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict | None, *, together: bool) -> None:
        """Deal with a bad step: at once, where all ranks are here or there is one, else when they meet."""
        self._watch.is_bad = True
        if together or trainer.world_size == 1:
            self._settle(trainer, pl_module, verdict or NOTHING, of_step=True)
        elif verdict is not None:
            self._watch.pending.append(verdict)

    def _inquire(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor | None, *, backward: bool
    ) -> Verdict | None:
        watch = self._watch
        if watch.case is None or watch.spoilt or watch.inquests >= MOST_INQUESTS:
            return None
        watch.inquests += 1
        return self._hold_inquest(trainer, pl_module, watch.case, loss, backward)

    @shielded
    def _hold_inquest(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        case: Case,
        loss: Tensor | None,
        backward: bool,  # noqa: FBT001
    ) -> Verdict:
        return inquire(trainer, pl_module, case, self._watch.course, loss=loss, backward=backward)

    def _settle(self, trainer: Trainer, pl_module: LightningModule, verdict: Verdict, *, of_step: bool = False) -> None:
        """Put together what all ranks found, report it and act; a collective."""
        # Outside the shield: a rank whose guard failed still takes part in what all ranks do together.
        capped = self._watch.inquests >= MOST_INQUESTS
        everyone = gather_objects(trainer, ([*self._watch.pending, verdict], capped))
        by_rank, capped = [entries for entries, _ in everyone], any(flag for _, flag in everyone)
        self._watch.pending = []
        conclusive = any(entry.conclusive for entries in by_rank for entry in entries)
        stamp: dict[str, Any] = {"step": step_of(trainer), "epoch": epoch_of(trainer)}
        found: list[Finding] = []
        guilty: set[int] = set()
        for rank, entries in enumerate(by_rank):
            told = [entry for entry in entries if entry.conclusive or not conclusive]
            for finding in (finding for entry in told for finding in entry.findings if finding.rule not in self.ignore):
                data = {**finding.data, "rank": rank} if len(by_rank) > 1 else finding.data
                found.append(replace(finding, **stamp, data=data))
                guilty.update({rank} if finding.severity is Severity.ERROR else ())
        self._tell(found)
        errors = [finding for finding in found if finding.severity is Severity.ERROR]
        if errors and self.save_batch and trainer.global_rank in guilty:
            self._save(trainer, pl_module)
        # A step that is bad on one rank is bad on all: they drop it together, or none does.
        self._watch.is_bad = self._watch.is_bad or (of_step and bool(errors))
        self._act(trainer, errors, capped=capped)

    @shielded
    def _tell(self, found: list[Finding]) -> None:
        for finding in found:
            self.emit(finding)

    def _act(self, trainer: Trainer, errors: list[Finding], *, capped: bool) -> None:
        watch = self._watch
        if errors and self.action == "raise":
            self._undo()
            raise NonFiniteError("\n".join(map(console_text, errors)), errors)
        if errors and self.action == "stop":
            trainer.should_stop = True
            watch.drops_update = True
        if watch.is_bad and self.action == "skip" and (errors or capped):
            watch.drops_update = True
            watch.skipped += 1
            if watch.skipped > self.max_skips:
                self._undo()
                said = "\n".join(map(console_text, errors)) or "see the findings before"
                raise NonFiniteError(f"{watch.skipped} steps in a row were not finite; the last:\n{said}", errors)

    @shielded
    def _undo(self) -> None:
        """Give the buffers the values that they had before the batch."""
        if self._watch.snapshot is not None and self._watch.is_bad:
            self._watch.snapshot.put_back()

    @shielded
    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        case = self._watch.bad_case or self._watch.case
        self._watch.bad_case = None
        if case is None:
            return
        folder = self.live.file.path.rpartition("/")[0]
        stage = "" if case.stage == "training_step" else f"{case.stage.removesuffix('_step')}_"
        path = f"{folder}/batch_{stage}step{step_of(trainer)}_rank{trainer.global_rank}.pt"
        try:
            write_case(path, pack(trainer, pl_module, case, self._watch.course.history(trainer, pl_module)))
        except Exception as error:  # noqa: BLE001  (a batch of another class, a full disk: the report must still come)
            self.emit(not_watched(f"the batch in {FOLDER}/", f"it was not saved: {error}"), any_rank=True)
            return
        again = f"lightning-bn replay {path} --config ..."
        print_above_bar(trainer, f"lightning_bn: the batch that did it is saved; to run it again: {again}")

    def _statistics_are_bad(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge running statistics, and let the ranks meet; a collective where there are several."""
        found = self._look_at_statistics(pl_module) or []
        pending = bool(found or self._watch.pending)
        if trainer.world_size > 1:
            pending = trainer.strategy.reduce_boolean_decision(pending, all=False)
        if pending:
            self._settle(trainer, pl_module, Verdict(found, conclusive=bool(found)))

    @shielded
    def _look_at_statistics(self, pl_module: LightningModule) -> list[Finding]:
        if self._watch.spoilt:
            return []
        tensors = statistics_in(pl_module)
        return statistics_faults(pl_module, self._watch.spared) if tensors and are_bad(tensors) else []
