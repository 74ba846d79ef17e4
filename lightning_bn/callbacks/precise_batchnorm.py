# SPDX-License-Identifier: Apache-2.0
"""Give BatchNorm layers the statistics of the present weights before they are validated and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lightning_bn.callbacks.arguments import check_amount, check_choice, check_count, check_flag
from lightning_bn.callbacks.base import Monitor, callbacks_of, gather_objects, shielded, step_of
from lightning_bn.callbacks.training_batches import (
    GIGABYTE,
    TrainingBatches,
    cannot_reestimate,
    measure_steps,
    trained_layers,
)
from lightning_bn.precise import NOT_FINITE, Estimate, conclude
from lightning_bn.rules.not_re_estimated import fewer_samples, left_as_they_are, not_reestimated, spoilt
from lightning_bn.sinks import Loggers
from lightning_bn.stats.population import Distance, Population, pooled

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

NO_ROOM = "its dtype cannot hold the numbers"
Measured = tuple[dict[str, Population], int]
"""What one process measured, by layer, on the host, and on how many samples."""


class PreciseBatchNorm(Monitor):
    """Estimate the running statistics of BatchNorm anew, with the weights as they are, before they are used.

    The running average of training is made of steps whose weights are gone: with a small momentum or a high learning
    rate it lags behind, and validation, checkpoints and the final model suffer. Here a sample of the epoch's training
    batches, kept in host memory as they passed by, runs through ``training_step`` once more without a trace, each layer
    normalises by its batch, the moments are pooled exactly over batches and processes (Wu & Johnson 2021,
    arXiv 2105.07576), and the result is written to ``running_mean`` and ``running_var``. Nothing else changes: weights,
    optimizer, random streams and batches are those of a run without this callback. How far the average was off is
    logged (``bn_overview/running_mean_error_*``, ``running_var_error_*``) and kept in ``.distances``. Costs
    ``num_samples`` training forward passes each time. List it after a callback that averages weights.

    Args:
        num_samples: estimate from about so many samples of all processes together, at least 1; fewer where an epoch has
            fewer.
        when: ``validation`` before each validation loop, and at the end of the fit; ``end`` at the end alone.
        dropout: False switches all layers but BatchNorm to eval mode meanwhile, which is how the statistics are used:
            those without submodules, and those of torch itself. Dropout that a ``forward`` of your own calls as a
            function stays on. True leaves all modules in the mode they train in.
        max_gigabytes: most memory for the kept batches, in 10⁹ bytes a process, above 0.
        ignore: slugs of findings that are not to be reported, out of not-re-estimated.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        ``Trainer(callbacks=[lightning_bn.PreciseBatchNorm()])``
    """

    def __init__(
        self,
        num_samples: int = 8192,
        *,
        when: Literal["validation", "end"] = "validation",
        dropout: bool = False,
        max_gigabytes: float = 1.0,
        ignore: list[str] | None = None,
    ) -> None:
        super().__init__(ignore=ignore)
        self.num_samples = check_count("num_samples", num_samples)
        self.when = check_choice("when", when, ("validation", "end"))
        self.dropout = check_flag("dropout", dropout)
        self.max_gigabytes = check_amount("max_gigabytes", max_gigabytes)
        self.distances: dict[str, Distance] = {}
        self._let_go()

    def _let_go(self) -> None:
        self._works = False  # agreed on by all processes
        self._told_limit = False
        self._done_at = -1  # the number of optimizer steps at the last estimate
        self._batches: TrainingBatches | None = None
        self._reason = "no training batch was kept since this run began"
        self._modes: dict[nn.Module, bool] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out whether there is something to do, and agree on it with the other ranks; called by Lightning."""
        self._let_go()
        self._prepare(trainer, pl_module)
        # Outside the shield, as every rank has to take part: all estimate, or none.
        nothing = self.off or self._batches is None
        self._works = not trainer.strategy.reduce_boolean_decision(nothing, all=False)

    @shielded
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to keep the batches of another epoch; called by Lightning."""
        if self._batches is not None:
            self._batches.begin_epoch()

    @shielded
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, or not; called by Lightning."""
        if not self._works or self._batches is None:
            return
        try:
            kept = self._batches.offer(batch, batch_idx)
        except TypeError as error:
            self._batches, self._reason = None, str(error)
            self.emit(not_reestimated(self._reason), any_rank=True)
            return
        if kept:
            self._modes = {module: module.training for module in pl_module.modules()}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate anew, when averaged weights have been put in place; called by Lightning."""
        if self.when == "validation" and not trainer.sanity_checking:
            self._reestimate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Estimate anew for the final weights; called by Lightning."""
        self._reestimate(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the model and the batches; called by Lightning."""
        self._let_go()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the model and the batches; called by Lightning."""
        self._let_go()
        super().teardown(trainer, pl_module, stage)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but batches and modules."""
        return {**super().__getstate__(), "_works": False, "_batches": None, "_modes": {}}

    @shielded
    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reason, remedy = cannot_reestimate(trainer, pl_module)
        if reason:
            self.emit(not_reestimated(reason, remedy))
            return
        for name in _averaging_later(trainer, self):
            why = f"{name} puts its averaged weights in place after this callback has run"
            self.emit(not_reestimated(why, f"list PreciseBatchNorm after {name}"))
        share = -(-self.num_samples // trainer.world_size)
        self._batches = TrainingBatches(share, self.max_gigabytes * GIGABYTE, seed=trainer.global_rank)

    def _reestimate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._works:
            return
        # Outside the shield, as all of this is done by every rank. The same number of batches, as layers may wait for
        # each other in the forward pass.
        number = min(gather_objects(trainer, self._number() or 0))
        if number:
            measured = self._measure(trainer, pl_module, number)
            self._conclude(pl_module, gather_objects(trainer, measured))
        else:
            self._say_nothing_kept()

    @shielded
    def _number(self) -> int:
        return len(self._batches.kept) if self._batches is not None else 0

    @shielded
    def _say_nothing_kept(self) -> None:
        self.emit(not_reestimated(self._reason))

    @shielded
    def _measure(self, trainer: Trainer, pl_module: LightningModule, number: int) -> Measured | str:
        reason, _ = cannot_reestimate(trainer, pl_module)
        if reason or self._batches is None:
            return reason
        kept, layers = self._batches.kept[:number], trained_layers(pl_module, self._modes)
        if not layers:
            return "no BatchNorm layer has running statistics that training updates (frozen, or none)"
        try:
            sums = measure_steps(trainer, pl_module, kept, self._modes, layers, dropout=self.dropout)
        except Exception as error:  # noqa: BLE001  (the step's own: it may not be made for a second run)
            return f"the step failed when it was run again: {type(error).__name__}: {error}"
        return {name: entry.cpu() for name, entry in sums.items()}, sum(entry.samples for entry in kept)

    @shielded
    def _conclude(self, pl_module: LightningModule, ranks: Sequence[Measured | str | None]) -> None:
        measured = [entry for entry in ranks if isinstance(entry, tuple)]
        if len(measured) < len(ranks):
            reasons = [entry for entry in ranks if isinstance(entry, str)]
            self.emit(not_reestimated(reasons[0] if reasons else "the monitor failed on another process"))
        else:
            self._write(pl_module, conclude(trained_layers(pl_module, self._modes), *_joined(measured)))

    def _write(self, pl_module: LightningModule, found: Estimate) -> None:
        trainer, batches, distances = self.live.trainer, self._batches, found.distances(pl_module)
        written = found.apply(pl_module)
        unable = {name: NO_ROOM for name in found.layers if name not in written}
        absent = {name: why for name, why in found.skipped.items() if why != NOT_FINITE}
        self.emit(left_as_they_are({**absent, **unable}))
        if spoiled := [name for name, why in found.skipped.items() if why == NOT_FINITE]:
            self.emit(spoilt(spoiled[0], len(spoiled)))
        if batches is not None and batches.is_cut and not self._told_limit:
            self._told_limit = True
            wanted = -(-self.num_samples // trainer.world_size)
            self.emit(fewer_samples(batches.samples, wanted, self.max_gigabytes))
        if distances and trainer.global_step != self._done_at:  # else it has just been measured
            self._done_at, self.distances = trainer.global_step, distances
            if trainer.is_global_zero:
                Loggers(trainer.loggers).numbers(_overview(distances), step_of(trainer))


def _joined(ranks: Sequence[Measured]) -> Measured:
    """What all ranks measured together."""
    names = dict.fromkeys(name for sums, _ in ranks for name in sums)
    parts = {name: [sums[name] for sums, _ in ranks if name in sums] for name in names}
    return {name: pooled(entries) for name, entries in parts.items()}, sum(samples for _, samples in ranks)


def _averaging_later(trainer: Trainer, callback: Monitor) -> Iterator[str]:
    """Callbacks behind this one that put averaged weights in place in the same hooks, by class name."""
    every = callbacks_of(trainer)
    for entry in every[every.index(callback) + 1 :]:
        names = {base.__name__ for base in type(entry).__mro__}
        # StochasticWeightAveraging does it earlier, unless it does not know which epoch is the last.
        endless = trainer.max_epochs == -1
        if "WeightAveraging" in names or ("StochasticWeightAveraging" in names and endless):
            yield type(entry).__name__


def _overview(distances: Mapping[str, Distance]) -> dict[str, float]:
    """Median and largest error over the layers."""
    errors = {
        "running_mean_error": [entry.mean for entry in distances.values()],
        "running_var_error": [entry.log_var for entry in distances.values()],
    }
    middle = {f"bn_overview/{name}_median": median(values) for name, values in errors.items()}
    return middle | {f"bn_overview/{name}_max": max(values) for name, values in errors.items()}
