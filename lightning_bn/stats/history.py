# SPDX-License-Identifier: Apache-2.0
"""Statistics of every layer over a whole run, in memory that does not grow with its length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

WIDEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Grid:
    """One statistic, layer by step.

    Args:
        layers: names of the layers of which the statistic was ever measured.
        steps: first measured step of each column, increasing.
        end: where the last column ends: one usual interval behind the last measured step.
        values: ``(layers, columns)``, float32; NaN where nothing was measured and where NaN was.
        measured: ``(layers, columns)``, bool.
        stride: measured steps in one column; the last one may have fewer.
    """

    layers: tuple[str, ...]
    steps: tuple[int, ...]
    end: float
    values: NDArray[np.float32]
    measured: NDArray[np.bool_]
    stride: int


class History:
    """Values by layer, statistic and step, in a fixed number of columns on the host.

    When all columns are taken, neighbours are merged in pairs, and from then on a column holds twice as many measured
    steps. A finite cell is the mean of what was measured in it. NaN and infinity are never averaged away: a cell in
    which one was measured shows it, and NaN where several kinds were. Memory is ``8 * statistics * layers * columns``
    bytes, however long the run.

    Args:
        columns: number of columns that are kept, even and at least 2.
        layers: names of layers in the order in which they are to lie, such as that of a forward pass; others follow in
            the order in which they appear.

    Raises:
        ValueError: if ``columns`` is no even whole number of at least 2.

    Example:
        >>> history = History(columns=2)
        >>> for step in range(3):
        ...     history.add(step, {"fc": {"std": float(step)}})
        >>> grid = history.grid("std")
        >>> grid.steps, grid.values.tolist()
        ((0, 2), [[0.5, 2.0]])
    """

    def __init__(self, columns: int = 256, *, layers: Iterable[str] = ()) -> None:
        if isinstance(columns, bool) or not isinstance(columns, int) or columns < 2 or columns % 2:  # noqa: PLR2004
            raise ValueError(f"columns must be an even whole number of at least 2, got {columns!r}")
        self.columns = columns
        self._layers = {name: place for place, name in enumerate(dict.fromkeys(layers))}
        self._statistics: dict[str, int] = {}
        self._steps: list[int] = []  # first step of each column
        self._last = -1
        self._stride = 1
        self._taken = 0  # measured steps in the last column
        self._mean = np.zeros((0, len(self._layers), columns), np.float32)  # 0 where nothing was measured
        self._count = np.zeros(self._mean.shape, np.int32)

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics that were measured, in the order in which they appeared."""
        return tuple(self._statistics)

    def add(self, step: int, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Take in one measured step; one that is added twice counts as one step measured twice.

        Args:
            step: its number, not below that of the step before.
            rows: values by layer and statistic; what is missing was not measured. A finite value beyond float32 counts
                as its largest number.

        Raises:
            ValueError: if ``step`` is below that of the step before.
        """
        if step < self._last:
            raise ValueError(f"step must not be below that of the step before ({self._last}), got {step}")
        self._make_room(rows)
        self._open(step)
        cells = [(layer, name, value) for layer, row in rows.items() for name, value in row.items()]
        where = (
            [self._statistics[name] for _, name, _ in cells],
            [self._layers[layer] for layer, _, _ in cells],
            len(self._steps) - 1,
        )
        values = np.array([value for _, _, value in cells], np.float64)
        values = np.where(np.isfinite(values), values.clip(-WIDEST, WIDEST), values)
        before = self._count[where]
        with np.errstate(invalid="ignore"):  # inf and -inf make NaN
            self._mean[where] = (self._mean[where].astype(np.float64) * before + values) / (before + 1)
        self._count[where] = before + 1

    def grid(self, statistic: str) -> Grid:
        """One statistic of all layers; a copy.

        Args:
            statistic: one of :attr:`statistics`.

        Raises:
            ValueError: if it was never measured.
        """
        if statistic not in self._statistics:
            known = ", ".join(self._statistics) or "none yet"
            raise ValueError(f"statistic must be one that was measured ({known}), got {statistic!r}")
        used = np.s_[self._statistics[statistic], :, : len(self._steps)]
        measured = self._count[used] > 0
        ever = np.any(measured, axis=1)
        values = np.where(measured, self._mean[used], np.float32(np.nan))[ever]
        names = tuple(name for name, place in self._layers.items() if ever[place])
        return Grid(names, tuple(self._steps), self._last + self._interval(), values, measured[ever], self._stride)

    def state_dict(self) -> dict[str, Any]:
        """Plain types and CPU tensors, which ``torch.load(weights_only=True)`` reads."""
        used = len(self._steps)
        return {
            "columns": self.columns,
            "layers": list(self._layers),
            "statistics": list(self._statistics),
            "steps": list(self._steps),
            "last": self._last,
            "stride": self._stride,
            "taken": self._taken,
            "mean": torch.from_numpy(self._mean[..., :used].copy()),
            "count": torch.from_numpy(self._count[..., :used].copy()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, with its number of columns.

        Layers that it does not know follow its own.
        """
        own = list(self._layers)
        self.columns = state["columns"]
        self._layers = {name: place for place, name in enumerate(dict.fromkeys([*state["layers"], *own]))}
        self._statistics = {name: place for place, name in enumerate(state["statistics"])}
        self._steps = list(state["steps"])
        self._last, self._stride, self._taken = state["last"], state["stride"], state["taken"]
        more = ((0, 0), (0, len(self._layers) - len(state["layers"])), (0, self.columns - len(self._steps)))
        self._mean = np.pad(state["mean"].numpy(), more)
        self._count = np.pad(state["count"].numpy(), more)

    def _make_room(self, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Give new layers and new statistics a place behind those that are known."""
        for layer, row in rows.items():
            self._layers.setdefault(layer, len(self._layers))
            for name in row:
                self._statistics.setdefault(name, len(self._statistics))
        statistics, layers, _ = self._mean.shape
        if (statistics, layers) != (len(self._statistics), len(self._layers)):
            more = ((0, len(self._statistics) - statistics), (0, len(self._layers) - layers), (0, 0))
            self._mean, self._count = np.pad(self._mean, more), np.pad(self._count, more)

    def _open(self, step: int) -> None:
        """Make the last column the one that the step belongs to."""
        if step == self._last:
            return
        self._last = step
        if self._steps and self._taken < self._stride:
            self._taken += 1
            return
        if len(self._steps) == self.columns:
            self._merge()
        self._steps.append(step)
        self._taken = 1

    def _merge(self) -> None:
        """Make one column of each two neighbours, weighted by what was measured in them."""
        half = self.columns // 2
        count = self._count.reshape(*self._count.shape[:2], half, 2)
        mean = self._mean.reshape(count.shape).astype(np.float64)
        total = count.sum(-1)
        with np.errstate(invalid="ignore"):  # inf and -inf make NaN
            self._mean[..., :half] = (mean * count).sum(-1) / np.maximum(total, 1)
        self._count[..., :half] = total
        self._mean[..., half:], self._count[..., half:] = 0, 0
        self._steps = self._steps[::2]
        self._stride *= 2

    def _interval(self) -> float:
        """Usual distance of two measured steps, at least 1."""
        number = self._stride * (len(self._steps) - 1) + self._taken
        return max((self._last - self._steps[0]) / max(number - 1, 1), 1.0) if self._steps else 1.0
