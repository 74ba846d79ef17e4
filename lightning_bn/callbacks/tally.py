# SPDX-License-Identifier: Apache-2.0
"""Sums of many tensors, taken on the device as they come by and made into rows when they are on the host."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from lightning_bn.stats.moments import MEASURED, Rows, complete, measure
from lightning_bn.stats.sketch import complete_sketches, sketch
from lightning_bn.stats.slots import COLUMNS, Slots

NONZERO = COLUMNS - 1


class Reader:
    """Takes numbers off the front."""

    def __init__(self, numbers: Rows) -> None:
        self._numbers, self._at = numbers, 0

    def take(self, count: int) -> Rows:
        """The next so many."""
        self._at += count
        return self._numbers[self._at - count : self._at]

    def named(self, names: Iterable[str]) -> dict[str, float]:
        """One number for each name."""
        names = list(names)
        return dict(zip(names, self.take(len(names)).tolist(), strict=True))

    def rest(self) -> list[float]:
        """All that are left."""
        return list(map(float, self._numbers[self._at :]))


class Tally:
    """Measures tensors, and remembers which layer each belongs to.

    Args:
        device: where the sums lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._slots = device, Slots(device)
        self._sums: Rows = np.zeros((0, COLUMNS))
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._slots.clear()
        self._pieces: list[tuple[int, int]] = []
        self._exact: list[tuple[int, int, Tensor]] = []

    def add(self, place: int, x: Tensor, *, careful: bool, zeros: bool = True) -> range:
        """Measure a tensor; nothing is read on the host.

        Args:
            place: layer that it belongs to.
            x: floating-point values, without a graph.
            careful: whether in two passes, as is always done where plain sums would not do or cannot be held here.
            zeros: whether to count zeros; if not, :meth:`count_nonzero` is to be told.

        Returns:
            The plain sums that were taken, one for each piece of the tensor; none where it was measured in two passes.
        """
        first = len(self._pieces)
        if careful or x.dtype == torch.float64 or x.device != self._device:
            self._exact.append((place, x.numel(), measure(x)))
        else:
            x = x if x.dtype == torch.float32 else x.float()
            self._pieces += [(place, held) for held in sketch(x, self._slots, zeros=zeros)]
        return range(first, len(self._pieces))

    def parts(self) -> list[Tensor]:
        """What is to come to the host, in few tensors of one dimension."""
        return [*self._slots.taken(), *(values for *_, values in self._exact)]

    def read(self, host: Reader) -> None:
        """Take what :meth:`parts` gave, now on the host."""
        self._sums = host.take(len(self._pieces) * COLUMNS).reshape(-1, COLUMNS)
        self._measured = host.take(len(self._exact) * MEASURED).reshape(-1, MEASURED)

    def count_nonzero(self, pieces: range, nonzero: float) -> None:
        """Say how many values of some pieces are not 0, where something else counted them.

        Args:
            pieces: what :meth:`add` gave.
            nonzero: values unequal to 0 in all of them together.
        """
        for piece in pieces:
            self._sums[piece, NONZERO] = min(nonzero, self._pieces[piece][1])
            nonzero -= self._sums[piece, NONZERO]

    def rows(self) -> tuple[Rows, list[int]]:
        """A row as in :mod:`~lightning_bn.stats.moments` for each measured piece, and the layer of each."""
        rows = [complete_sketches(self._sums, np.array([float(size) for _, size in self._pieces]))]
        if self._exact:
            rows.append(complete(self._measured, np.array([float(size) for _, size, _ in self._exact])))
        return np.concatenate(rows), [*(place for place, _ in self._pieces), *(place for place, *_ in self._exact)]
