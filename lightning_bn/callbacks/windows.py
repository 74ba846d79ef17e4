# SPDX-License-Identifier: Apache-2.0
"""Active values of the units of each layer over a window of steps, pooled over ranks, judged when it is long enough."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightning_bn.callbacks.hearing import Units
from lightning_bn.stats.moments import Rows
from lightning_bn.stats.units import RARELY

LENGTH = 512
"""Samples in a window: in one batch alone, up to 40 % of the units of a deep healthy network look dead."""


@dataclass(frozen=True)
class Window:
    """What the units of one layer did over a window.

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
    """The present window of every layer whose units are counted.

    Args:
        bounded: names of the layers that saturate at both ends.
    """

    def __init__(self, bounded: Collection[str] = ()) -> None:
        self._bounded = frozenset(bounded)
        self._first: dict[str, tuple[float, float]] = {}
        self._units: dict[str, Units] = {}

    @property
    def layout(self) -> dict[str, int]:
        """Number of units by layer, in the order in which they lie in a message; equal on all ranks."""
        return {name: len(units.active) for name, units in self._units.items()}

    def extend(self, units: Mapping[str, int]) -> None:
        """Make room for more layers; those that are known stay as they are."""
        self._units |= {name: _nothing(size) for name, size in units.items() if name not in self._units}

    def message(self, heard: Mapping[str, Units]) -> Rows:
        """What one step adds: active values of all units, then values and samples of each layer, as one vector.

        Layers that have no place, or not so many units, are left out.
        """
        told = []
        for name, known in self._units.items():
            units = heard.get(name)
            told.append(units if units and len(units.active) == len(known.active) else _nothing(len(known.active)))
        counts = [float(count) for units in told for count in (units.values, units.samples)]
        return np.concatenate([*(units.active for units in told), np.array(counts)])

    def add(self, messages: Rows) -> None:
        """Add the messages of all ranks, ``(ranks, length)``."""
        for name, units in self._named(messages.sum(0)).items():
            self._units[name] += units

    def close(self) -> dict[str, Window]:
        """Take the windows that are long enough, and begin them anew."""
        found = {}
        long = {name: units for name, units in self._units.items() if units.samples >= LENGTH and len(units.active)}
        for name, known in long.items():
            size = len(known.active)
            dead = int((known.active == 0).sum())
            rare = int((known.active < RARELY * known.values).sum())
            passing = float(known.active.sum()) / (known.values * size)
            told = (name in self._bounded, self._first.get(name))
            found[name] = Window(size, dead, rare, passing, known.samples, *told)
            self._first.setdefault(name, (dead / size, 1 - passing))
            self._units[name] = _nothing(size)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain types and a CPU tensor."""
        state = torch.from_numpy(self.message(self._units))
        return {"layout": self.layout, "first": dict(self._first), "state": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._first = {name: (pair[0], pair[1]) for name, pair in state["first"].items()}
        self._units = {name: _nothing(size) for name, size in state["layout"].items()}
        self._units = self._named(state["state"].cpu().double().numpy())

    def _named(self, message: Rows) -> dict[str, Units]:
        """The parts of a message, by layer."""
        named, begin = {}, 0
        counts = message[len(message) - 2 * len(self._units) :].reshape(-1, 2)
        for (name, size), (values, samples) in zip(self.layout.items(), counts, strict=True):
            named[name] = Units(message[begin : begin + size], int(values), int(samples))
            begin += size
        return named


def _nothing(units: int) -> Units:
    return Units(np.zeros(units), 0, 0)
