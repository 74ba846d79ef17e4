# SPDX-License-Identifier: Apache-2.0
"""Follow γ and β of every BatchNorm layer, from the start and from the best validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_bn.callbacks.arguments import check_interval
from lightning_bn.callbacks.base import Monitor, epoch_of, is_due, shielded, step_of, window_closes
from lightning_bn.norms import find_batchnorm
from lightning_bn.overview import drift_overview
from lightning_bn.rules.affine_drift import Watched, affine_drift
from lightning_bn.rules.not_watched import not_watched
from lightning_bn.sinks import Loggers
from lightning_bn.stats.batchnorm import Affine, drift

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Pairs = dict[str, tuple[float, float]]


class BatchNormMonitor(Monitor):
    """Follow how far γ and β of the BatchNorm layers move, and say at the end whether validation loss rose meanwhile.

    Logged are ‖γ − γ₀‖/‖γ₀‖ and ‖β − β₀‖/‖γ₀‖ as an overview over the layers (``bn_overview/gamma_drift...``),
    against the values of the first step and against those of the best validation. Where γ₀ = 0, as in layers that
    close a residual block, √C takes the place of ‖γ₀‖. Movement alone is not a fault: the finding at the end of the fit
    is a note and claims no cause. Costs a few operations on C numbers for each layer on due steps.

    Args:
        watch: name under which the project logs its validation loss; smaller is better.
        every_n_steps: log the drift each so many optimizer steps, at least 1; None follows the trainer's
            ``log_every_n_steps``.
        ignore: slugs of findings that are not to be reported, out of affine-drift, not-watched.

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
        ignore: list[str] | None = None,
    ) -> None:
        super().__init__(ignore=ignore)
        if not isinstance(watch, str) or not watch:
            raise ValueError(f"watch must be the name of a logged metric, got {watch!r}")
        self.watch = watch
        self.every_n_steps = check_interval("every_n_steps", every_n_steps, default="the trainer's log_every_n_steps")
        self._forget()

    def _forget(self) -> None:
        self._awaits_start = True
        self._start: dict[str, Affine] = {}
        self._best: dict[str, Affine] = {}
        self._watched: Watched | None = None
        self._logged: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin a new history; a restored checkpoint replaces it; called by Lightning."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._forget()

    @shielded
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the values before the first update; called by Lightning."""
        # Here SyncBatchNorm is in place and checkpoints are restored.
        if self._awaits_start and not any(map(is_lazy, pl_module.parameters())):
            self._begin_from(pl_module)

    @shielded
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep them where lazy layers got their parameters only now; called by Lightning."""
        if self._awaits_start:
            self._begin_from(pl_module)

    @shielded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the drift on due steps; called by Lightning."""
        if is_due(trainer, self.every_n_steps) and window_closes(trainer) and trainer.is_global_zero and self._start:
            since_start, since_best = drift_by_layer(affine_of(pl_module), self._start, self._best)
            values = drift_overview(since_start.values(), since_best.values())
            Loggers(trainer.loggers).numbers(values, step_of(trainer))

    @shielded
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep γ and β of the best validation; called by Lightning."""
        if trainer.sanity_checking or self._live is None:
            return
        self._logged = sorted(trainer.callback_metrics)
        value = trainer.callback_metrics.get(self.watch)
        if value is None:
            return
        last, before = float(value), self._watched
        if before is None or last < before.best or not math.isfinite(before.best):
            self._best = affine_of(pl_module)
            self._watched = Watched(self.watch, last, epoch_of(trainer), last)
        else:
            self._watched = Watched(self.watch, before.best, before.best_epoch, last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how far γ and β moved; called by Lightning."""
        self._conclude(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say it also where the user ends the fit by Ctrl-C; called by Lightning."""
        if isinstance(exception, KeyboardInterrupt) and self._live is not None:
            self._conclude(pl_module)
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """References and history, as plain types and CPU tensors; called by Lightning."""
        return {
            **super().state_dict(),
            "start": _stored(self._start),
            "best": _stored(self._best),
            "watched": asdict(self._watched) if self._watched else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; called by Lightning."""
        super().load_state_dict(state_dict)
        self._start = _loaded(state_dict["start"])
        self._awaits_start = not self._start
        self._best = _loaded(state_dict["best"])
        self._watched = Watched(**state_dict["watched"]) if state_dict["watched"] else None

    def _begin_from(self, pl_module: LightningModule) -> None:
        self._awaits_start = False
        self._start = affine_of(pl_module)

    @shielded
    def _conclude(self, pl_module: LightningModule) -> None:
        if not find_batchnorm(pl_module):
            self.emit(not_watched("BatchNorm", "the model has no BatchNorm layer"))
            return
        if not self._start:
            self.emit(not_watched("the drift of γ and β", "no BatchNorm layer has both, or no batch was trained on"))
            return
        if self._watched is None:
            nearest = get_close_matches(self.watch, self._logged, n=3, cutoff=0.0)
            how = f"set watch to a logged metric, such as {', '.join(nearest)}" if nearest else "log a validation loss"
            self.emit(not_watched("the rise of the validation loss", f"watch={self.watch!r} was never logged", how))
        since_start, since_best = drift_by_layer(affine_of(pl_module), self._start, self._best)
        self.emit(affine_drift(since_start, since_best or None, self._watched), repeat=True)


def affine_of(pl_module: LightningModule) -> dict[str, Affine]:
    """Copies of γ and β of every BatchNorm layer that has both, by layer."""
    return {
        name: Affine.of(layer.weight, layer.bias)
        for name, layer in find_batchnorm(pl_module).items()
        if layer.weight is not None and layer.bias is not None and not is_lazy(layer.weight)
    }


def drift_by_layer(now: Mapping[str, Affine], *references: Mapping[str, Affine]) -> list[Pairs]:
    """Drift of γ and β from each reference, for the layers that it knows; one transfer brings all to the host."""
    pairs = [
        (place, name)
        for place, reference in enumerate(references)
        for name in reference
        if name in now and reference[name].gamma.shape == now[name].gamma.shape
    ]
    found: list[Pairs] = [{} for _ in references]
    if pairs:
        here = [now[name] for _, name in pairs]
        there = [references[place][name].to(now[name].gamma.device) for place, name in pairs]
        for (place, name), (gamma, beta) in zip(pairs, drift(here, there).tolist(), strict=True):
            found[place][name] = (gamma, beta)
    return found


def _stored(values: Mapping[str, Affine]) -> dict[str, list[Tensor]]:
    return {name: [affine.gamma.cpu(), affine.beta.cpu()] for name, affine in values.items()}


def _loaded(values: Mapping[str, Sequence[Tensor]]) -> dict[str, Affine]:
    return {name: Affine(gamma, beta) for name, (gamma, beta) in values.items()}
