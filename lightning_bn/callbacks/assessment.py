# SPDX-License-Identifier: Apache-2.0
"""Measure who carries a rise of the validation loss: kept batches run again under other weights and statistics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lightning_bn.callbacks.base import gather_objects
from lightning_bn.callbacks.joining import joined, parted
from lightning_bn.callbacks.kept import Kept
from lightning_bn.callbacks.material import (
    BEST,
    FIRST,
    LAST,
    NOW,
    Cost,
    Material,
    NotAssessedError,
    Setting,
    TooFewError,
)
from lightning_bn.callbacks.rehearsal import apart
from lightning_bn.callbacks.training_batches import measure_steps, trained_layers
from lightning_bn.callbacks.validation_losses import as_if, validation_losses
from lightning_bn.precise import Estimate, conclude
from lightning_bn.rules.mismatched_statistics import RISE as MATTERS
from lightning_bn.rules.verdict import RISE, SURE
from lightning_bn.stats.attribution import FEWEST, Losses
from lightning_bn.stats.population import Population, pooled

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

LARGE, LARGE_BYTES = 256, 64e6
"""Samples in a batch that statistics are estimated from where batches can be joined, and what its tensors take at most:
what the network makes of them takes a hundred times as much."""
MANY, LEAST = 32, 4
"""Batches that validation batches are cut into, where there are fewer, so that the spread over them is known; and
samples that each part has at least."""
FEWEST_SAMPLES = 100
"""Validation samples below which nothing is said."""
OFF, FAR = 0.05, 0.25
"""Part by which the loss of a validation that is run again may differ from the one that was logged, besides four
standard errors; and the same where its statistics were estimated anew, behind which it is run again with its own."""

T = TypeVar("T")


class Assessment:
    """Runs all settings of one assessment; every process has to take part in each.

    Args:
        trainer: the trainer, between the hooks of a fit.
        pl_module: its model; afterwards it is as before, bit for bit.
        material: what to work with.
        cost: takes what is spent.
        tell: is called with the number of settings that are done, and that there are.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        material: Material,
        cost: Cost,
        tell: Callable[[int, int], None],
    ) -> None:
        self._trainer, self._module, self._cost, self._tell = trainer, pl_module, cost, tell
        self._given = material
        self._layers = trained_layers(pl_module, material.modes)
        self._done, self._total = 0, 2 if material.is_best else 5
        self._training = self._large = material.training
        self._validation = material.validation
        self._complete = self._repeats = False  # on all processes
        self._chosen: list[int] = []
        self._sizes: list[int] = []
        self._of_first = 0  # chosen batches of the first process

    def run(self) -> Losses:
        """Losses in all settings.

        Raises:
            NotAssessedError: where there can be no verdict.
        """
        began, given = time.perf_counter(), self._given
        try:
            losses = self._present(self._stored())
            if not given.is_best:
                losses = self._compare(losses)
        finally:
            self._cost.seconds = time.perf_counter() - began
        if not all(math.isfinite(sum(values)) for values in vars(losses).values() if values is not None):
            raise NotAssessedError(f"{given.watch} is not finite in some setting")
        return losses

    def _stored(self) -> list[float]:
        """The weights of now, with the running statistics as they are.

        As many batches are taken on all processes, as steps may wait for each other; they are cut where they are few.
        """
        given = self._given
        smallest = min((entry.samples for _, entry in given.validation), default=0)
        repeats = given.last_value is not None and math.isfinite(given.last_value)
        mine = (len(given.training), len(given.validation), smallest, given.complete, repeats)
        training, validation, smallest, self._complete, self._repeats = (
            min(values) for values in zip(*gather_objects(self._trainer, mine), strict=True)
        )
        if not training or not validation:
            raise NotAssessedError("no batches were kept")
        self._training, self._validation = given.training[:training], given.validation[:validation]
        parts = min(-(-MANY // (validation * self._trainer.world_size)), smallest // LEAST)
        if parts <= 1:
            return self._repeated()
        whole, total = self._validation, self._total
        try:
            self._everywhere("cutting of validation batches", lambda: self._cut(parts))
            return self._repeated()
        except NotAssessedError as reason:
            self._validation, self._sizes = whole, []  # a loss that is no mean over samples
            self._total = total + self._done
            try:
                return self._repeated()
            except TooFewError:
                raise reason from None

    def _cut(self, parts: int) -> None:
        self._validation = [(loader, part) for loader, entry in self._validation for part in parted(entry, parts)]

    def _repeated(self) -> list[float]:
        """The same, and that a validation that is run again gives what was logged: the last one, or else the best."""
        if not self._repeats or self._given.last_value is None:
            self._check_best()
            return self._validate(NOW)
        stored = self._validate(NOW)
        self._check(stored, self._given.last_value, "last")
        return stored

    def _check_best(self) -> None:
        self._total += 1
        self._check(self._validate(BEST), self._given.best_value, "best")

    def _present(self, stored: list[float]) -> Losses:
        """The weights of now with estimated statistics; where these do better, also with those that training makes."""
        self._everywhere("joining of training batches", self._join)
        if len(set(gather_objects(self._trainer, len(self._large)))) > 1:  # steps may wait for each other
            self._large = self._training
        try:
            statistics = self._estimate(NOW, self._large)
        except NotAssessedError:
            self._large = self._training  # a step that takes no larger batches, or too little memory
            statistics = self._estimate(NOW, self._large)
        found = Losses(self._sizes, stored, self._validate(NOW, statistics))
        if not found.statistics.relative >= MATTERS:
            return found
        self._total += 1
        as_trained = self._estimate(NOW, self._training, dropout=True)
        return replace(found, as_trained=self._validate(NOW, as_trained))

    def _join(self) -> None:
        self._large = joined(self._training, LARGE, LARGE_BYTES) or self._training

    def _compare(self, present: Losses) -> Losses:
        """Besides, the weights of the best validation, and both mixtures where there is a rise to be shared out."""
        best = self._validate(BEST, self._estimate(BEST, self._large))
        if self._repeats and not self._is_near(best, self._given.best_value, FAR):
            self._check_best()  # by its statistics, or as something else decides on the loss
        found = replace(present, best=best)
        if not (found.rise.relative >= RISE and found.rise.z >= SURE):
            self._tell(self._total, self._total)
            return found
        first, last = (self._validate(setting, self._estimate(setting, self._large)) for setting in (FIRST, LAST))
        return replace(found, first=first, last=last)

    def _check(self, losses: Sequence[float], logged: float, when: str) -> None:
        """Whether a validation that is run again gives what was logged: by the first process, or by all together."""
        watch, mean = self._given.watch, float(np.average(losses, weights=self._sizes))
        if not math.isfinite(mean):
            raise NotAssessedError(f"{watch} is not finite in a validation that is run again ({mean})")
        if self._is_near(losses, logged):
            return
        raise NotAssessedError(
            f"{watch} was logged as {logged:.4g} at the {when} validation, and is {mean:.4g} when that is run again "
            "with the same weights: something else decides on it, such as averaged weights"
        )

    def _is_near(self, losses: Sequence[float], logged: float, part: float = OFF) -> bool:
        for count in {len(losses), self._of_first} - {0}:
            x, weights = np.asarray(losses[:count]), self._sizes[:count]
            near = part * abs(logged) + (0 if self._complete else 4 * x.std() / math.sqrt(count))
            if min(abs(np.average(x, weights=weights) - logged), abs(x.mean() - logged)) <= near:
                return True
        return False

    @contextmanager
    def _set(self, setting: Setting) -> Iterator[None]:
        """Let the model be in a setting, in a quarantine."""
        best, module = self._given.best, self._module
        with apart(self._trainer, module), best.in_place(module, affine=setting.affine, others=setting.others):
            if setting.others:
                best.write_buffers(module)
            yield

    def _estimate(self, setting: Setting, batches: Sequence[Kept], *, dropout: bool = False) -> Estimate:
        """Statistics of the weights of a setting, over the batches of all processes."""

        def measure() -> tuple[dict[str, Population], int]:
            with self._set(setting), as_if(self._trainer, "training"):
                given = (self._trainer, self._module, batches, self._given.modes, self._layers)
                sums = measure_steps(*given, dropout=dropout)
            return {name: entry.cpu() for name, entry in sums.items()}, sum(entry.samples for entry in batches)

        self._cost.estimations += 1
        ranks = self._everywhere("training_step", measure)
        parts = {name: [sums[name] for sums, _ in ranks if name in sums] for name in self._layers}
        sums = {name: pooled(entries) for name, entries in parts.items() if entries}
        samples = sum(samples for _, samples in ranks)
        self._cost.samples = self._cost.samples[0], samples
        found = conclude(self._layers, sums, samples)
        if not found.layers:
            reason = next(iter(found.skipped.values()), "none is trained")
            raise NotAssessedError(f"statistics of the BatchNorm layers could not be estimated: {reason}")
        return found

    def _validate(self, setting: Setting, statistics: Estimate | None = None) -> list[float]:
        """Losses of a setting on the validation batches of all processes; None: with its own statistics."""
        several = len({loader for loader, _ in self._given.validation}) > 1

        def losses() -> tuple[list[float], list[int]]:
            with self._set(setting), nullcontext() if statistics is None else statistics.applied(self._module):
                given = (self._trainer, self._module, self._validation, self._given.watch)
                return validation_losses(*given, several=several)

        self._cost.validations += 1
        ranks = self._everywhere("validation_step", losses)
        self._cost.samples = sum(sum(sizes) for _, sizes in ranks), self._cost.samples[1]
        self._done += 1
        self._tell(self._done, self._total)
        return self._watched(ranks)

    def _watched(self, ranks: Sequence[tuple[list[float], list[int]]]) -> list[float]:
        """Leave out the batches that give no loss, as those of another loader; the same ones every time."""
        values = [value for losses, _ in ranks for value in losses]
        if not self._sizes:
            sizes = [size for _, given in ranks for size in given]
            self._chosen = [place for place, value in enumerate(values) if not math.isnan(value)]
            self._sizes = [sizes[place] for place in self._chosen]
            self._of_first = sum(place < len(ranks[0][0]) for place in self._chosen)
            self._refuse()
        return [values[place] for place in self._chosen]

    def _refuse(self) -> None:
        watch = self._given.watch
        if not self._sizes:
            raise NotAssessedError(f"validation_step neither logs {watch!r} nor returns a loss, or it is NaN")
        if len(self._sizes) < FEWEST or sum(self._sizes) < FEWEST_SAMPLES:
            have = f"{sum(self._sizes)} validation samples in {len(self._sizes)} batches"
            raise TooFewError(f"{have} are too few; {FEWEST_SAMPLES} in {FEWEST} are the least")

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
