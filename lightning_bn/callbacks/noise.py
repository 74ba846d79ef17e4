# SPDX-License-Identifier: Apache-2.0
"""How noisy the batch statistics of BatchNorm layers are: their standard deviation in pairs of successive steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks.hidden_batches import HiddenBatches
from lightning_bn.findings import Finding
from lightning_bn.norms import find_batchnorm
from lightning_bn.rules.noisy_batch_statistics import noisy_batch_statistics
from lightning_bn.rules.statistics_updated_twice import statistics_updated_twice
from lightning_bn.stats.attribution import effective_samples
from lightning_bn.stats.batchnorm import Saved, saved_statistics, variances
from lightning_bn.stats.finite import is_measurable
from lightning_bn.taps import COMPILED, Hear, listen, reachable, tensors_in

EVERY, MOST_PAIRS = 10, 64
"""Two of so many batches are measured, until there are so many pairs."""
QUEUE = 8
"""Pairs that are put into the sums together: the operations cost as much for one as for all of them."""
Layout = tuple[tuple[str, int], ...]
"""Layers whose channels lie one after the other, with their numbers of channels."""
Layers = Mapping[str, Saved]
"""What the layers of one batch normalised by, by name."""
Plain = dict[str, tuple[list[float], list[float], int]]
"""Sums of each layer on the host, see :meth:`Noise.to_plain`."""


@dataclass
class Sums:
    """Sums over pairs, of all channels of a layout; they lie on the device.

    Args:
        apart: of (s − s′)².
        total: of s + s′; 0 where a channel was constant.
        pairs: number of pairs.
    """

    apart: Tensor
    total: Tensor
    pairs: int


class Noise:
    """Follows the batch standard deviation of each channel; sums lie on the device and do not grow.

    A pair is two steps in a row, so that the weights are almost the same. Of several calls in a step, or several
    micro-batches, the first counts.

    Args:
        model: the network.
        compiled: whether it is compiled as a whole. The statistics of layers that are compiled come from what the step
            did to the running ones.
    """

    def __init__(self, model: nn.Module, *, compiled: bool = False) -> None:
        seen, unseen = ({}, {}) if compiled else reachable(model)
        layers = find_batchnorm(model)
        self.layers = {name: layer for name, layer in layers.items() if name in seen}
        """BatchNorm layers that hooks reach, by name."""
        hidden = {name: layer for name, layer in layers.items() if compiled or unseen.get(name) == COMPILED}
        self.hidden = HiddenBatches(hidden)
        self.is_second = False
        """Whether the present batch makes a pair with the one before."""
        self._before: Layers = {}
        self._now: dict[str, Saved] = {}
        self._queue: list[tuple[Layers, Layers]] = []
        self._sums: dict[Layout, Sums] = {}
        self._batch, self._measured = 1, 0
        self._tracked: dict[str, Tensor] = {}  # batches that each layer had seen when this one began
        self._calls: dict[str, int] = {}
        self._repeated: dict[str, Tensor] = {}

    def begin_batch(self) -> bool:
        """Another batch begins; says whether it is to be heard, which two of :data:`EVERY` are."""
        self._batch += 1
        place = self._batch % EVERY
        return place < 2 and self.begin(second=place == 1)  # noqa: PLR2004  (a pair)

    def begin(self, *, second: bool) -> bool:
        """A batch begins that may be heard; says whether it is to be, as there are not enough pairs yet.

        Args:
            second: whether it makes a pair with the one before.
        """
        if self._measured >= MOST_PAIRS:
            return False
        self.is_second = second
        self.hidden.begin()
        return True

    @contextmanager
    def listening(self, hear: Hear) -> Iterator[None]:
        """Have the layers heard while the block lasts.

        Args:
            hear: is called for each output, and is to call :meth:`hear`.
        """
        self._tracked = {}
        if self.is_second:  # one batch of a pair tells whether backward calls the layers again
            counters = {name: layer.num_batches_tracked for name, layer in self.layers.items()}
            known = {name: x for name, x in counters.items() if x is not None}
            copies = torch._foreach_add(list(known.values()), 0) if known else []  # noqa: SLF001  (no public name)
            self._tracked = dict(zip(known, copies, strict=True))
        with listen(self.layers, hear):
            yield

    def hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Keep what a layer normalised by in its first call; nothing is read on the host."""
        if not module.training:
            return
        self._calls[name] = self._calls.get(name, 0) + 1
        if name not in self._now and isinstance(module, _BatchNorm):
            found = _statistics(module, inputs, output)
            if found is not None:
                self._now[name] = found

    def latest(self) -> Layers:
        """What was heard of this batch, which is over, and read off the layers that are compiled."""
        self._now |= self.hidden.end()
        return self._now

    def end(self) -> None:
        """The batch that was heard is over."""
        if self.is_second:
            self._measured += 1
            self._queue.append((self._before, self._now))
            if len(self._queue) >= QUEUE:
                self._add_pairs()
            self._count_updates()
        self._before, self._now, self._calls = {} if self.is_second else self._now, {}, {}

    def _count_updates(self) -> None:
        """Add up how often each layer updated its statistics more than it was called."""
        names = [name for name in self._calls if name in self._tracked]
        now = [x for name in names if (x := self.layers[name].num_batches_tracked) is not None]
        if not names or len(now) != len(names):
            return
        more = torch._foreach_sub(now, [self._tracked[name] for name in names])  # noqa: SLF001  (no public name)
        torch._foreach_sub_(more, [self._calls[name] for name in names])
        for name, x in zip(names, more, strict=True):
            self._repeated[name] = self._repeated[name].add_(x) if name in self._repeated else x

    def _add_pairs(self) -> None:
        """Put the pairs that wait into the sums, all layers and pairs of one layout at once."""
        groups: dict[Layout, list[tuple[Layers, Layers]]] = {}
        for before, now in self._queue:
            for layout in _layouts(before, now):
                groups.setdefault(layout, []).append((before, now))
        self._queue = []
        for layout, pairs in groups.items():
            s, then = (_deviations(layout, [pair[place] for pair in pairs]) for place in (1, 0))
            both = s * then > 0
            apart = torch.where(both, (s - then).square_(), 0.0).sum(0)
            total = torch.where(both, s + then, 0.0).sum(0)
            known = self._sums.get(layout, Sums(torch.zeros_like(apart), torch.zeros_like(total), 0))
            self._sums[layout] = Sums(known.apart + apart, known.total + total, known.pairs + len(pairs))

    @property
    def repeated(self) -> dict[str, int]:
        """By layer how often it updated its running statistics without a call of its own; reads the host."""
        return {name: int(count) for name, count in self._repeated.items() if int(count) > 0}

    def momentum(self, name: str) -> float | None:
        """That of a layer."""
        return self.layers[name].momentum

    def to_plain(self) -> Plain:
        """By layer the sums over pairs of (s − s′)² and of (s + s′)/2, ``(C,)`` each, and pairs; reads the host.

        They add over processes.
        """
        self._add_pairs()
        return _added([part for layout, sums in self._sums.items() for part in _parts(layout, sums)])


