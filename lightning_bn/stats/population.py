# SPDX-License-Identifier: Apache-2.0
"""Mean and variance of each channel over any number of batches, from sums that add exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from lightning_bn.stats.moments import wide_dtype


@dataclass(frozen=True)
class Population:
    """What is known of the values of each channel.

    Args:
        count: values per channel, N·H·W summed over all batches.
        mean: their mean, ``(C,)``, float64 (float32 on MPS).
        m2: sum of their squared deviations from the mean, ``(C,)``, likewise.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """Biased variance (divided by ``count``), ``(C,)``: what normalisation divides by."""
        return self.m2 / self.count

    @property
    def unbiased_var(self) -> Tensor:
        """Unbiased variance (divided by ``count − 1``), ``(C,)``: what ``running_var`` holds; 0 for a single value."""
        return self.m2 / max(self.count - 1, 1)

    @property
    def is_finite(self) -> bool:
        """Whether no value was NaN or infinite, nor their variance beyond the range; reads the host."""
        return bool((self.mean.isfinite() & self.m2.isfinite()).all())

    def cpu(self) -> Population:
        """The same on the host."""
        return Population(self.count, self.mean.cpu(), self.m2.cpu())


@dataclass(frozen=True)
class Distance:
    """How far the running statistics of a layer are from those of a population, root mean square over channels.

    Args:
        mean: |running mean − μ| in standard deviations √(σ² + ε).
        log_var: |ln((running variance + ε) / (σ² + ε))|; 0.1 is about ten per cent.
    """

    mean: float
    log_var: float


def population_of(x: Tensor) -> Population:
    """Mean and variance of one batch, as BatchNorm computes them.

    Args:
        x: real floating-point tensor ``(N, C, *)``, at least one value per channel. float16 and bfloat16 are widened
            to float32 first.

    Returns:
        The sums on the device of ``x``. Nothing is read on the host.

    Example:
        >>> population_of(torch.tensor([[1.0], [3.0]])).mean
        tensor([2.], dtype=torch.float64)
    """
    x, wide = x.detach(), wide_dtype(x.device)
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    channels = x.shape[1]
    count = x.numel() // channels
    if count == 1:  # F.batch_norm refuses
        return Population(1, x.reshape(channels).to(wide), x.new_zeros(channels, dtype=wide))
    mean, var = x.new_zeros(channels), x.new_zeros(channels)
    # With momentum 1 the running statistics are those of this batch, at a fraction of what var_mean takes on a CPU.
    nn.functional.batch_norm(x, mean, var, training=True, momentum=1.0)
    return Population(count, mean.to(wide), var.to(wide) * (count - 1))


def pool(a: Population, b: Population) -> Population:
    """Pool two populations exactly: Chan, Golub & LeVeque 1983, eq. 2.1.

    Args:
        a: one part.
        b: the other, same channels and device.

    Returns:
        The sums over the values of both. No difference of large squares is taken, so that nothing cancels.
    """
    count = a.count + b.count
    share = b.count / count
    delta = b.mean - a.mean
    return Population(count, a.mean + delta * share, a.m2 + b.m2 + delta.square() * (a.count * share))


def pooled(parts: Iterable[Population]) -> Population:
    """Pool at least one population, from left to right."""
    return reduce(pool, parts)


def distance(running_mean: Tensor, running_var: Tensor, population: Population, eps: float) -> Distance:
    """How far running statistics are from those of a population.

    Args:
        running_mean: ``(C,)``.
        running_var: ``(C,)``, unbiased, as F.batch_norm keeps it.
        population: what they are an estimate of.
        eps: the layer's ε, which also keeps a channel without spread from counting.

    Returns:
        Root mean squares over the channels; NaN where anything is not finite. Reads the host.

    Example:
        >>> still = Population(2, torch.zeros(1), torch.ones(1))
        >>> distance(torch.tensor([0.5]), torch.ones(1), still, 0.0)
        Distance(mean=0.5, log_var=0.0)
    """
    mean, var = population.mean, population.unbiased_var + eps
    shift = (running_mean.to(mean) - mean) / var.sqrt()
    ratio = ((running_var.to(mean) + eps) / var).log()
    rows = torch.stack([shift, ratio]).square().mean(1).sqrt().tolist()
    return Distance(*rows)
