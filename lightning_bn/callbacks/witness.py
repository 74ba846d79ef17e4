# SPDX-License-Identifier: Apache-2.0
"""Sees whether the callbacks that configs name have reached the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_bn.callbacks.base import Monitor, callbacks_of, shielded
from lightning_bn.promises import Promise
from lightning_bn.rules.lost_callbacks import lost_callbacks, replaced_callbacks

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Witness(Monitor):
    """Compares what configs name with what the trainer has; attached by itself where a config names a callback of ours.

    Args:
        promises: what configs and command line name.
        ignore: slugs of findings that are not to be reported.
    """

    stages = frozenset({"fit", "validate", "test"})

    def __init__(self, promises: Sequence[Promise] = (), *, ignore: list[str] | None = None) -> None:
        super().__init__(ignore=ignore)
        self.promises = tuple(promises)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare, once; called by Lightning."""
        super().setup(trainer, pl_module, stage)
        if stage in self.stages:  # predictions, which nothing of ours watches, lose nothing
            self._compare(trainer)
            self.promises = ()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a checkpoint does not change by what was looked at; called by Lightning."""
        return {}

    @shielded
    def _compare(self, trainer: Trainer) -> None:
        there = {base.__name__ for entry in callbacks_of(trainer) for base in type(entry).__mro__}
        for promise in self.promises:
            lost = [name for name in dict.fromkeys(promise.callbacks) if name not in there]
            if lost:
                self.emit(lost_callbacks(promise.source, lost))
            elif promise.replaces:
                self.emit(replaced_callbacks(promise.source, promise.replaces))
