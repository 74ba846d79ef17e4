# SPDX-License-Identifier: Apache-2.0
"""Whether the processes of a fit normalise by statistics of different data: sums of each, and their comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.rules.statistics_differ_between_ranks import Apart
from lightning_bn.stats.batchnorm import Batch

Numbers = NDArray[np.float64]
FEWEST = 8
"""Pairs of steps below which the noise of a mean is not known."""


class Share(NamedTuple):
    """What one process has of one layer. Values are means and standard deviations of its C channels, ``(2C,)``.

    Args:
        values: mean over the batches that were heard.
        var: mean of the biased batch variances, ``(C,)``; 0 where a channel was ever constant.
        noise: variance of the values of one batch, by pairs of successive steps, ``(2C,)``.
        stored: the same of the running statistics.
        batches: batches behind ``values``.
        weight: variance of ``stored`` in units of ``noise``; see :func:`memory`.
    """

    values: Numbers
    var: Numbers
    noise: Numbers
    stored: Numbers
    batches: int
    weight: float


class BetweenRanks:
    """Sums of the batch statistics of this process; they lie on the device and do not grow."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # values, squared differences of pairs, variances
        self._varied: dict[str, Tensor] = {}  # (C,) channels that were never constant
        self._counts: dict[str, tuple[int, int]] = {}
        self._before: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}

    def add(self, name: str, batch: Batch, *, second: bool) -> None:
        """Take in what one layer normalised by; nothing is read on the host.

        Args:
            name: the layer.
            batch: its batch statistics, the variance 0 where a channel is constant.
            second: whether the batch makes a pair with the one before.
        """
        self._now[name] = here = torch.cat([batch.mean, batch.var.sqrt()])
        there = self._before.get(name) if second else None
        apart = torch.zeros_like(here) if there is None else (here - there).square()
        found, varied = (here, apart, batch.var), batch.var > 0
        batches, pairs = self._counts.get(name, (0, 0))
        if batches:
            values, differences, var = self._sums[name]
            found = (values + here, differences + apart, var + batch.var)
            varied = varied & self._varied[name]
        self._sums[name], self._varied[name] = found, varied
        self._counts[name] = (batches + 1, pairs + (there is not None))

    def end_step(self) -> None:
        """The step is over."""
        self._before, self._now = self._now, {}

    def to_plain(self, layers: Mapping[str, _BatchNorm]) -> dict[str, Share]:
        """What this process has, on the host; reads the host.

        Args:
            layers: the layers by name.
        """
        return {
            name: self._share(name, layers[name])
            for name, (_, pairs) in self._counts.items()
            if pairs >= FEWEST and layers[name].running_mean is not None
        }

    def _share(self, name: str, layer: _BatchNorm) -> Share:
        values, apart, var = (_plain(x) for x in self._sums[name])
        batches, pairs = self._counts[name]
        stored = [_plain(x) for x in (layer.running_mean, layer.running_var) if x is not None]
        return Share(
            values / batches,
            np.where(self._varied[name].cpu().numpy(), var / batches, 0.0),
            apart / (2 * pairs),
            np.concatenate([stored[0], np.sqrt(stored[1])]),
            batches,
            memory(layer.momentum, batches),
        )


def memory(momentum: float | None, batches: int) -> float:
    """Variance of a running mean in units of that of a batch mean: m/(2 − m), the sum of all m²(1 − m)^(2k).

    Args:
        momentum: m; None for the plain mean of all batches.
        batches: number of these, at least.

    Example:
        >>> memory(1.0, 8), memory(None, 8)
        (1.0, 0.125)
    """
    return 1 / batches if momentum is None else momentum / (2 - momentum)


def compare(ranks: Sequence[Mapping[str, Share]]) -> dict[str, Apart]:
    """How far the processes are apart, layer by layer.

    Args:
        ranks: what each has, in the order of ranks, at least two.

    Returns:
        One entry for each layer that all have with as many channels, if one of these was never constant.
    """
    found = {}
    for name in ranks[0]:
        shares = [rank[name] for rank in ranks if name in rank]
        if len(shares) < len(ranks) or len({share.var.shape for share in shares}) > 1:
            continue
        within = np.mean([share.var for share in shares], axis=0)
        counted = np.all([share.var > 0 for share in shares], axis=0)
        if not counted.any():
            continue
        noise = np.mean([share.noise / share.batches for share in shares], axis=0)
        kept = np.mean([share.noise * share.weight for share in shares], axis=0)
        scale = (np.tile(within, 2), np.tile(counted, 2))
        data = distance([share.values for share in shares], noise, *scale)
        found[name] = Apart(*data, *distance([share.stored for share in shares], kept, *scale))
    return found


def distance(
    values: Sequence[Numbers], noise: Numbers, within: Numbers, counted: NDArray[np.bool_]
) -> tuple[float, float]:
    """Root mean square distance of the processes from their mean, in standard deviations within a process.

    The distance between two normal distributions is √((μ − μ′)² + (σ − σ′)²), the 2-Wasserstein one. Of R processes,
    the variance between them Σ(v_r − mean)²/(R − 1) of a mean or standard deviation v has the expectation of what noise
    alone makes of v where all draw from the same data; what is above that is no noise.

    Args:
        values: of each process the means and standard deviations, ``(2C,)``.
        noise: variance of each value by noise alone, ``(2C,)``.
        within: variance within a process, ``(2C,)``.
        counted: values that count, ``(2C,)``.

    Returns:
        The distance, √(2·mean((s² − noise)/within)·(R − 1)/R), s² being the variance between the processes, and 0 where
        that is negative; and the factor by which mean(s²/within) is larger than noise makes it.

    Example:
        >>> one, none = np.ones(2), np.zeros(2)
        >>> distance([np.array([0.0, 1.0]), np.array([1.0, 1.0])], none, one, one > 0)
        (0.5, inf)
    """
    number = len(values)
    with np.errstate(invalid="ignore"):
        between = float(np.mean(np.var(np.stack(values), axis=0, ddof=1)[counted] / within[counted]))
    usual = float(np.mean(noise[counted] / within[counted]))
    times = between / usual if usual else math.inf if between else 1.0
    return math.sqrt(max(2 * (between - usual) * (number - 1) / number, 0.0)), times


def _plain(values: Tensor) -> Numbers:
    found: Numbers = values.detach().double().cpu().numpy()
    return found
