# SPDX-License-Identifier: Apache-2.0
"""What an assessment of overfitting is made from, what it is called, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from lightning_bn.callbacks.best_weights import Weights
from lightning_bn.callbacks.kept import Kept


class NotAssessedError(Exception):
    """There is no verdict, for the reason that the message gives."""


class TooFewError(NotAssessedError):
    """There are too few validation batches, or samples in them."""


@dataclass(frozen=True)
class Material:
    """What an assessment is made from; the batches differ from process to process, all else does not.

    Args:
        watch: name of the validation loss.
        best_value: that loss, as it was logged at the best validation.
        last_value: as it was logged at the last one; None where weights or statistics have changed since then.
        best: weights of that validation.
        is_best: whether they are those of now.
        validations: how many there were.
        training: kept training batches.
        validation: kept validation batches, each with the number of its loader.
        complete: whether these are all of the validation set of this process.
        modes: each module's mode in training.
    """

    watch: str
    best_value: float
    last_value: float | None
    best: Weights
    is_best: bool
    validations: int
    training: Sequence[Kept]
    validation: Sequence[tuple[int, Kept]]
    complete: bool
    modes: Mapping[nn.Module, bool]


@dataclass
class Cost:
    """What an assessment took.

    Args:
        validations: passes over the kept validation batches.
        estimations: passes over the kept training batches.
        samples: validation samples and training samples in one pass, of all processes.
        seconds: wall-clock time.
    """

    validations: int = 0
    estimations: int = 0
    samples: tuple[int, int] = (0, 0)
    seconds: float = 0.0

    def words(self) -> str:
        """For the console."""
        validation, training = self.samples
        return (
            f"assessed in {self.seconds:.1f} s: {self.validations} passes over {validation} validation samples, "
            f"{self.estimations} over {training} training samples"
        )


class Setting(NamedTuple):
    """Which weights of the best validation are put in place of those of now.

    Args:
        affine: γ and β of BatchNorm layers.
        others: all others, and the buffers.
    """

    affine: bool
    others: bool


NOW, BEST, FIRST, LAST = Setting(False, False), Setting(True, True), Setting(False, True), Setting(True, False)
