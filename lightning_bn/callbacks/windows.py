# SPDX-License-Identifier: Apache-2.0
"""Active values of the units of each layer over a window of steps, pooled over ranks, judged when it is long enough."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_bn.callbacks.hearing import Units
from lightning_bn.stats.moments import wide_dtype
from lightning_bn.stats.units import RARELY

LENGTH = 512
"""Samples in a window: in one batch alone, up to 40 % of the units of a deep healthy network look dead."""
WIDTH = 5


@dataclass(frozen=True)
class Window:
    """What the units of one layer did over a window, on the host.

    Args:
        units: number of units.
        dead: units that passed gradient for no value.
        rare: units that passed gradient for less than 1 % of their values.
        passing: share of all values that passed gradient.
        samples: samples in the window.
        bounded: whether the activation saturates at both ends, as tanh does; otherwise it is dead at one, as ReLU is.
        first: ``dead`` and ``1 - passing`` as shares in the first window of the run; None in that window itself.
    """

    units: int
    dead: int
    rare: int
    passing: float
    samples: int
    bounded: bool
    first: tuple[float, float] | None


class Windows:
    """The present window of every layer whose units are counted; it lies on the device of the model.

    Args:
        device: where it lies.
        bounded: names of the layers that saturate at both ends.
    """

    def __init__(self, device: torch.device, bounded: Collection[str] = ()) -> None:
        self._bounded = frozenset(bounded)
        self.layout: dict[str, int] = {}
        """Number of units by layer, in the order in which they lie in a message; equal on all ranks."""
        self._device = device
        self._first: dict[str, tuple[float, float]] = {}
        self._state = torch.zeros(0, dtype=wide_dtype(device), device=device)
        self._index = self._layers()

    def extend(self, units: Mapping[str, int]) -> None:
        """Make room for more layers; those that are known stay as they are."""
        new = {name: count for name, count in units.items() if name not in self.layout}
        if new:
            kept, counts = torch.split(self._state, [sum(self.layout.values()), 2 * len(self.layout)])
            more, behind = kept.new_zeros(sum(new.values())), kept.new_zeros(2 * len(new))
            self.layout |= new
            self._index = self._layers()
            self._state = torch.cat([kept, more, counts, behind])

    def message(self, heard: Mapping[str, Units]) -> Tensor:
        """What one step adds, ``(units + 2 · layers,)``; layers that are not in the layout are left out."""
        parts, counts = [], []
        for name, size in self.layout.items():
            units = heard.get(name)
            fits = units is not None and len(units.active) == size
            parts.append(units.active.to(self._state) if units and fits else self._state.new_zeros(size))
            counts += [units.values, units.samples] if units and fits else [0, 0]
        return torch.cat([*parts, torch.tensor(counts, dtype=self._state.dtype).to(self._device, non_blocking=True)])

    def add(self, messages: Tensor) -> None:
        """Add the messages of all ranks, ``(ranks, units + 2 · layers)``."""
        self._state += messages.sum(0)

    def summary(self) -> Tensor:
        """For each layer dead units, rarely active units, active values, values and samples, ``(layers, 5)``."""
        sizes = list(self.layout.values())
        active, counts = torch.split(self._state, [sum(sizes), 2 * len(sizes)])
        counts = counts.view(-1, 2)
        flags = torch.stack([active == 0, active < RARELY * counts[self._index, 0], active])
        sums = active.new_zeros(3, len(sizes)).index_add_(1, self._index, flags)
        return torch.cat([sums.T, counts], dim=1)

    def close(self, rows: Sequence[Sequence[float]]) -> dict[str, Window]:
        """Take the windows that are long enough, and begin them anew.

        Args:
            rows: what :meth:`summary` gave, on the host.
        """
        found, begin = {}, 0
        for place, ((name, size), (dead, rare, active, values, samples)) in enumerate(
            zip(self.layout.items(), rows, strict=True)
        ):
            if samples >= LENGTH:
                passing = active / (values * size)
                told = (name in self._bounded, self._first.get(name))
                found[name] = Window(size, int(dead), int(rare), passing, int(samples), *told)
                self._first.setdefault(name, (dead / size, 1 - passing))
                self._state[begin : begin + size] = 0
                end = len(self._state) - 2 * (len(rows) - place)
                self._state[end : end + 2] = 0
            begin += size
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain types and a CPU tensor."""
        return {"layout": dict(self.layout), "first": dict(self._first), "state": self._state.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.layout = dict(state["layout"])
        self._first = {name: (pair[0], pair[1]) for name, pair in state["first"].items()}
        self._state = state["state"].to(self._device, wide_dtype(self._device))
        self._index = self._layers()

    def _layers(self) -> Tensor:
        """The place of the layer of each unit."""
        sizes = torch.tensor(list(self.layout.values()), dtype=torch.int64)
        return torch.repeat_interleave(sizes).to(self._device)
