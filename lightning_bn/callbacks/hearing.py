# SPDX-License-Identifier: Apache-2.0
"""What one due step of the activation monitor hears: moments of each layer, and active values of each unit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks.asked_norms import AskedNorms
from lightning_bn.callbacks.slopes import Slopes
from lightning_bn.callbacks.tally import Reader, Tally
from lightning_bn.callbacks.wiring import WEIGHTED, Wiring
from lightning_bn.stats.effective_rank import participation_ratio
from lightning_bn.stats.finite import is_measurable
from lightning_bn.stats.histogram import bin_counts
from lightning_bn.stats.moments import Rows, blank, pool, wide_dtype
from lightning_bn.stats.units import Kind, active_counts
from lightning_bn.taps import tensors_in


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
        rows: pooled row of each layer, ``(layers, 8)``.
        slopes: the same of the gradients with respect to the outputs, where they are followed; else ``(0, 8)``.
        units: by layer what the activations of known kind did.
        variances: by layer the median over channels of the batch variance in front of a BatchNorm layer.
        varied: of layers with weights, where the wiring is followed: spread from sample to sample.
        order: layers in the order in which they first ran, and whether gradients of their outputs were recorded.
        bins: by layer the histogram of its values, see :func:`~lightning_bn.stats.histogram.bin_counts`.
        ranks: by layer the effective rank of what it put out last, where that is wanted.
        more: the further numbers that were asked for.
    """

    rows: Rows
    slopes: Rows
    units: dict[str, Units]
    variances: dict[str, float]
    varied: dict[str, float]
    order: dict[str, bool]
    bins: dict[str, list[int]]
    ranks: dict[str, float]
    more: list[float]


class Active(NamedTuple):
    """Active values of one output on the device, and the pieces of the tally whose zeros they tell."""

    name: str
    active: Tensor
    values: int
    samples: int
    pieces: range


class Ear:
    """Collects the numbers of a due step on the device; :meth:`tell` brings them to the host, all in one transfer.

    Args:
        layers: names, in the order of the rows.
        kinds: of those, the activations whose units are counted, with the axis of their channels.
        device: where numbers are put together.
        ranked: of the layers, those whose effective rank is wanted, with the axis of their channels.
        slopes: follows the outputs into backward; None where that is not wanted.
    """

    def __init__(
        self,
        layers: Iterable[str],
        kinds: Mapping[str, tuple[Kind, int]],
        device: torch.device,
        *,
        ranked: Mapping[str, int],
        slopes: Slopes | None,
    ) -> None:
        self._places = {name: place for place, name in enumerate(layers)}
        self._kinds, self._device, self._tally = kinds, device, Tally(device)
        self._ranked, self._slopes, self._norms = ranked, slopes, AskedNorms()
        self.careful: Collection[str] = set(self._places)
        """Layers whose spread plain sums would lose, or of which nothing is known yet: measured in two passes."""
        self.wiring: Wiring | None = Wiring()
        """Follows the tensors from module to module in the first step of a run."""
        self.binned: Collection[str] = ()
        """Layers of which a histogram is wanted too."""
        self.begin()

    def begin(self) -> None:
        """Forget what was heard."""
        self._tally.clear()
        if self._slopes is not None:
            self._slopes.begin()
        self._norms.clear()
        self._active: list[Active] = []
        self._bins: dict[str, Tensor] = {}
        self._varied: dict[str, Tensor] = {}
        self._ranks: dict[str, Tensor] = {}
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
                if self._slopes is not None:
                    self._slopes.follow(name, x)

    def tell(self, more: Sequence[Tensor] = ()) -> Heard:
        """What was heard since :meth:`begin`, which is called again.

        Args:
            more: further 0-dimensional numbers that are to come with it.
        """
        host = Reader(self._fetch(more))
        self._tally.read(host)
        slopes = blank(0) if self._slopes is None else self._slopes.read(host)
        free, variances = self._norms.read(host)
        units = self._read_units(host)
        bins = {name: [int(count) for count in host.take(len(counts))] for name, counts in self._bins.items()}
        varied, ranks = host.named(self._varied), host.named(self._ranks)
        rows, places = self._tally.rows()
        places += [self._places[name] for name in self._norms.names]
        pooled = pool(np.concatenate([rows, free]), places, len(self._places))
        told = Heard(pooled, slopes, units, variances, varied, self._order, bins, ranks, host.rest())
        self.begin()
        return told

    def _measure(self, name: str, module: nn.Module, x: Tensor) -> None:
        asked = isinstance(module, _BatchNorm) and self._norms.ask(name, module, x)
        if asked and name not in self.binned:
            return
        x = x.detach()
        x = x.to_local() if hasattr(x, "to_local") else x  # a DTensor: this rank's shard
        if name in self.binned:
            counts = bin_counts(x).to(wide_dtype(x.device))
            self._bins[name] = counts + self._bins[name] if name in self._bins else counts
            if asked:
                return
        size = x.numel()
        if self.wiring is not None and isinstance(module, WEIGHTED) and x.dim() > 1 and size:
            self._varied[name] = _over_samples(x, -1 if isinstance(module, nn.Linear) else 1)
        if name in self._ranked and x.dim() > 1 and size:
            self._ranks[name] = participation_ratio(x, self._ranked[name])
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        kind = self._kinds.get(name) if size else None
        told = kind is not None and kind[0].name == "relu"  # active is what is not 0
        pieces = self._tally.add(self._places[name], x, careful=name in self.careful, zeros=not told)
        if kind is not None:
            active, samples = active_counts(x.float(), *kind), x.shape[0] if x.dim() > 1 else 1
            self._active.append(Active(name, active, size // len(active), samples, pieces if told else range(0)))

    def _fetch(self, more: Sequence[Tensor]) -> Rows:
        parts = self._tally.parts() + ([] if self._slopes is None else self._slopes.parts())
        parts += self._norms.parts()
        parts += [heard.active for heard in self._active]
        parts += self._bins.values()
        for single in (list(self._varied.values()), list(self._ranks.values()), list(more)):
            if single:
                parts.append(torch.stack(self._here(single)))
        if not parts:
            return np.zeros(0)
        return torch.cat(self._here(parts)).cpu().double().numpy()

    def _here(self, tensors: list[Tensor]) -> list[Tensor]:
        return [x if x.device == self._device else x.to(self._device, non_blocking=True) for x in tensors]

    def _read_units(self, host: Reader) -> dict[str, Units]:
        """Units by layer; and the tally is told how many values of a ReLU are not 0."""
        found: dict[str, Units] = {}
        for heard in self._active:
            active = host.take(len(heard.active))
            self._tally.count_nonzero(heard.pieces, active.sum())
            units, known = Units(active, heard.values, heard.samples), found.get(heard.name)
            found[heard.name] = known + units if known is not None and len(known.active) == len(active) else units
        return found


def _over_samples(x: Tensor, axis: int) -> Tensor:
    """Root of the mean over units of their variances over samples and positions."""
    axis = axis % x.dim()
    dims = [other for other in range(x.dim()) if other != axis]
    return x.double().var(dims, correction=0).mean().sqrt() if x.device.type != "mps" else x.float().std()
