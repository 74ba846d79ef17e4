# SPDX-License-Identifier: Apache-2.0
"""Say before the first step what can be seen wrong in model, loader and optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_bn.callbacks.base import Monitor, gather_objects, shielded
from lightning_bn.callbacks.rows_heard import RowsHeard
from lightning_bn.findings import Finding
from lightning_bn.norms import residual_closing
from lightning_bn.parameter_groups import Group, groups_of, trained
from lightning_bn.precise import length_of
from lightning_bn.preflight import (
    Norm,
    Run,
    loader_facts,
    loaders_in,
    norms_of,
    planned,
    scripted_norms,
    shapes_in,
)
from lightning_bn.rules.affine_outnumbers_samples import affine_outnumbers_samples
from lightning_bn.rules.batchnorm_in_eval_mode import batchnorm_in_eval_mode
from lightning_bn.rules.bias_before_batchnorm import bias_before_batchnorm
from lightning_bn.rules.decayed_gamma import decayed_gamma
from lightning_bn.rules.dropout_before_batchnorm import dropout_before_batchnorm
from lightning_bn.rules.fast_affine import fast_affine
from lightning_bn.rules.few_values_per_channel import few_values_per_channel
from lightning_bn.rules.large_momentum import large_momentum
from lightning_bn.rules.listing import listed
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.rules.one_value_per_channel import one_value_per_channel
from lightning_bn.rules.single_sample_statistics import single_sample_statistics
from lightning_bn.rules.small_momentum import small_momentum
from lightning_bn.rules.unsynchronised_batchnorm import unsynchronised_batchnorm
from lightning_bn.rules.untracked_statistics import untracked_statistics
from lightning_bn.rules.zero_gamma import zero_gamma
from lightning_bn.surroundings import Surroundings, surroundings
from lightning_bn.taps import is_below

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Findings = Iterator[Finding | None]


class PreflightAudit(Monitor):
    """Say before the first step what model, loader and optimizer show to be wrong with BatchNorm.

    Looked at are the BatchNorm layers with what stands in front of them, the length, batch size and ``drop_last`` of
    the training loaders, the parameter groups, and the shapes of the first batch; no loader is iterated and nothing is
    changed. The order of the layers comes from a trace of the model's forward, in which no layer runs. Works once, when
    the first batch is there and training has not begun; costs nothing after. Where small batches are to be told, it
    waits for the first forward pass, which shows whether a sample is one row of the layers' input, and no weight has
    changed yet. A model without BatchNorm is passed over.

    Args:
        ignore: slugs of findings that are not to be reported, out of one-value-per-channel, few-values-per-channel,
            single-sample-statistics, unsynchronised-batchnorm, batchnorm-in-eval-mode, untracked-statistics,
            large-momentum, small-momentum, zero-gamma, fast-affine, decayed-gamma, affine-outnumbers-samples,
            bias-before-batchnorm, dropout-before-batchnorm, not-watched.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        ``Trainer(callbacks=[lightning_bn.PreflightAudit()])``
    """

    def __init__(self, *, ignore: list[str] | None = None) -> None:
        super().__init__(ignore=ignore)
        self._awaits_batch = False
        self._rows: RowsHeard | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for the first batch; called by Lightning."""
        super().setup(trainer, pl_module, stage)
        self._awaits_batch, self._rows = stage == "fit", None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at everything once; called by Lightning."""
        # Not before: here checkpoints are restored, SyncBatchNorm is in place, and the project's own hooks have set the
        # modes of the layers for this epoch.
        if self._awaits_batch:
            self._awaits_batch = False
            # Outside the shield, as every rank takes part, also where this monitor has failed on one.
            self._tell(pl_module, batch, gather_objects(trainer, self._look(trainer, pl_module, batch)))

    @shielded
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Say what had to wait for the first forward pass; called by Lightning."""
        if self._rows is not None:
            self._settle()

    @shielded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say it where no backward pass was run; called by Lightning."""
        if self._rows is not None:
            self._settle()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say it where the forward pass failed, as it was foreseen; called by Lightning."""
        self._settle()
        super().on_exception(trainer, pl_module, exception)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what waits for a forward pass."""
        return {**super().__getstate__(), "_rows": None}

    @shielded
    def _look(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> list[Finding]:
        found = audit(pl_module, trainer.optimizers, run_of(trainer, batch))
        return [finding for finding in found if finding is not None]

    @shielded
    def _tell(self, pl_module: LightningModule, batch: Any, by_rank: Sequence[list[Finding] | None]) -> None:
        """What the first rank sees, and what others see beside: their data may be shorter by a sample."""
        known: list[Finding] = []
        told: list[Finding] = []
        for rank, findings in enumerate(by_rank):
            new = [finding for finding in findings or [] if finding not in known]
            known += new
            told += [replace(each, data={**each.data, "rank": rank}) if rank else each for each in new]
        self._rows = RowsHeard(told, length_of(batch))
        if self._rows.waits:
            self.live.hooks.enter_context(self._rows.listening(pl_module))
        else:
            self._settle()

    @shielded
    def _settle(self) -> None:
        if self._rows is not None:
            self.live.hooks.close()
            for finding in self._rows.settle():
                self.emit(finding)
            self._rows = None


def run_of(trainer: Trainer, batch: Any) -> Run:
    """What the trainer, the attributes of its training loaders and the shapes of the first batch say of the fit."""
    batches = planned(
        trainer.num_training_batches, trainer.max_epochs, trainer.max_steps, trainer.accumulate_grad_batches
    )
    loaders = loaders_in(trainer.train_dataloader)
    return Run(
        tuple(loader_facts(loader, trainer.num_training_batches) for loader in loaders),
        shapes_in(batch),
        _processes(trainer),
        batches,
        batches / trainer.accumulate_grad_batches,
    )


def _processes(trainer: Trainer) -> int:
    """Processes that see different samples: fewer than all where some share the parts of one model."""
    sampling = getattr(trainer, "distributed_sampler_kwargs", None) or {}
    return int(sampling.get("num_replicas", trainer.world_size))


def audit(model: nn.Module, optimizers: Sequence[Optimizer], run: Run) -> Findings:
    """All that can be seen before the first step; silent on a model without BatchNorm.

    Args:
        model: the network.
        optimizers: the optimizers that will train it.
        run: what is known of the fit.
    """
    for name in scripted_norms(model):
        yield not_watched(f"BatchNorm in {name}", "it is a ScriptModule")
    held = trained(model, optimizers)
    norms = norms_of(model, held)
    if not norms:
        return
    around = surroundings(model)
    yield from _of_batches(norms, around, run)
    yield from _of_statistics(norms, run.batches)
    yield from _of_gamma(model, norms, around)
    yield from _of_order(around)
    yield from _of_optimizers(groups_of(model, optimizers), run)
    yield from _out_of_sight(norms, around, sharded=held is None and bool(optimizers))


def _of_batches(norms: Iterable[Norm], around: Surroundings, run: Run) -> Findings:
    flat = set(around.flat())
    judged = [norm for norm in norms if norm.by_batch]
    apart = [norm for norm in judged if not norm.synchronised or run.processes == 1]
    size, lasts = run.batch_size, {loader.last for loader in run.loaders}
    sizes = {size, *(loader.batch_size for loader in run.loaders)}
    sure = [norm.name for norm in apart if norm.name in flat and around.by_sample(norm.name, run.by_row)]
    unsure = [norm.name for norm in apart if norm.name in flat and norm.name not in sure]
    smallest, last = 1 if 1 in sizes else size, 1 if 1 in lasts else None
    yield one_value_per_channel(sure, smallest, last, sure=True)
    yield one_value_per_channel(unsure, smallest, last, sure=False)
    if size is None:
        return
    spatial = [norm.name for norm in apart if norm.name not in flat]
    if size == 1:
        yield single_sample_statistics([name for name in spatial if around.by_sample(name, run.by_row)])
    pooled = [norm.name for norm in judged if norm not in apart and norm.name in flat]
    yield few_values_per_channel([n for n in pooled if around.by_sample(n, run.by_row)], size * run.processes)
    if run.processes == 1:
        yield few_values_per_channel(sure, size)
        return
    yield unsynchronised_batchnorm(sure if size > 1 else [], size, run.processes, flat=True)
    yield unsynchronised_batchnorm(spatial, size, run.processes, flat=False)


def _of_statistics(norms: Iterable[Norm], batches: float) -> Findings:
    still = [norm for norm in norms if norm.stored and not norm.training]
    yield batchnorm_in_eval_mode([norm.name for norm in still if norm.fresh and norm.amid_learning], fresh=True)
    yield batchnorm_in_eval_mode([norm.name for norm in still if norm.fresh is False and norm.learns], fresh=False)
    yield untracked_statistics([norm.name for norm in norms if norm.training and norm.stored and not norm.updates])
    updated = [norm for norm in norms if norm.updates]
    yield large_momentum({norm.name: norm.momentum for norm in updated if norm.momentum is not None})
    fresh = {norm.name: norm.momentum for norm in updated if norm.momentum is not None and norm.fresh}
    yield small_momentum(fresh, batches)


def _of_gamma(model: nn.Module, norms: Iterable[Norm], around: Surroundings) -> Findings:
    zero = [norm for norm in norms if norm.zero_gamma]
    if not zero:
        return
    closers = residual_closing(model)
    open_ended = [norm for norm in zero if norm.name not in closers.closing]
    for sure in (True, False):
        judged = [norm for norm in open_ended if _was_seen(norm.name, around, closers.unseen) is sure]
        yield zero_gamma([norm.name for norm in judged], zero_beta=all(norm.zero_beta for norm in judged), sure=sure)


def _was_seen(layer: str, around: Surroundings, unseen: Iterable[str]) -> bool:
    """Whether the code around a layer was looked into, so that a sum behind it would have been found."""
    return layer in around.ways and not any(is_below(layer, top) for top in unseen)


def _of_order(around: Surroundings) -> Findings:
    yield bias_before_batchnorm(around.biased)
    for layer, (dropout, rate) in around.dropped.items():
        yield dropout_before_batchnorm(layer, dropout, rate)


def _of_optimizers(groups: Sequence[Group], run: Run) -> Findings:
    for kind in dict.fromkeys(group.optimizer for group in groups):
        mine = [group for group in groups if group.optimizer == kind and group.lr is not None]
        affine = max((group.lr or 0 for group in mine if group.affine), default=0)
        weights = max((group.lr or 0 for group in mine if group.weights), default=0)
        yield fast_affine(affine, weights)
    for group in groups:
        if group.lr is not None:
            yield decayed_gamma(
                group.layers, group.law, group.lr, group.decay, momentum=group.momentum, steps=run.steps
            )
    everything = sum(group.affine + group.weights + group.other for group in groups)
    samples = run.loaders[0].dataset if len(run.loaders) == 1 else None
    yield affine_outnumbers_samples(sum(group.affine for group in groups), everything, samples)


def _out_of_sight(norms: Iterable[Norm], around: Surroundings, *, sharded: bool) -> Findings:
    for why in dict.fromkeys(around.unseen.values()):
        names = [name or "the model itself" for name, reason in around.unseen.items() if reason == why]
        yield not_watched(f"what stands in front of BatchNorm in {listed(names)}", why)
    lazy = [norm.name for norm in norms if norm.lazy]
    if lazy:
        yield not_watched(f"γ, β and running statistics of {listed(lazy)}", "lazy, they are made in the first batch")
    if sharded:
        yield not_watched("learning rate and weight decay of γ and β", "the optimizer holds no parameter of the model")
