# SPDX-License-Identifier: Apache-2.0
"""Measure who carries a rise of the validation loss: kept batches run again under other weights and statistics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch import nn

from lightning_bn.callbacks.base import gather_objects
from lightning_bn.callbacks.best_weights import Weights
from lightning_bn.callbacks.joining import joined, parted
from lightning_bn.callbacks.rehearsal import apart
from lightning_bn.callbacks.training_batches import Kept, measure_steps, trained_layers
from lightning_bn.callbacks.validation_losses import validation_losses
from lightning_bn.precise import Estimate, conclude
from lightning_bn.rules.verdict import RISE, SURE
from lightning_bn.stats.attribution import FEWEST, Losses
from lightning_bn.stats.population import Population, pooled

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

LARGE = 256
"""Samples in a batch that statistics are estimated from where batches can be joined."""
MANY, LEAST = 32, 4
"""Batches that validation batches are cut into, where there are fewer, so that the spread over them is known; and samples
that each part has at least."""
FEWEST_SAMPLES = 100
"""Validation samples below which nothing is said."""
OFF = 0.05
"""Part by which the loss of a validation that is run again may differ from the one that was logged, besides four
standard errors."""

T = TypeVar("T")


class NotAssessedError(Exception):
    """There is no verdict, for the reason that the message gives."""


@dataclass(frozen=True)
class Material:
    """What an assessment is made from; the batches differ from process to process, all else does not.

    Args:
        watch: name of the validation loss.
        best_value: that loss, as it was logged at the best validation.
        best: weights of that validation; None where the present ones are the best.
        training: kept training batches.
        validation: kept validation batches, each with the number of its loader.
        complete: whether these are all of the validation set.
        modes: each module's mode in training.
    """

    watch: str
    best_value: float
    best: Weights | None
    training: Sequence[Kept]
    validation: Sequence[tuple[int, Kept]]
    complete: bool
    modes: Mapping[nn.Module, bool]


class Assessment:
    """Runs all settings of one assessment; every process has to take part in each.

    Args:
        trainer: the trainer, between the hooks of a fit.
        pl_module: its model; afterwards it is as before, bit for bit.
        material: what to work with.
        tell: is called with the number of settings that are done, and that there are.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, material: Material, tell: Callable[[int, int], None]
    ) -> None:
        self._trainer, self._module, self._tell = trainer, pl_module, tell
        self._given = material
        self._layers = trained_layers(pl_module, material.modes)
        self._done, self._total = 0, 3 if material.best is None else 7
        self._sizes: list[int] = []
        self.seconds = 0.0

    def run(self) -> Losses:
        """Losses in all settings.

        Raises:
            NotAssessedError: where there can be no verdict.
        """
        began, given = time.perf_counter(), self._given
        smallest = min((entry.samples for _, entry in given.validation), default=0)
        numbers = gather_objects(self._trainer, (len(given.training), len(given.validation), smallest))
        few = [min(counts) for counts in zip(*numbers, strict=True)]  # steps may wait for other processes
        self._training, whole = given.training[: few[0]], given.validation[: few[1]]
        if not few[0] or not few[1]:
            raise NotAssessedError("no batches were kept")
        parts = min(-(-MANY // (few[1] * self._trainer.world_size)), few[2] // LEAST)
        self._validation = whole
        if parts > 1:
            self._validation = [(loader, part) for loader, entry in whole for part in parted(entry, parts)]
        try:
            self._check(given.best)
        except NotAssessedError:
            if parts <= 1:
                raise
            self._validation, self._sizes, self._done = whole, [], 0  # a loss that is no mean over samples
            self._check(given.best)
        losses = self._present()
        if given.best is not None:
            losses = self._compare(losses, given.best)
        self.seconds = time.perf_counter() - began
        if not all(math.isfinite(sum(values)) for values in vars(losses).values() if values is not None):
            raise NotAssessedError(f"{given.watch} is not finite in some setting")
        return losses

    def _present(self) -> Losses:
        """The weights of now, with the running statistics as they are and with estimated ones."""
        stored = self._validate(None)
        as_trained = self._validate(self._estimate(self._training, dropout=True))
        now = self._validate(self._estimate(self._large(), dropout=False))
        return Losses(self._sizes, stored, as_trained, now)

    def _compare(self, present: Losses, best: Weights) -> Losses:
        """Besides, the weights of the best validation, and both mixtures where there is a rise to be shared out."""
        large, module = self._large(), self._module
        with best.in_place(module, affine=True, others=True):
            before = self._validate(self._estimate(large, dropout=False, of=best), of=best)
        found = Losses(present.sizes, present.stored, present.as_trained, present.now, before)
        if not (found.rise.relative >= RISE and found.rise.z >= SURE):
            self._tell(self._total, self._total)
            return found
        with best.in_place(module, affine=False, others=True):
            first = self._validate(self._estimate(large, dropout=False, of=best), of=best)
        with best.in_place(module, affine=True, others=False):
            last = self._validate(self._estimate(large, dropout=False))
        return Losses(found.sizes, found.stored, found.as_trained, found.now, before, first, last)

    def _check(self, best: Weights | None) -> None:
        """Whether a validation that is run again gives what was logged."""
        if best is None:
            return
        with best.in_place(self._module, affine=True, others=True):
            again = self._validate(None, of=best)
        sizes, logged = np.asarray(self._sizes, float), self._given.best_value
        losses = np.asarray(again)
        mean = float((losses * sizes).sum() / sizes.sum())
        error = float(losses.std() / math.sqrt(len(losses)))
        if not math.isfinite(mean):
            raise NotAssessedError(f"{self._given.watch} is not finite in a validation that is run again ({mean})")
        if min(abs(mean - logged), abs(float(losses.mean()) - logged)) > OFF * abs(logged) + (
            0 if self._given.complete else 4 * error
        ):
            raise NotAssessedError(
                f"{self._given.watch} was logged as {logged:.4g} at the best validation, and is {mean:.4g} when that "
                "is run again with the same weights: something else decides on it, such as averaged weights"
            )

    def _large(self) -> Sequence[Kept]:
        """Training batches that are joined to large ones, where they can be."""
        return joined(self._training, LARGE) or self._training

    def _estimate(self, batches: Sequence[Kept], *, dropout: bool, of: Weights | None = None) -> Estimate:
        """Statistics of the weights that are in place, over the batches of all processes."""

        def measure() -> tuple[dict[str, Population], int]:
            with apart(self._trainer, self._module):
                if of is not None:
                    of.write_buffers(self._module)
                given = (self._trainer, self._module, batches, self._given.modes, self._layers)
                sums = measure_steps(*given, dropout=dropout)
            return {name: entry.cpu() for name, entry in sums.items()}, sum(entry.samples for entry in batches)

        ranks = self._everywhere("training_step", measure)
        parts = {name: [sums[name] for sums, _ in ranks if name in sums] for name in self._layers}
        sums = {name: pooled(entries) for name, entries in parts.items() if entries}
        found = conclude(self._layers, sums, sum(samples for _, samples in ranks))
        if not found.layers:
            reason = next(iter(found.skipped.values()), "none is trained")
            raise NotAssessedError(f"statistics of the BatchNorm layers could not be estimated: {reason}")
        return found

    def _validate(self, statistics: Estimate | None, of: Weights | None = None) -> list[float]:
        """Losses of the weights that are in place on the validation batches of all processes."""

        def losses() -> tuple[list[float], list[int]]:
            with apart(self._trainer, self._module):
                if of is not None:
                    of.write_buffers(self._module)
                with nullcontext() if statistics is None else statistics.applied(self._module):
                    given = (self._trainer, self._module, self._validation, self._given.watch)
                    return validation_losses(*given), [entry.samples for _, entry in self._validation]

        ranks = self._everywhere("validation_step", losses)
        self._done += 1
        self._tell(self._done, self._total)
        values = [value for values, _ in ranks for value in values]
        sizes = [size for _, sizes in ranks for size in sizes]
        return self._watched(values, sizes)

    def _watched(self, values: Sequence[float], sizes: Sequence[int]) -> list[float]:
        """Leave out the batches that give no loss, as those of another loader; the same ones every time."""
        if not self._sizes:
            self._chosen = [place for place, value in enumerate(values) if not math.isnan(value)]
            self._sizes = [sizes[place] for place in self._chosen]
            self._refuse()
        return [values[place] for place in self._chosen]

    def _refuse(self) -> None:
        watch = self._given.watch
        if not self._sizes:
            raise NotAssessedError(f"validation_step neither logs {watch!r} nor returns a loss, or it is NaN")
        if len(self._sizes) < FEWEST or sum(self._sizes) < FEWEST_SAMPLES:
            have = f"{sum(self._sizes)} validation samples in {len(self._sizes)} batches"
            raise NotAssessedError(f"{have} are too few; {FEWEST_SAMPLES} in {FEWEST} are the least")

    def _everywhere(self, what: str, run: Callable[[], T]) -> list[T]:
        """What all processes find; where one fails all stop."""
        ranks: list[Any] = gather_objects(self._trainer, _attempt(what, run))
        for found in ranks:
            if isinstance(found, str):
                raise NotAssessedError(found)
        return ranks


def _attempt(what: str, run: Callable[[], T]) -> T | str:
    try:
        return run()
    except Exception as error:  # noqa: BLE001  (the step's own: it may not be made for a second run)
        return f"{what} failed when it was run again: {type(error).__name__}: {error}"
