# SPDX-License-Identifier: Apache-2.0
"""Places for the results of reductions, side by side in memory: they are fetched together, and nothing is stacked."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = 5
GROWTH = 64
"""Rows in one buffer."""


class Slots:
    """Rows of five 0-dimensional float32 tensors; reductions write into them with ``out=``.

    The buffers stay when :meth:`clear` begins anew, so that nothing is allocated from one due step to the next.

    Args:
        device: where they lie.

    Example:
        >>> slots = Slots(torch.device("cpu"))
        >>> _ = [place.fill_(number) for number, place in enumerate(slots.row())]
        >>> torch.cat(slots.taken()).tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[Tensor] = []
        self._rows: list[tuple[Tensor, ...]] = []
        self._used = 0

    def __len__(self) -> int:
        """Number of rows that were taken."""
        return self._used

    def row(self) -> tuple[Tensor, ...]:
        """The next row."""
        if self._used == len(self._rows):
            self._grow()
        self._used += 1
        return self._rows[self._used - 1]

    def taken(self) -> list[Tensor]:
        """All rows that were taken, one after the other, in few tensors of one dimension."""
        parts, left = [], self._used * COLUMNS
        for buffer in self._buffers:
            if left <= 0:
                break
            parts.append(buffer if left >= len(buffer) else buffer[:left])
            left -= len(buffer)
        return parts

    def clear(self) -> None:
        """Begin anew with the first row."""
        self._used = 0

    def _grow(self) -> None:
        with torch.inference_mode(False):  # else nothing outside of inference mode could be written into them
            buffer = torch.zeros(GROWTH * COLUMNS, dtype=torch.float32, device=self._device)
            places = buffer.unbind()
        self._buffers.append(buffer)
        self._rows += zip(*[iter(places)] * COLUMNS, strict=True)
