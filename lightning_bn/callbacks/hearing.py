# SPDX-License-Identifier: Apache-2.0
"""What one due step of the activation monitor hears: moments of each layer, and active values of each unit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks.wiring import WEIGHTED, Wiring
from lightning_bn.stats.batchnorm import Batch, Scale, batch_statistics, output_moments
from lightning_bn.stats.finite import is_measurable
from lightning_bn.stats.moments import COUNT, M2, MEAN, blank, complete, measure, pool_into
from lightning_bn.stats.sketch import PIECE, complete_sketches, sketch
from lightning_bn.stats.units import Kind, active_counts
from lightning_bn.taps import tensors_in


@dataclass
class Units:
    """Units of one layer in one step, or over a window of steps.

    Args:
        active: active values of each unit, ``(C,)``, on the device.
        values: values of each unit.
        samples: samples of the batches, the length of the first axis.
    """

    active: Tensor
    values: int
    samples: int


class Hearing:
    """Collects the numbers of one due step; nothing is read on the host before :meth:`finish`, nor by it.

    Args:
        layers: module by name, in the order of the rows.
        kinds: of those, the activations whose units are counted, with the axis of their channels.
        careful: layers whose spread would be lost in plain sums; all of them are measured in two passes.
        device: where the pooled rows lie.
        wiring: follows the tensors from module to module, in the first step of a run; None in all others.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        kinds: Mapping[str, tuple[Kind, int]],
        careful: Collection[str],
        device: torch.device,
        wiring: Wiring | None = None,
    ) -> None:
        self._names = list(layers)
        self._places = {name: place for place, name in enumerate(self._names)}
        self._kinds, self._careful, self._device, self._wiring = kinds, careful, device, wiring
        self._exact: list[tuple[int, int, Tensor]] = []
        self._sums: list[tuple[int, int, list[Tensor]]] = []
        self._free: list[tuple[int, int, Batch]] = []
        self._variances: dict[str, Tensor] = {}
        self._scales: dict[str, Scale] = {}
        self.varied: dict[str, Tensor] = {}
        """Of layers with weights, where the wiring is followed: spread from sample to sample, on its device."""
        self.units: dict[str, Units] = {}
        """What the activations of known kind did."""
        self.order: dict[str, bool] = {}
        """The layers in the order in which they first ran, and whether gradients of their outputs were recorded."""

    def hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Measure an output; called after each forward pass of a layer, with gradients switched off."""
        self.order[name] = self.order.get(name, False) or any(x.requires_grad for _, x in tensors_in(output))
        if self._wiring is not None:
            self._wiring.hear(name, module, inputs, output)
        for _, x in [("", output)] if isinstance(output, Tensor) else tensors_in(output):
            if is_measurable(x) and x.dim() and not x.is_complex():
                if torch.is_autocast_enabled(x.device.type):
                    with torch.autocast(x.device.type, enabled=False):
                        self._measure(name, module, x)
                else:
                    self._measure(name, module, x)

    def finish(self) -> Tensor:
        """The pooled rows of all layers, ``(layers, 7)``."""
        state = blank(len(self._places), self._device)
        heard = [(place, size) for part in (self._exact, self._sums, self._free) for place, size, *_ in part]
        if not heard:
            return state
        places, sizes = zip(*heard, strict=True)
        counts = torch.tensor(sizes, dtype=state.dtype).to(self._device, non_blocking=True)
        exact, sums, free = torch.split(counts, [len(self._exact), len(self._sums), len(self._free)])
        rows = []
        if self._exact:
            rows.append(complete(self._stack([row.to(state.dtype) for *_, row in self._exact]), exact))
        if self._sums:
            values = self._stack([value for *_, row in self._sums for value in row])
            rows.append(complete_sketches(values.view(len(sums), -1), sums))
        if self._free:
            batches = [batch for *_, batch in self._free]
            scales = [self._scales[self._names[place]] for place, *_ in self._free]
            rows.append(_free_rows(output_moments(batches, scales), free).to(state))
        if len(set(places)) == len(places):
            at = torch.tensor(places).to(self._device, non_blocking=True)
            state.index_copy_(0, at, torch.cat(rows))
        else:
            pool_into(state, places, torch.cat(rows))
        self._exact, self._sums, self._free = [], [], []
        return state

    def variances(self) -> dict[str, Tensor]:
        """Median over channels of the batch variance in front of each BatchNorm layer, on its device."""
        return {name: var.median() for name, var in self._variances.items()}

    def _stack(self, values: list[Tensor]) -> Tensor:
        """Values of one shape, on the device of the state."""
        if any(value.device != self._device for value in values):
            values = [value.to(self._device, non_blocking=True) for value in values]
        return torch.stack(values)

    def _measure(self, name: str, module: nn.Module, x: Tensor) -> None:
        place, size = self._places[name], x.numel()
        if isinstance(module, _BatchNorm) and self._read_batchnorm(name, module, x):
            return
        x = x.detach()
        x = x.to_local() if hasattr(x, "to_local") else x  # a DTensor: this rank's shard
        if self._wiring is not None and isinstance(module, WEIGHTED) and x.dim() > 1 and size:
            self.varied[name] = _over_samples(x, -1 if isinstance(module, nn.Linear) else 1)
        kind = self._kinds.get(name)
        active = None
        if kind is not None and size:
            active = active_counts(x if x.dtype == torch.float32 else x.float(), *kind)
            self._count(name, active, x)
        if name in self._careful or x.dtype == torch.float64:
            self._exact.append((place, size, measure(x)))
            return
        x = x if x.dtype == torch.float32 else x.float()
        nonzero = active.sum() if active is not None and kind is not None and kind[0].name == "relu" else None
        pieces = sketch(x, zeros=nonzero is None)
        for number, sums in enumerate(pieces):
            if nonzero is not None:  # of the whole tensor, said with its first piece
                sums.append(nonzero if number == 0 else torch.zeros_like(nonzero))
            held = min(PIECE, size - number * PIECE) if len(pieces) > 1 else size
            self._sums.append((place, held, sums))

    def _count(self, name: str, active: Tensor, x: Tensor) -> None:
        now = Units(active, x.numel() // active.numel(), x.shape[0] if x.dim() > 1 else 1)
        known = self.units.get(name)
        if known is not None and known.active.shape == active.shape:  # called again, or the next micro-batch
            now = Units(known.active + active, known.values + now.values, known.samples + now.samples)
        self.units[name] = now

    def _read_batchnorm(self, name: str, module: _BatchNorm, output: Tensor) -> bool:
        batch = batch_statistics(output, module.eps)
        if batch is None or batch.var.device != self._device:
            return False
        self._variances[name] = batch.var
        # Copies: when the numbers are put together, the optimizer has moved γ and β.
        self._scales[name] = Scale(_copy(module.weight), _copy(module.bias), module.eps)
        self._free.append((self._places[name], output.numel(), batch))
        return True


def _copy(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().clone()


def _over_samples(x: Tensor, axis: int) -> Tensor:
    """Root of the mean over units of their variances over samples and positions."""
    axis = axis % x.dim()
    dims = [other for other in range(x.dim()) if other != axis]
    return x.double().var(dims, correction=0).mean().sqrt() if x.device.type != "mps" else x.float().std()


def _free_rows(pairs: Tensor, counts: Tensor) -> Tensor:
    """Rows of which mean and variance are known, ``(K, 2)``, and range and zeros are not."""
    rows = blank(len(pairs), pairs.device)
    rows[:, COUNT], rows[:, MEAN] = counts.to(rows), pairs[:, 0]
    rows[:, M2] = pairs[:, 1] * rows[:, COUNT]
    return rows
