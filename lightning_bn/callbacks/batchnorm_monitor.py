# SPDX-License-Identifier: Apache-2.0
"""Follow γ and β of every BatchNorm layer, and find out whether the network overfits through them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_bn.callbacks.affine_watch import AffineWatch
from lightning_bn.callbacks.arguments import check_amount, check_count, check_flag, check_name
from lightning_bn.callbacks.base import epoch_of, gather_objects, shielded, step_of
from lightning_bn.callbacks.chronicle import Chronicle
from lightning_bn.callbacks.drift import affine_of, drift_by_layer, of_drift
from lightning_bn.callbacks.evidence import Evidence
from lightning_bn.callbacks.judgement import cannot_assess, conclude, metric_of, with_pace
from lightning_bn.callbacks.response import Action, check_action
from lightning_bn.callbacks.statistics_watch import Shares, of_ranks
from lightning_bn.norms import find_batchnorm
from lightning_bn.rules.affine_drift import RULE as DRIFT
from lightning_bn.rules.not_assessed import not_assessed
from lightning_bn.sinks import Loggers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_bn.findings import Finding
    from lightning_bn.stats.attribution import Losses


class BatchNormMonitor(AffineWatch):
    """Follow γ, β and the batch statistics of BatchNorm, and say at the end whether the network overfits through them.

    Logged are ‖γ − γ₀‖/‖γ₀‖ and ‖β − β₀‖/‖γ₀‖ as an overview over the layers (``bn_overview/gamma_drift...``),
    against the first step, the best validation and the step before (``gamma_speed...``), and the share of γ and β in
    the squared gradient norm. Where γ₀ = 0, √C takes the place of ‖γ₀‖. Movement alone is not a fault.

    When the fit ends, a verdict is looked for: kept validation batches run again through ``validation_step``, without a
    trace, with the weights of the end and of the best validation, with γ and β put back and not, each with running
    statistics that are estimated anew from kept training batches. It says whether the running statistics suit the
    weights, whether the validation loss rose while the training loss fell, and which part of the rise γ and β carry. It
    costs about five passes over the kept validation batches and four over the training ones (forward only). Where it
    cannot be had, a finding says why. The weights of the best validation are kept on the host and in checkpoints.

    Args:
        watch: name under which the project logs its validation loss, per batch, in ``validation_step``; smaller is
            better.
        every_n_steps: log the drift each so many optimizer steps, at least 1; None follows the trainer's
            ``log_every_n_steps``.
        assess: whether to look for the verdict.
        on_overfitting: ``report`` looks when the fit ends and changes nothing. The others look as well where the loss
            is a tenth above its best three validations later: ``stop`` ends the fit if it overfits; ``freeze`` holds γ
            and β from then on if they have a share in it; ``rewind`` puts them back to the best validation first.
        num_samples: keep about so many samples of the training and of the validation set for it, of all processes
            together, at least 1.
        max_gigabytes: most memory for each of both, in 10⁹ bytes a process, above 0.
        ignore: slugs of findings that are not to be reported, out of affine-drift, not-watched, not-assessed,
            wrong-running-statistics, mismatched-statistics, noisy-batch-statistics, collapsed-gamma, no-overfitting,
            affine-driven-overfitting, shared-overfitting, overfitting-elsewhere, statistics-updated-twice,
            statistics-stopped, statistics-differ-between-ranks.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        ``Trainer(callbacks=[lightning_bn.BatchNormMonitor(watch="val_loss")])``
    """

    def __init__(
        self,
        watch: str = "val_loss",
        *,
        every_n_steps: int | None = None,
        assess: bool = True,
        on_overfitting: Action = "report",
        num_samples: int = 4096,
        max_gigabytes: float = 1.0,
        ignore: list[str] | None = None,
    ) -> None:
        super().__init__(every_n_steps, check_action(on_overfitting, assess=assess), ignore=ignore)
        self.watch = check_name("watch", watch, "of a logged metric")
        self.assess = check_flag("assess", assess)
        self.num_samples = check_count("num_samples", num_samples)
        self.max_gigabytes = check_amount("max_gigabytes", max_gigabytes)
        self.losses: Losses | None = None
        self._forget()

    def _forget(self) -> None:
        super()._forget()
        self._logged: list[str] = []
        self._evidence: Evidence | None = None
        self._restored: dict[str, Any] = {}
        self._assesses = self._told = False  # the first is agreed on by all processes
        self._chronicle = Chronicle()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a new history; a restored checkpoint replaces it; called by Lightning."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()

    @shielded
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make ready to collect what a verdict needs; called by Lightning."""
        self._begin_fit(trainer, pl_module)  # not in setup: SyncBatchNorm conversion would replace the layers
        reason, remedy = cannot_assess(trainer, pl_module, self.watch)
        if reason and self.assess and find_batchnorm(pl_module):  # without any, another note says so
            self.emit(not_assessed(reason, remedy))
        if self.assess and not reason:
            samples = -(-self.num_samples // trainer.world_size)
            self._evidence = Evidence(samples, self.max_gigabytes, trainer.global_rank, self._restored)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Agree with the other ranks on whether to assess; called by Lightning."""
        nothing = self.off or self._evidence is None  # outside the shield, as every rank has to take part
        self._assesses = not trainer.strategy.reduce_boolean_decision(nothing, all=False)

    @shielded
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to keep the batches of another epoch; called by Lightning."""
        super().on_train_epoch_start(trainer, pl_module)
        if self._evidence is not None:
            self._evidence.begin_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the values before the first update, and a sample of the batches; called by Lightning."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._evidence is not None:
            self._keep(self._evidence.train_batch, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the drift on due steps; called by Lightning."""
        if self._evidence is not None:
            self._add_loss(outputs)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @shielded
    def _add_loss(self, outputs: Any) -> None:
        if self._evidence is not None:
            self._evidence.train_loss(outputs)

    @shielded
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep a sample of the first validation; called by Lightning."""
        if self._evidence is not None and not trainer.sanity_checking and self._live is not None:
            self._keep(self._evidence.validation_batch, batch, batch_idx, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep γ, β and weights of the best validation; called by Lightning."""
        if trainer.sanity_checking or self._live is None:
            return
        last = None if self.off else metric_of(trainer, self.watch)
        if self._assesses:  # outside the shield: the first rank's number counts, so that all keep the same weights
            last = gather_objects(trainer, last)[0]
        self._compare(trainer, pl_module, last)
        if self._assesses and self._response.is_time(self._references.watched, self._evidence):
            said = self._assess(trainer, pl_module)
            trainer.should_stop = self._response.act(pl_module, said, self._references.best) or trainer.should_stop

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how far γ and β moved, and what that did; called by Lightning."""
        shares = self._conclude(trainer, pl_module)
        self._compare_ranks(gather_objects(trainer, shares))  # gathered outside the shield: every rank takes part
        if self._assesses:
            self._assess(trainer, pl_module)
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how far γ and β moved also where the user ends the fit by Ctrl-C; called by Lightning."""
        if isinstance(exception, KeyboardInterrupt) and self._live is not None:
            self._conclude(trainer, pl_module)
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """References and history, as plain types and CPU tensors; called by Lightning."""
        return {
            **super().state_dict(),
            **self._references.state_dict(),
            "chronicle": self._chronicle.state_dict(),
            "frozen": self._response.frozen,
            "evidence": self._evidence.state_dict() if self._evidence is not None else self._restored,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; called by Lightning."""
        super().load_state_dict(state_dict)
        self._references.load_state_dict(state_dict)
        self._restored = dict(state_dict.get("evidence") or {})
        self._response.frozen = bool(state_dict.get("frozen"))
        self._chronicle.load_state_dict(state_dict.get("chronicle"))

    def __getstate__(self) -> dict[str, Any]:
        """Everything but batches, weights and layers."""
        return {**super().__getstate__(), "_evidence": None, "_statistics": None}

    def _end(self) -> None:
        super()._end()
        if self._evidence is not None:
            self._evidence.drop_batches()

    @shielded
    def _keep(self, offer: Any, *batch: Any) -> None:
        try:
            offer(*batch)
        except TypeError as error:
            self._evidence = None
            self.emit(not_assessed(str(error)), any_rank=True)

    @shielded
    def _compare(self, trainer: Trainer, pl_module: LightningModule, last: float | None) -> None:
        self._logged = sorted(trainer.callback_metrics)
        for finding in self._statistics.stopped() if self._statistics is not None else ():
            self.emit(finding)
        if last is None:
            return
        is_best = self._references.validated(pl_module, self.watch, last, epoch_of(trainer))
        evidence = self._evidence
        train = math.nan if evidence is None else evidence.end_validation(pl_module, is_best=is_best)
        (since_start,) = drift_by_layer(affine_of(pl_module), self._references.start)
        self._chronicle.add(step_of(trainer), epoch_of(trainer), (train, last), since_start)

    @shielded
    def _compare_ranks(self, ranks: list[Shares | None]) -> None:
        self.emit(of_ranks(ranks))

    def _assess(self, trainer: Trainer, pl_module: LightningModule) -> set[str]:
        """Look for the verdict; outside the shield, as every rank takes part in each step of it."""
        try:
            evidence = None if self.off else self._evidence
            found = conclude(trainer, pl_module, evidence, self._references.watched, self._say)
        except Exception as error:  # noqa: BLE001  (ours, and not the user's)
            self.fail("assess", error)
            return set()
        self.losses, self._chronicle.verdict = found.losses, found.words
        return found.rules

    def _say(self, finding: Finding) -> None:
        self.emit(with_pace(finding, self._speed.pace), repeat=True)

    @shielded
    def _draw(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self._chronicle.draw(Loggers(trainer.loggers), step_of(trainer), self._references.watched, self.losses)

    @shielded
    def _conclude(self, trainer: Trainer, pl_module: LightningModule) -> Shares | None:
        if self._told:  # the user ended an assessment by Ctrl-C
            return None
        self._told, metric, pace = True, (self.watch, self._logged), self._speed.pace
        for finding in of_drift(pl_module, self._references, metric, trainer.optimizers, pace):
            self.emit(finding, repeat=finding.rule == DRIFT)
        if self._statistics is None or not self._references.start:
            return None
        self._chronicle.effective, pairs = self._statistics.measure()
        for said in self._statistics.judge(self._chronicle.effective, pairs):
            self.emit(said)
        return self._statistics.shares()
