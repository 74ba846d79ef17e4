# SPDX-License-Identifier: Apache-2.0
"""What BatchNorm layers do with their batches, heard in a few of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_bn.callbacks.base import is_compiled
from lightning_bn.callbacks.between_ranks import BetweenRanks, Share, compare
from lightning_bn.callbacks.noise import EVERY, Noise, effective, of_noise
from lightning_bn.callbacks.standstill import Standstill
from lightning_bn.findings import Finding
from lightning_bn.rules.statistics_differ_between_ranks import statistics_differ_between_ranks
from lightning_bn.rules.statistics_stopped import statistics_stopped
from lightning_bn.taps import Hear, listen

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

Shares = Mapping[str, Share]
EARLY, SELDOM = 320, 50
"""Batches behind which fewer are heard, and one or two of so many."""


class StatisticsWatch:
    """Noise of the batch statistics, layers that stop updating theirs, and what differs between processes.

    Heard are two batches in a row of every ten, and behind the first 320 two of fifty, until there are enough pairs;
    from then on one of fifty. The very first are not heard: what compiles in them would compile the hooks too. Of
    compiled layers the noise alone is known, and what differs between processes.

    Args:
        model: the network.
        processes: number of processes.
        hooks: takes what has to be undone while a batch is heard.
        hear: is called for each output in a batch that is heard, and is to call :meth:`hear`; None for that itself.
    """

    def __init__(
        self, model: LightningModule, processes: int = 1, hooks: ExitStack | None = None, hear: Hear | None = None
    ) -> None:
        self._hooks, self._hear = hooks or ExitStack(), hear or self.hear
        self.noise = Noise(model, compiled=is_compiled(model))
        self._layers = self.noise.layers
        self._still = Standstill(model, self._layers)
        self._ranks = BetweenRanks() if processes > 1 else None
        self._batch = 0
        self._hears = bool(self._layers or self.noise.hidden.layers)
        self._is_heard = self._pairs = False  # whether this batch is, and whether it is one of a pair

    def begin_batch(self, passed: int = 1) -> bool:
        """Another batch begins; says whether it is heard.

        Args:
            passed: batches since this was asked last, with this one; see :meth:`until_heard`.
        """
        if not self._batch:
            self._still.begin()
        self._batch += passed
        place = (self._batch + 1) % self._period
        self._is_heard = self._pairs = False
        if place < 2 and self._hears:  # noqa: PLR2004  (a pair)
            self._pairs = self.noise.begin(second=place == 1)
            self._is_heard = self._pairs or place == 1
        if self._is_heard:
            self._hooks.close()
            self._hooks.enter_context(self._listening())
        return self._is_heard

    @property
    def _period(self) -> int:
        return EVERY if self._batch <= EARLY else SELDOM

    def until_heard(self) -> int:
        """Batches from the present one to the next that may be heard, at least 1: those between need not be told."""
        place = (self._batch + 1) % self._period
        return self._period - place if place else 1

    def end_batch(self, step: int) -> None:
        """The batch is over.

        Args:
            step: its optimizer step.
        """
        if not self._is_heard:
            return
        self._hooks.close()
        self._still.end_batch(step)
        if self._pairs:
            latest = self.noise.latest()
            if self._ranks is not None:
                for name, found in latest.items():
                    self._ranks.add(name, found.batch(), second=self.noise.is_second)
                self._ranks.end_step()
            self.noise.end()

    def end_forward(self, pl_module: LightningModule) -> None:
        """The backward pass begins: hear no more of a batch where nothing can come.

        Of a pair of batches all calls are counted, and by hand there may be several backward passes.

        Args:
            pl_module: the model.
        """
        if self._is_heard and not self._pairs and pl_module.automatic_optimization:
            self._hooks.close()

    def _listening(self) -> AbstractContextManager[None]:
        return self.noise.listening(self._hear) if self._pairs else listen(self._layers, self._hear)

    def hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Look at one call; nothing is read on the host."""
        self._still.hear(name, module)
        if self._pairs:
            self.noise.hear(name, module, inputs, output)

    def shares(self) -> Shares:
        """What this process has for a comparison with the others; reads the host."""
        layers = self._layers | self.noise.hidden.layers
        return self._ranks.to_plain(layers) if self._ranks is not None else {}

    def stopped(self) -> list[Finding]:
        """Judge the layers that stand still; reads the host."""
        return statistics_stopped(self._still.stops())

    def measure(self) -> tuple[dict[str, float], int]:
        """m_eff by layer, and the pairs of steps behind it; reads the host."""
        return effective(self.noise.to_plain())

    def judge(self, found: Mapping[str, float], pairs: int) -> Iterator[Finding | None]:
        """Judge what this process heard; reads the host.

        Args:
            found: m_eff by layer.
            pairs: pairs of steps behind it.
        """
        yield from of_noise(found, pairs, self.noise)
        yield from self.stopped()


def of_ranks(ranks: list[Shares | None]) -> Finding | None:
    """Judge what the processes have; None also where one has nothing, as where its monitor failed."""
    known = [rank for rank in ranks if rank]
    if len(known) < len(ranks) or len(ranks) < 2:  # noqa: PLR2004  (two to compare)
        return None
    return statistics_differ_between_ranks(compare(known), len(known))
