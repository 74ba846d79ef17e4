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
Layout = tuple[tuple[str, int], ...]
"""Layers whose channels lie one after the other, with their numbers of channels."""
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
        self._before: dict[str, Saved] = {}
        self._now: dict[str, Saved] = {}
        self._sums: dict[Layout, Sums] = {}
        self._batch, self._measured = 1, 0
        self._tracked: dict[str, Tensor] = {}  # batches that each layer had seen when this one began
        self._calls: dict[str, int] = {}
        self._repeated: dict[str, Tensor] = {}

    def begin_batch(self) -> bool:
        """Another batch begins; says whether it is to be heard."""
        self._batch += 1
        if self._is_heard:
            self.hidden.begin()
        return self._is_heard

    def end_batch(self) -> bool:
        """The batch is over; says whether it was heard."""
        if not self._is_heard:
            return False
        self._measured += self.is_second
        self.end_step(second=self.is_second)
        return True

    @property
    def is_second(self) -> bool:
        """Whether this batch makes a pair with the one before."""
        return self._batch % EVERY == 1

    @property
    def _is_heard(self) -> bool:
        return self._batch % EVERY < 2 and self._measured < MOST_PAIRS  # noqa: PLR2004  (a pair)

    @contextmanager
    def listening(self, hear: Hear) -> Iterator[None]:
        """Have the layers heard while the block lasts.

        Args:
            hear: is called for each output, and is to call :meth:`hear`.
        """
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

    def latest(self) -> Mapping[str, Saved]:
        """What was heard of this batch, which is over, and read off the layers that are compiled."""
        self._now |= self.hidden.end()
        return self._now

    def end_step(self, *, second: bool) -> None:
        """The step is over.

        Args:
            second: whether it makes a pair with the one before.
        """
        if second:
            self._add_pairs()
        self._before, self._now = {} if second else self._now, {}
        names = [name for name in self._calls if name in self._tracked]
        now = [x for name in names if (x := self.layers[name].num_batches_tracked) is not None]
        if names and len(now) == len(names):
            more = torch._foreach_sub(now, [self._tracked[name] for name in names])  # noqa: SLF001  (no public name)
            torch._foreach_sub_(more, [self._calls[name] for name in names])
            for name, x in zip(names, more, strict=True):
                self._repeated[name] = self._repeated[name].add_(x) if name in self._repeated else x
        self._calls = {}

    def _add_pairs(self) -> None:
        """Add the pairs that the layers of this batch make with those of the one before, all layers at once."""
        groups: dict[torch.device, list[str]] = {}
        for name, here in self._now.items():
            there = self._before.get(name)
            if there is not None and there.inverse.shape == here.inverse.shape:
                groups.setdefault(here.inverse.device, []).append(name)
        for names in groups.values():
            layout = tuple((name, len(self._now[name].inverse)) for name in names)
            s, before = (variances([batch[name] for name in names]).sqrt_() for batch in (self._now, self._before))
            both = s * before > 0
            apart, total = torch.where(both, (s - before).square_(), 0.0), torch.where(both, s + before, 0.0)
            if layout in self._sums:
                sums = self._sums[layout]
                sums.apart.add_(apart)
                sums.total.add_(total)
                sums.pairs += 1
            else:
                self._sums[layout] = Sums(apart, total, 1)

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
