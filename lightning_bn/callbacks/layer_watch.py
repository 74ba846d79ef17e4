# SPDX-License-Identifier: Apache-2.0
"""Listens to the layers of a model on due steps, and turns what all ranks heard into numbers and findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bn.callbacks.hearing import Hearing
from lightning_bn.callbacks.verdicts import of_batchnorm, of_signal, of_units
from lightning_bn.callbacks.windows import WIDTH as UNIT_COLUMNS
from lightning_bn.callbacks.windows import Window, Windows
from lightning_bn.callbacks.wiring import WEIGHTED, Wiring
from lightning_bn.channels import channel_axes, inner_modules
from lightning_bn.findings import Finding
from lightning_bn.stats.moments import WIDTH, Summary, is_plain, pool, summarize
from lightning_bn.stats.units import kind_of
from lightning_bn.taps import FAST_IN_EVAL, Hear, listen, reachable

OFF, SPENT, REST = range(3)
"""What a rank says of itself: it is off; seconds that measuring its last due step took, and seconds of that step
without."""
SIGNALS = 3


@dataclass(frozen=True)
class Taken:
    """One due step on the host.

    Args:
        statistics: summary of each layer that was heard on any rank.
        closed: by activation layer its window, where one has become long enough in this step.
        signals: the largest of each signal over the ranks.
        findings: what the rules say.
        more: the further numbers that were asked for.
        heard: layers that this rank heard, and whether gradients were recorded in them.
    """

    statistics: dict[str, Summary]
    closed: dict[str, Window]
    signals: tuple[float, ...]
    findings: list[Finding]
    more: list[float]
    heard: dict[str, bool]


class LayerWatch:
    """The layers of one fit, what is known of them, and what is heard in the present due step.

    Args:
        model: the whole network.
        layers: those of it that are measured, by name.
        device: where numbers are pooled.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], device: torch.device) -> None:
        self.heard = False
        self.layers = dict(layers)
        axes, kinds = channel_axes(model), {name: kind_of(module) for name, module in layers.items()}
        self._kinds = {name: (kind, axes[layers[name]]) for name, kind in kinds.items() if kind}
        self.windows = Windows(device, [name for name, (kind, _) in self._kinds.items() if kind.bounded])
        self._inner = inner_modules(model)
        self._wiring: Wiring | None = Wiring()
        self._direct: frozenset[str] = frozenset()
        self._dropouts: dict[str, tuple[str, float]] = {}
        self._fickle = any(isinstance(module, FAST_IN_EVAL) for module in model.modules())
        self._careful = set(layers)  # nothing is known of them yet
        self._device = device
        self._hearing: Hearing | None = None

    def listen(self, model: nn.Module, hear: Hear) -> AbstractContextManager[None]:
        """Have the layers heard while the block lasts; further blocks of the same due step add to the first.

        Args:
            model: the whole network.
            hear: is called for each output, and is to call :meth:`hear`.
        """
        if self._hearing is None:
            self._hearing = Hearing(self.layers, self._kinds, self._careful, self._device, self._wiring)
        # Modules may have gone into eval mode meanwhile.
        within = reachable(model)[0] if self._fickle else self.layers
        return listen({name: module for name, module in self.layers.items() if name in within}, hear)

    def hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Measure the output of one layer."""
        if self._hearing is not None:
            self._hearing.hear(name, module, inputs, output)

    def forget(self) -> None:
        """Drop what was heard in a due step that was broken off."""
        self._hearing = None

    def message(self, *, spent: float, rest: float) -> Tensor:
        """What this rank has to say of a due step that is over, one vector; it has the same length on every rank."""
        hearing = self._hearing or Hearing({}, {}, (), self._device)
        rows = hearing.finish() if self._hearing else Hearing(self.layers, {}, (), self._device).finish()
        self.heard = self.heard or bool(hearing.order)
        signals = torch.tensor([0.0, spent, rest], dtype=rows.dtype).to(self._device, non_blocking=True)
        return torch.cat([signals, rows.flatten(), self.windows.message(hearing.units)])

    def excuse(self) -> Tensor:
        """The message of a rank whose monitor is off."""
        message = Hearing(self.layers, {}, (), self._device).finish().flatten()
        size = SIGNALS + len(message) + len(self.windows.message({}))
        return torch.cat([message.new_ones(1), message.new_zeros(SIGNALS - 1), message, message.new_zeros(size)])[:size]

    @property
    def agreed(self) -> bool:
        """Whether the layers whose units are counted have their places, the same on all ranks."""
        return bool(self.windows.layout) or not self._kinds

    def sizes(self) -> dict[str, int]:
        """Number of units of each layer that this rank heard in the present due step."""
        return {name: len(units.active) for name, units in self._hearing.units.items()} if self._hearing else {}

    def agree(self, ranks: Sequence[Mapping[str, int]]) -> None:
        """Give every layer a place whose units any rank heard.

        Args:
            ranks: :meth:`sizes` of all ranks.
        """
        for sizes in ranks:
            self.windows.extend(sizes)

    def take(self, ranks: Tensor, step: int, more: Sequence[Tensor] = ()) -> Taken:
        """Pool the messages of all ranks, ``(ranks, length)``, on the device; one transfer brings all to the host.

        Args:
            ranks: messages.
            step: optimizer steps taken before.
            more: further 0-dimensional numbers for the same transfer, of this rank alone.
        """
        width = SIGNALS + WIDTH * len(self.layers)
        signals, rows, units = ranks[:, :SIGNALS].amax(0), ranks[:, SIGNALS:width], ranks[:, width:]
        pooled = rows[0].view(-1, WIDTH)
        for other in rows[1:]:
            pooled = pool(pooled, other.view(-1, WIDTH))
        self.windows.add(units)
        hearing = self._hearing or Hearing({}, {}, (), self._device)
        medians = hearing.variances()
        extra = [one.to(pooled) for one in (*medians.values(), *hearing.varied.values(), *more)]
        parts = [signals, pooled.flatten(), self.windows.summary().flatten()]
        parts += [torch.stack(extra)] if extra else []
        host = iter(torch.cat(parts).tolist())
        told = tuple(_next(host, SIGNALS))
        found = {name: summarize(_next(host, WIDTH)) for name in self.layers}
        closed = self.windows.close([_next(host, UNIT_COLUMNS) for _ in self.windows.layout])
        variances = dict(zip(medians, _next(host, len(medians)), strict=True))
        varied = dict(zip(hearing.varied, _next(host, len(hearing.varied)), strict=True))
        self._careful = {name for name, row in found.items() if not is_plain(row)}
        findings = [
            *of_units(closed, self._kinds, inner=self._inner, direct=self._learn_wiring()),
            *of_signal({name: found[name].std for name in hearing.order if self._holds_weights(name)}, varied),
            *of_batchnorm(self.layers, variances, self._dropouts, step),
        ]
        self._hearing = None
        return Taken(
            {name: row for name, row in found.items() if row.count},
            closed,
            told,
            findings,
            list(host),
            dict(hearing.order),
        )

    def _learn_wiring(self) -> frozenset[str]:
        """Let go of the wiring when the first step is over, and keep what it told."""
        if self._wiring is not None:
            self._direct, self._dropouts = frozenset(self._wiring.direct), dict(self._wiring.dropouts)
            self._wiring = None
        return self._direct

    def _holds_weights(self, name: str) -> bool:
        return isinstance(self.layers[name], WEIGHTED)


def _next(numbers: Iterator[float], size: int) -> list[float]:
    return [next(numbers) for _ in range(size)]
