# SPDX-License-Identifier: Apache-2.0
"""What one due step of the activation monitor hears: moments of each layer, and active values of each unit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks.wiring import WEIGHTED, Wiring
from lightning_bn.stats.batchnorm import output_moments, saved_statistics
from lightning_bn.stats.finite import is_measurable
from lightning_bn.stats.histogram import bin_counts
from lightning_bn.stats.moments import COUNT, M2, MEAN, MEASURED, Rows, blank, complete, measure, pool, wide_dtype
from lightning_bn.stats.sketch import complete_sketches, sketch
from lightning_bn.stats.slots import COLUMNS, Slots
from lightning_bn.stats.units import Kind, active_counts
from lightning_bn.taps import tensors_in

NONZERO = COLUMNS - 1


@dataclass(frozen=True)
class Units:
    """Units of one layer in one step, on the host.

    Args:
        active: active values of each unit, ``(C,)``.
        values: values of each unit.
        samples: samples of the batches, the length of the first axis.
    """

    active: Rows
    values: int
    samples: int

    def __add__(self, other: Units) -> Units:
        """Both together: the layer was called again, or for the next micro-batch."""
        return Units(self.active + other.active, self.values + other.values, self.samples + other.samples)


@dataclass(frozen=True)
class Heard:
    """The numbers of one due step of this rank, on the host.

    Args:
        rows: pooled row of each layer, ``(layers, 7)``.
        units: by layer what the activations of known kind did.
        variances: by layer the median over channels of the batch variance in front of a BatchNorm layer.
        varied: of layers with weights, where the wiring is followed: spread from sample to sample.
        order: layers in the order in which they first ran, and whether gradients of their outputs were recorded.
        bins: by layer the histogram of its values, see :func:`~lightning_bn.stats.histogram.bin_counts`.
        more: the further numbers that were asked for.
    """

    rows: Rows
    units: dict[str, Units]
    variances: dict[str, float]
    varied: dict[str, float]
    order: dict[str, bool]
    bins: dict[str, list[int]]
    more: list[float]


class Active(NamedTuple):
    """Active values of one output on the device, and the rows of :class:`.Slots` whose zeros they tell."""

    name: str
    active: Tensor
    values: int
    samples: int
    rows: range


class Norm(NamedTuple):
    """What a BatchNorm layer made of one batch: mean, 1/√(v + ε) and, with them if it has them, γ and β."""

    name: str
    size: int
    channels: int
    eps: float
    vector: Tensor


class Ear:
    """Collects the numbers of a due step on the device; :meth:`tell` brings them to the host, all in one transfer.

    Args:
        layers: names, in the order of the rows.
        kinds: of those, the activations whose units are counted, with the axis of their channels.
        device: where numbers are put together.
    """

    def __init__(self, layers: Iterable[str], kinds: Mapping[str, tuple[Kind, int]], device: torch.device) -> None:
        self._places = {name: place for place, name in enumerate(layers)}
        self._kinds, self._device, self._slots = kinds, device, Slots(device)
        self.careful: Collection[str] = set(self._places)
        """Layers whose spread plain sums would lose, or of which nothing is known yet: measured in two passes."""
        self.wiring: Wiring | None = Wiring()
        """Follows the tensors from module to module in the first step of a run."""
        self.binned: Collection[str] = ()
        """Layers of which a histogram is wanted too."""
        self.begin()

    def begin(self) -> None:
        """Forget what was heard."""
        self._slots.clear()
        self._pieces: list[tuple[int, int]] = []
        self._exact: list[tuple[int, int, Tensor]] = []
        self._norms: list[Norm] = []
        self._active: list[Active] = []
        self._bins: dict[str, Tensor] = {}
        self._varied: dict[str, Tensor] = {}
        self._order: dict[str, bool] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """Number of units of each activation that was heard."""
        return {heard.name: len(heard.active) for heard in self._active}

    def hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Measure an output; called after each forward pass of a layer, with gradients switched off."""
        outputs = [output] if isinstance(output, Tensor) else [x for _, x in tensors_in(output)]
        self._order[name] = self._order.get(name, False) or any(x.requires_grad for x in outputs)
        if self.wiring is not None:
            self.wiring.hear(name, module, inputs, output)
        for x in outputs:
            if is_measurable(x) and x.dim() and not x.is_complex():
                if torch.is_autocast_enabled(x.device.type):
                    with torch.autocast(x.device.type, enabled=False):
                        self._measure(name, module, x)
                else:
                    self._measure(name, module, x)

    def tell(self, more: Sequence[Tensor] = ()) -> Heard:
        """What was heard since :meth:`begin`, which is called again.

        Args:
            more: further 0-dimensional numbers that are to come with it.
        """
        host = _Reader(self._fetch(more))
        sums = host.take(len(self._pieces) * COLUMNS).reshape(-1, COLUMNS)
        exact = host.take(len(self._exact) * MEASURED).reshape(-1, MEASURED)
        free, variances = self._read_norms(host)
        units = self._read_units(host, sums)
        bins = {name: [int(count) for count in host.take(len(counts))] for name, counts in self._bins.items()}
        varied = dict(zip(self._varied, host.take(len(self._varied)).tolist(), strict=True))
        rows = [complete_sketches(sums, np.array([float(size) for _, size in self._pieces])), free]
        if self._exact:
            rows.insert(1, complete(exact, np.array([float(size) for _, size, _ in self._exact])))
        places = [*(place for place, _ in self._pieces), *(place for place, *_ in self._exact)]
        places += [self._places[norm.name] for norm in self._norms]
        pooled = pool(np.concatenate(rows), places, len(self._places))
        told = Heard(pooled, units, variances, varied, self._order, bins, host.rest())
        self.begin()
        return told

    def _measure(self, name: str, module: nn.Module, x: Tensor) -> None:
        asked = isinstance(module, _BatchNorm) and self._ask(name, module, x)
        if asked and name not in self.binned:
            return
        x = x.detach()
        x = x.to_local() if hasattr(x, "to_local") else x  # a DTensor: this rank's shard
        if name in self.binned:
            counts = bin_counts(x).to(wide_dtype(x.device))
            self._bins[name] = counts + self._bins[name] if name in self._bins else counts
            if asked:
                return
        place, size = self._places[name], x.numel()
        if self.wiring is not None and isinstance(module, WEIGHTED) and x.dim() > 1 and size:
            self._varied[name] = _over_samples(x, -1 if isinstance(module, nn.Linear) else 1)
        careful = name in self.careful or x.dtype == torch.float64 or x.device != self._device
        if careful:
            self._exact.append((place, size, measure(x)))
        x = x if x.dtype == torch.float32 else x.float()
        kind, first = self._kinds.get(name) if size else None, len(self._pieces)
        told = kind is not None and kind[0].name == "relu"  # active is what is not 0
        if not careful:
            self._pieces += [(place, held) for held in sketch(x, self._slots, zeros=not told)]
        if kind is not None:
            active, samples = active_counts(x, *kind), x.shape[0] if x.dim() > 1 else 1
            rows = range(first, len(self._pieces) if told else first)
            self._active.append(Active(name, active, size // len(active), samples, rows))

    def _ask(self, name: str, module: _BatchNorm, output: Tensor) -> bool:
        """Let a BatchNorm layer in training say what it computed anyway."""
        saved = saved_statistics(output)
        if saved is None:
            return False
        mean, inverse = saved
        gamma: Tensor | None = module.weight
        beta: Tensor | None = module.bias
        parts = [mean, inverse]
        if gamma is not None or beta is not None:
            parts.append(torch.ones_like(mean) if gamma is None else gamma)
            parts.append(torch.zeros_like(mean) if beta is None else beta)
        # A copy: when the numbers are put together, the optimizer has moved γ and β.
        self._norms.append(Norm(name, output.numel(), len(mean), module.eps, torch.cat(parts).detach()))
        return True

    def _fetch(self, more: Sequence[Tensor]) -> Rows:
        parts = [*self._slots.taken(), *(values for *_, values in self._exact)]
        parts += [norm.vector for norm in self._norms]
        parts += [heard.active for heard in self._active]
        parts += self._bins.values()
        for single in (list(self._varied.values()), list(more)):
            if single:
                parts.append(torch.stack(self._here(single)))
        if not parts:
            return np.zeros(0)
        return torch.cat(self._here(parts)).cpu().double().numpy()

    def _here(self, tensors: list[Tensor]) -> list[Tensor]:
        return [x if x.device == self._device else x.to(self._device, non_blocking=True) for x in tensors]

    def _read_norms(self, host: _Reader) -> tuple[Rows, dict[str, float]]:
        """Rows of which mean and variance are known, and range and zeros are not; and median batch variances."""
        rows, variances = blank(len(self._norms)), {}
        for row, norm in zip(rows, self._norms, strict=True):
            mean, inverse, *affine = host.take(len(norm.vector)).reshape(-1, norm.channels)
            gamma, beta = affine or (np.ones(norm.channels), np.zeros(norm.channels))
            total, spread = output_moments(mean, inverse, gamma, beta, norm.eps)
            row[COUNT], row[MEAN], row[M2] = norm.size, total, spread * norm.size
            middle = float(np.sort(inverse)[norm.channels // 2])
            variances[norm.name] = 1 / middle**2 - norm.eps if middle else math.inf
        return rows, variances

    def _read_units(self, host: _Reader, sums: Rows) -> dict[str, Units]:
        """Units by layer; and the rows of ReLU are told how many values are not 0."""
        found: dict[str, Units] = {}
        for heard in self._active:
            active = host.take(len(heard.active))
            left = active.sum()
            for row in heard.rows:
                sums[row, NONZERO] = min(left, self._pieces[row][1])
                left -= sums[row, NONZERO]
            units, known = Units(active, heard.values, heard.samples), found.get(heard.name)
            found[heard.name] = known + units if known is not None and len(known.active) == len(active) else units
        return found


class _Reader:
    """Takes numbers off the front."""

    def __init__(self, numbers: Rows) -> None:
        self._numbers, self._at = numbers, 0

    def take(self, count: int) -> Rows:
        self._at += count
        return self._numbers[self._at - count : self._at]

    def rest(self) -> list[float]:
        return list(map(float, self._numbers[self._at :]))


def _over_samples(x: Tensor, axis: int) -> Tensor:
    """Root of the mean over units of their variances over samples and positions."""
    axis = axis % x.dim()
    dims = [other for other in range(x.dim()) if other != axis]
    return x.double().var(dims, correction=0).mean().sqrt() if x.device.type != "mps" else x.float().std()