def effective(*ranks: Plain) -> tuple[dict[str, float], int]:
    """m_eff by layer from the sums of all processes, and the largest number of pairs of any layer."""
    sums = _added([(name, *rank[name]) for rank in ranks for name in rank])
    found = {
        name: effective_samples(np.array(apart), np.array(middle), pairs)
        for name, (apart, middle, pairs) in sums.items()
    }
    return found, max((pairs for *_, pairs in sums.values()), default=0)


def of_noise(found: Mapping[str, float], pairs: int, noise: Noise) -> Iterator[Finding | None]:
    """Judge what was measured; reads the host.

    Args:
        found: m_eff by layer.
        pairs: pairs of steps behind it.
        noise: what was heard on this process.
    """
    yield noisy_batch_statistics(found, pairs)
    repeated = noise.repeated
    yield statistics_updated_twice(repeated, noise.momentum(next(iter(repeated))) if repeated else None)


def _layouts(before: Layers, now: Layers) -> list[Layout]:
    """The layers that two batches have in common, device by device."""
    groups: dict[torch.device, list[tuple[str, int]]] = {}
    for name, here in now.items():
        there = before.get(name)
        if there is not None and there.inverse.shape == here.inverse.shape:
            groups.setdefault(here.inverse.device, []).append((name, len(here.inverse)))
    return [tuple(group) for group in groups.values()]


def _deviations(layout: Layout, batches: Sequence[Layers]) -> Tensor:
    """Standard deviations of all channels of a layout, ``(batches, C₁ + C₂ + ...)``."""
    found = variances([batch[name] for batch in batches for name, _ in layout])
    return found.sqrt_().view(len(batches), -1)


def _parts(layout: Layout, sums: Sums) -> Iterator[tuple[str, list[float], list[float], int]]:
    sizes = [size for _, size in layout]
    apart, total = (torch.split(x.double().cpu(), sizes) for x in (sums.apart, sums.total))
    for (name, _), mine, both in zip(layout, apart, total, strict=True):
        yield name, mine.tolist(), (both / 2).tolist(), sums.pairs


def _added(parts: Sequence[tuple[str, list[float], list[float], int]]) -> Plain:
    """The sums of each layer, which several layouts or processes may have."""
    found: Plain = {}
    for name in dict.fromkeys(name for name, *_ in parts):
        mine = [part for part in parts if part[0] == name]
        apart, middle = (np.sum([part[place] for part in mine], axis=0).tolist() for place in (1, 2))
        found[name] = apart, middle, sum(part[3] for part in mine)
    return found


def _statistics(module: _BatchNorm, inputs: Any, output: Any) -> Saved | None:
    """What a layer normalised by, from its graph or computed again where that does not hold it."""
    saved = saved_statistics(output) if isinstance(output, Tensor) else None
    if saved is not None:
        return Saved(saved[0].detach(), saved[1].detach(), module.eps)
    # Under checkpointing, or without gradients.
    x = next((x for _, x in tensors_in(inputs)), None)
    if x is None or not is_measurable(x) or x.dim() < 2 or not x.numel():  # noqa: PLR2004  (no batch axis)
        return None
    var, mean = torch.var_mean(x.detach().float(), [axis for axis in range(x.dim()) if axis != 1], correction=0)
    return Saved(mean, (var + module.eps).rsqrt(), module.eps)
