# SPDX-License-Identifier: Apache-2.0
"""Listens to the layers of a model on due steps, and turns what all ranks heard into numbers and findings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lightning_bn.callbacks.hearing import Ear, Heard
from lightning_bn.callbacks.verdicts import of_batchnorm, of_signal, of_units
from lightning_bn.callbacks.windows import Window, Windows
from lightning_bn.callbacks.wiring import WEIGHTED
from lightning_bn.channels import channel_axes, inner_modules
from lightning_bn.findings import Finding
from lightning_bn.stats.moments import WIDTH, Rows, Summary, blank, is_plain, pool, summarize, wide_dtype
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
    """

    statistics: dict[str, Summary]
    closed: dict[str, Window]
    signals: tuple[float, ...]
    findings: list[Finding]


class LayerWatch:
    """The layers of one fit, what is known of them, and what is heard in the present due step.

    Args:
        model: the whole network.
        layers: those of it that are measured, by name.
        device: where numbers are put together before they come to the host.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], device: torch.device) -> None:
        self.heard = False
        self.layers = dict(layers)
        axes, kinds = channel_axes(model), {name: kind_of(module) for name, module in layers.items()}
        self._kinds = {name: (kind, axes[layers[name]]) for name, kind in kinds.items() if kind}
        self.windows = Windows([name for name, (kind, _) in self._kinds.items() if kind.bounded])
        self._inner = inner_modules(model)
        self._weighted = {name for name, module in layers.items() if isinstance(module, WEIGHTED)}
        self._direct: frozenset[str] = frozenset()
        self._dropouts: dict[str, tuple[str, float]] = {}
        self._fickle = any(isinstance(module, FAST_IN_EVAL) for module in model.modules())
        self._device = device
        self._ear = Ear(layers, self._kinds, device)
        self.hear = self._ear.hear
        self.forget = self._ear.begin

    def listen(self, model: nn.Module, hear: Hear, binned: Collection[str] = ()) -> AbstractContextManager[None]:
        """Have the layers heard while the block lasts; further blocks of the same due step add to the first.

        Args:
            model: the whole network.
            hear: is called for each output, and is to call :attr:`hear`.
            binned: layers of which histograms are wanted too.
        """
        self._ear.binned = binned
        # Modules may have gone into eval mode meanwhile.
        within = reachable(model)[0] if self._fickle else self.layers
        return listen({name: module for name, module in self.layers.items() if name in within}, hear)

    def fetch(self, more: Sequence[Tensor] = ()) -> Heard:
        """The numbers of a due step that is over; one transfer brings all of them to the host.

        Args:
            more: further 0-dimensional numbers for the same transfer.
        """
        heard = self._ear.tell(more)
        self.heard = self.heard or bool(heard.order)
        return heard

    def message(self, heard: Heard | None, spent: float, rest: float) -> Rows:
        """What this rank has to say of a due step, one vector; it has the same length on every rank.

        Args:
            heard: what :meth:`fetch` gave; None of a rank whose monitor is off.
            spent: seconds that measuring the last due step took.
            rest: seconds of that step without.
        """
        if heard is None:
            silence = blank(len(self.layers)).ravel()
            return np.concatenate([[1.0, 0.0, 0.0], silence, self.windows.message({})])
        return np.concatenate([[0.0, spent, rest], heard.rows.ravel(), self.windows.message(heard.units)])

    def gather(self, message: Rows, all_gather: Callable[[Tensor], Tensor] | None) -> Rows:
        """The messages of all ranks, ``(ranks, length)``.

        Args:
            message: that of this rank.
            all_gather: gives the tensors of all ranks, stacked; a collective. None where there is one rank only.
        """
        if all_gather is None:
            return message[None]
        mine = torch.from_numpy(message).to(self._device, wide_dtype(self._device))
        return all_gather(mine).reshape(-1, len(message)).cpu().double().numpy()

    @property
    def agreed(self) -> bool:
        """Whether the layers whose units are counted have their places, the same on all ranks."""
        return bool(self.windows.layout) or not self._kinds

    def sizes(self) -> dict[str, int]:
        """Number of units of each layer that this rank heard in the present due step."""
        return self._ear.sizes

    def agree(self, ranks: Sequence[Mapping[str, int]]) -> None:
        """Give every layer a place whose units any rank heard.

        Args:
            ranks: :meth:`sizes` of all ranks.
        """
        for sizes in ranks:
            self.windows.extend(sizes)

    def take(self, heard: Heard, ranks: Rows, step: int) -> Taken:
        """Pool the messages of all ranks.

        Args:
            heard: what this rank heard.
            ranks: messages, ``(ranks, length)``.
            step: optimizer steps taken before.
        """
        width = SIGNALS + WIDTH * len(self.layers)
        rows = ranks[:, SIGNALS:width].reshape(-1, WIDTH)
        pooled = rows if len(ranks) == 1 else pool(rows, [*range(len(self.layers))] * len(ranks), len(self.layers))
        self.windows.add(ranks[:, width:])
        found = dict(zip(self.layers, map(summarize, pooled.tolist()), strict=True))
        closed = self.windows.close()
        self._ear.careful = {name for name, row in found.items() if not is_plain(row)}
        self._learn_wiring()
        stds = {name: found[name].std for name in heard.order if name in self._weighted}
        findings = [
            *of_units(closed, self._kinds, inner=self._inner, direct=self._direct),
            *of_signal(stds, heard.varied),
            *of_batchnorm(self.layers, heard.variances, self._dropouts, step),
        ]
        measured = {name: row for name, row in found.items() if row.count}
        return Taken(measured, closed, tuple(ranks[:, :SIGNALS].max(0).tolist()), findings)

    def _learn_wiring(self) -> None:
        """Let go of the wiring when the first step is over, and keep what it told."""
        wiring, self._ear.wiring = self._ear.wiring, None
        if wiring is not None:
            self._direct, self._dropouts = frozenset(wiring.direct), dict(wiring.dropouts)
