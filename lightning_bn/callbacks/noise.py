# SPDX-License-Identifier: Apache-2.0
"""How noisy the batch statistics of BatchNorm layers are: their standard deviation in pairs of successive steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks.hidden_batches import CONSTANT, HiddenBatches
from lightning_bn.findings import Finding
from lightning_bn.norms import find_batchnorm
from lightning_bn.rules.noisy_batch_statistics import noisy_batch_statistics
from lightning_bn.rules.statistics_updated_twice import statistics_updated_twice
from lightning_bn.stats.attribution import effective_samples
from lightning_bn.stats.batchnorm import Batch, saved_statistics
from lightning_bn.stats.finite import is_measurable
from lightning_bn.taps import COMPILED, Hear, listen, reachable, tensors_in

EVERY, MOST_PAIRS = 10, 64
"""Two of so many batches are measured, until there are so many pairs."""


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
        self._before: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._pairs: dict[str, int] = {}
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
        self._tracked = {name: x.clone() for name, x in counters.items() if x is not None}
        with listen(self.layers, hear):
            yield

    def hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Keep the batch standard deviation of one call; nothing is read on the host."""
        self.take(name, module, inputs, output)

    def take(self, name: str, module: nn.Module, inputs: Any, output: Any) -> Batch | None:
        """The same as :meth:`hear`, for who wants to see what was heard.

        Returns:
            Mean and variance that the layer normalised by, the variance 0 where a channel is constant; None where they
            are not known, or not of the first call.
        """
        if module.training:
            self._calls[name] = self._calls.get(name, 0) + 1
        if name in self._now or not isinstance(module, _BatchNorm) or not module.training:
            return None
        found = _statistics(module, inputs, output)
        if found is not None:
            self._now[name] = found.var.sqrt()
        return found

    def take_hidden(self) -> dict[str, Batch]:
        """The same of the layers that are compiled, when the batch is over."""
        found = self.hidden.end()
        self._now |= {name: batch.var.sqrt() for name, batch in found.items()}
        return found

    def end_step(self, *, second: bool) -> None:
        """The step is over.

        Args:
            second: whether it makes a pair with the one before.
        """
        for name, here in self._now.items():
            there = self._before.get(name) if second else None
            if there is not None and there.shape == here.shape:
                both = (here > 0) & (there > 0)
                zero = torch.zeros_like(here)
                apart = torch.where(both, (here - there).square(), zero)
                middle = torch.where(both, (here + there) / 2, zero)
                apart_before, middle_before = self._sums.get(name, (zero, zero))
                self._sums[name] = (apart_before + apart, middle_before + middle)
                self._pairs[name] = self._pairs.get(name, 0) + 1
        self._before, self._now = {} if second else self._now, {}
        for name, calls in self._calls.items():
            counter = self.layers[name].num_batches_tracked
            if counter is not None and name in self._tracked:
                more = counter - self._tracked[name] - calls
                self._repeated[name] = self._repeated.get(name, torch.zeros_like(more)) + more
        self._calls = {}

    def forget(self) -> None:
        """Drop a step that was broken off."""
        self._before, self._now, self._calls = {}, {}, {}

    @property
    def repeated(self) -> dict[str, int]:
        """By layer how often it updated its running statistics without a call of its own; reads the host."""
        return {name: int(count) for name, count in self._repeated.items() if int(count) > 0}

    def momentum(self, name: str) -> float | None:
        """That of a layer."""
        return self.layers[name].momentum

    def to_plain(self) -> dict[str, tuple[list[float], list[float], int]]:
        """Sums on the host, which add over processes; reads the host."""
        return {
            name: (apart.double().tolist(), middle.double().tolist(), self._pairs[name])
            for name, (apart, middle) in self._sums.items()
        }


def effective(*ranks: Mapping[str, tuple[list[float], list[float], int]]) -> tuple[dict[str, float], int]:
    """m_eff by layer from the sums of all processes, and the largest number of pairs of any layer."""
    found, most = {}, 0
    for name in dict.fromkeys(name for sums in ranks for name in sums):
        parts = [sums[name] for sums in ranks if name in sums]
        apart, middle = (np.sum([part[place] for part in parts], axis=0) for place in (0, 1))
        pairs = sum(part[2] for part in parts)
        found[name], most = effective_samples(apart, middle, pairs), max(most, pairs)
    return found, most


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


def _statistics(module: _BatchNorm, inputs: Any, output: Any) -> Batch | None:
    """Mean and biased variance of each channel of the batch, ``(C,)``; the variance is 0 where it is constant."""
    saved = saved_statistics(output) if isinstance(output, Tensor) else None
    if saved is not None:
        mean, var = saved[0].detach(), saved[1].detach().square().reciprocal() - module.eps
    else:  # under checkpointing, or without gradients
        x = next((x for _, x in tensors_in(inputs)), None)
        if x is None or not is_measurable(x) or x.dim() < 2 or not x.numel():  # noqa: PLR2004  (no batch axis)
            return None
        var, mean = torch.var_mean(x.detach().float(), [axis for axis in range(x.dim()) if axis != 1], correction=0)
    return Batch(mean, torch.where(var > CONSTANT * module.eps, var, torch.zeros_like(var)))
