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

from lightning_bn.norms import find_batchnorm
from lightning_bn.stats.attribution import effective_samples
from lightning_bn.stats.batchnorm import saved_statistics
from lightning_bn.stats.finite import is_measurable
from lightning_bn.taps import Hear, listen, reachable, tensors_in

CONSTANT = 10.0
"""A channel whose variance is below so many times ε says nothing about the batch."""


class Noise:
    """Follows the batch standard deviation of each channel; sums lie on the device and do not grow.

    A pair is two steps in a row, so that the weights are almost the same. Of several calls in a step, or several
    micro-batches, the first counts.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        seen, _ = reachable(model)
        self._layers = {name: layer for name, layer in find_batchnorm(model).items() if name in seen}
        self._before: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._pairs: dict[str, int] = {}

    @contextmanager
    def listening(self, hear: Hear) -> Iterator[None]:
        """Have the layers heard while the block lasts.

        Args:
            hear: is called for each output, and is to call :meth:`hear`.
        """
        with listen(self._layers, hear):
            yield

    def hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Keep the batch standard deviation of one call; nothing is read on the host."""
        if name not in self._now and isinstance(module, _BatchNorm) and module.training:
            found = _deviation(module, inputs, output)
            if found is not None:
                self._now[name] = found

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

    def forget(self) -> None:
        """Drop a step that was broken off."""
        self._before, self._now = {}, {}

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


def _deviation(module: _BatchNorm, inputs: Any, output: Any) -> Tensor | None:
    """Batch standard deviation of each channel, ``(C,)``; 0 where it is constant."""
    saved = saved_statistics(output) if isinstance(output, Tensor) else None
    if saved is not None:
        var = saved[1].detach().square().reciprocal() - module.eps
    else:  # under checkpointing, or without gradients
        x = next((x for _, x in tensors_in(inputs)), None)
        if x is None or not is_measurable(x) or x.dim() < 2 or not x.numel():  # noqa: PLR2004  (no batch axis)
            return None
        var = x.detach().float().var([axis for axis in range(x.dim()) if axis != 1], correction=0)
    return torch.where(var > CONSTANT * module.eps, var, torch.zeros_like(var)).sqrt()
