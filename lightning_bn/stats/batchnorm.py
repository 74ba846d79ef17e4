# SPDX-License-Identifier: Apache-2.0
"""How far the γ and β of BatchNorm layers have moved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import dist, hypot, sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_bn.stats.moments import Rows

CONSTANT = 10.0
"""A channel whose variance is below so many times ε says nothing about the batch."""
FEW = 2048
"""Values that Python's own arithmetic is faster for than arrays, where both begin behind many steps of training: then
arrays take five times what they do when they are called again and again."""
TINY = 1e-6  # a γ this small, root mean square, is a deliberate zero start and no unit to measure in

Norms = tuple[list[float], list[float], list[float]]
"""‖γ − γ₀‖, ‖β − β₀‖ and ‖γ₀‖ of each layer."""


@dataclass(frozen=True)
class Affine:
    """A copy of the γ and β of one layer, each ``(C,)``.

    Args:
        gamma: scale, ``module.weight``.
        beta: shift, ``module.bias``.
    """

    gamma: Tensor
    beta: Tensor

    @classmethod
    def of(cls, gamma: Tensor, beta: Tensor) -> Affine:
        """A detached copy on the same device."""
        return cls(gamma.detach().clone(), beta.detach().clone())

    def to(self, device: torch.device) -> Affine:
        """The same values on a device."""
        return Affine(self.gamma.to(device), self.beta.to(device))


def drift(now: Sequence[Affine], start: Sequence[Affine]) -> Tensor:
    """Relative distance of γ and β from a start, layer by layer; one transfer brings all values to the host.

    Args:
        now: present values, one for each layer.
        start: values to compare with, same order and shapes.

    Returns:
        ``(layers, 2)``, float32, on the host: what :func:`distances` gives.

    Raises:
        ValueError: where the numbers of layers differ.

    Example:
        >>> one, moved = torch.ones(4), torch.full((4,), 1.5)
        >>> drift([Affine(moved, torch.zeros(4))], [Affine(one, torch.zeros(4))])
        tensor([[0.5000, 0.0000]])
    """
    sizes = [len(here.gamma) for here, _ in zip(now, start, strict=True)]
    return torch.tensor(distances(on_host(flat(now) + flat(start)), sizes)[0], dtype=torch.float32)


def flat(layers: Sequence[Affine]) -> list[Tensor]:
    """γ of all layers, then β of all, as they are to lie one after the other for :func:`distances`."""
    return [layer.gamma for layer in layers] + [layer.beta for layer in layers]


def on_host(parts: Sequence[Tensor]) -> Tensor:
    """All values, one after the other, in one transfer; ``(0,)`` of none.

    Args:
        parts: ``(K,)`` each, of any floating-point dtype, on any devices.
    """
    if not parts:
        return torch.zeros(0)
    # Waits where something comes from a GPU to the host.
    here = len({x.device for x in parts}) == 1
    return torch.cat(list(parts) if here else [x.to(parts[0].device) for x in parts]).cpu()


def distances(values: Tensor, sizes: Sequence[int]) -> list[list[tuple[float, float]]]:
    """Relative distance of γ and β from one or several starts, of all layers at once.

    Args:
        values: ``((1 + starts)·2·(C₁ + C₂ + ...),)`` on the host, present γ and β and those of each start, as
            :func:`flat` orders them.
        sizes: channels of each layer, C₁, C₂, ...; at least one layer.

    Returns:
        By start and layer ‖γ − γ₀‖/s and ‖β − β₀‖/s with s = ‖γ₀‖, or √C, the norm of the usual start γ = 1, where γ
        starts at zero on purpose. Both are in the unit of γ₀, since β adds to what γ scales.
    """
    norms = _norms_of_few if len(values) <= FEW else _norms_of_many
    found = []
    for gammas, betas, starts in norms(values, list(accumulate(sizes, initial=0))):
        usual = [sqrt(size) for size in sizes]
        units = [start if start > TINY * one else one for start, one in zip(starts, usual, strict=True)]
        layers = zip(gammas, betas, units, strict=True)
        found.append([(gamma / unit, beta / unit) for gamma, beta, unit in layers])
    return found


def _norms_of_few(values: Tensor, ends: Sequence[int]) -> Iterator[Norms]:
    """In Python's own arithmetic, as arrays take longer to begin with than few values need.

    Args:
        values: as in :func:`distances`.
        ends: where the layers end, and 0 in front of them.
    """
    numbers, layers = values.tolist(), len(ends) - 1
    rows = range(0, len(numbers), ends[-1])
    parts = [numbers[row + begin : row + end] for row in rows for begin, end in pairwise(ends)]
    for at in range(2 * layers, len(parts), 2 * layers):
        starts = parts[at : at + 2 * layers]
        apart = [dist(now, start) for now, start in zip(parts[: 2 * layers], starts, strict=True)]
        yield apart[:layers], apart[layers:], [hypot(*gamma) for gamma in starts[:layers]]


def _norms_of_many(values: Tensor, ends: Sequence[int]) -> Iterator[Norms]:
    """The same with arrays."""
    affine = values.double().numpy().reshape(-1, 2, ends[-1])
    with np.errstate(invalid="ignore"):  # infinite values
        for start in affine[1:]:
            squares = np.square(np.concatenate([start - affine[0], start[:1]]))
            gammas, betas, units = np.sqrt(np.add.reduceat(squares, ends[:-1], axis=1)).tolist()
            yield gammas, betas, units


@dataclass(frozen=True)
class Batch:
    """What a BatchNorm layer computed from its batch in a training forward pass.

    Args:
        mean: batch mean of the input, ``(C,)``.
        var: biased batch variance of the input, ``(C,)``.
    """

    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class Saved:
    """What a BatchNorm layer normalised by, as it keeps it for its backward pass.

    Args:
        mean: batch mean of the input, ``(C,)``.
        inverse: 1/√(v + ε), ``(C,)``, v being the biased batch variance of the input.
        eps: the layer's ε.
    """

    mean: Tensor
    inverse: Tensor
    eps: float

    def batch(self) -> Batch:
        """Mean and variance; the variance is 0 where it is below ten ε, and the channel as good as constant."""
        return Batch(self.mean, variances([self]))


def variances(layers: Sequence[Saved]) -> Tensor:
    """Batch variances of the channels of many layers, one after the other; nothing is read on the host.

    Args:
        layers: at least one, on the same device.

    Returns:
        ``(C₁ + C₂ + ...,)``, biased; 0 where a channel is as good as constant: below ten ε, or not finite.
    """
    inverse = torch.cat([layer.inverse for layer in layers])
    eps: float | Tensor = layers[0].eps
    if any(layer.eps != eps for layer in layers):
        eps = torch.cat([torch.full_like(layer.inverse, layer.eps) for layer in layers])
    var = inverse.square().reciprocal_().sub_(eps)
    return torch.where(var > CONSTANT * eps, var, 0.0)


def saved_statistics(output: Tensor) -> tuple[Tensor, Tensor] | None:
    """Batch mean and 1/√(v + ε) as a BatchNorm layer left them in the autograd graph: no operation runs.

    Args:
        output: what the layer put out, ``(N, C, *)``, before the backward pass frees the graph.

    Returns:
        ``(C,)`` each, float32, v being the biased batch variance; over all ranks for SyncBatchNorm. None where the
        graph does not hold them: in eval mode, without gradients, under ``torch.compile``, and within hooks on saved
        tensors (checkpointing), where a look would compute the layer again.
    """
    node = output.grad_fn
    if node is None or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:  # noqa: SLF001  (no public name)
        return None
    name = node.name()
    if name in {"NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"}:
        mean, inverse = node._saved_result1, node._saved_result2  # type: ignore[attr-defined]  # noqa: SLF001  (torch's own name)
    elif name == "SyncBatchNormBackward":
        mean, inverse = node.saved_tensors[2:4]  # type: ignore[attr-defined]
    else:
        return None
    return None if mean is None or mean.numel() == 0 else (mean, inverse)  # empty in eval mode


def batch_statistics(output: Tensor, eps: float) -> Batch | None:
    """Batch mean and variance that a BatchNorm layer left in the autograd graph: nothing is computed again.

    To be called before the backward pass frees the graph, best in a forward hook.

    Args:
        output: what the layer put out, ``(N, C, *)``.
        eps: the layer's ε.

    Returns:
        ``(C,)`` each, float32, without a graph; None where :func:`saved_statistics` finds none.

    Example:
        >>> norm, x = torch.nn.BatchNorm1d(1), torch.tensor([[0.0], [2.0]])
        >>> batch_statistics(norm(x), norm.eps).mean.tolist()
        [1.0]
    """
    saved = saved_statistics(output)
    if saved is None:
        return None
    mean, inverse = (value.detach() for value in saved)
    return Batch(mean, inverse.square().reciprocal() - eps)


def batch_statistics_from_running(before: Batch, after: Batch, *, factor: float, count: int | None) -> Batch:
    """Batch statistics from what one training forward pass did to the running ones.

    Args:
        before: running mean and (unbiased) running variance before the pass.
        after: the same after it.
        factor: weight of the new value: the layer's momentum, or 1 / batches seen where that is None.
        count: values per channel of the batch, N·H·W, at least 2; None where not known: the variance is then unbiased.

    Returns:
        Batch mean and biased variance, ``(C,)`` each. Of several passes between the two looks: their exponentially
        weighted mean, if ``factor`` is 1 − (1 − momentum)^k.

    Raises:
        ValueError: where ``factor`` is not positive or ``count`` below 2.
    """
    if not factor > 0 or (count is not None and count < 2):  # noqa: PLR2004  (one value has no variance)
        raise ValueError(f"factor must be positive and count at least 2, got {factor} and {count}")
    mean = before.mean + (after.mean - before.mean) / factor
    var = before.var + (after.var - before.var) / factor
    return Batch(mean, var if count is None else var * ((count - 1) / count))


class Passed(NamedTuple):
    """What a BatchNorm layer made of a batch.

    Args:
        mean: mean of all values that it put out; NaN where a value of its input was not finite.
        var: their biased variance; likewise.
        median: over channels, of the biased batch variance of its input; the upper one of two in the middle.
    """

    mean: float
    var: float
    median: float


def output_moments(values: Rows, eps: Sequence[float]) -> list[Passed]:
    """Moments of the whole outputs of BatchNorm layers in training, from what they normalised by.

    Each channel has mean β and variance γ²·v/(v + ε) = γ² - ε·(γ·r)² with r = 1/√(v + ε), v being the biased batch
    variance of the input, and as many values as every other (Ioffe & Szegedy 2015, alg. 1).

    Args:
        values: ``(layers, 4, C)``, on the host, C at least 1: batch mean of the input, r, γ and β. Written to.
        eps: ε of each layer.

    Returns:
        One entry for each layer.
    """
    with np.errstate(all="ignore"):
        ordered = np.sort(values[:, 1], -1)
        if not ordered[:, 0].all():  # a variance beyond float32 leaves (x - mean) · 0: the channel is constant
            values[:, 2] *= values[:, 1] != 0
        values[:, 1] *= values[:, 2]
        sums, squares = values.sum(-1).tolist(), np.square(values).sum(-1).tolist()
    channels, found = values.shape[-1], []
    middles = ordered[:, channels // 2].tolist()
    for (means, _, _, betas), (_, cut, gammas, shifts), middle, e in zip(sums, squares, middles, eps, strict=True):
        mean = betas / channels if math.isfinite(means) else math.nan
        var = max((gammas - e * cut + shifts) / channels - mean * mean, 0.0) if mean == mean else math.nan  # noqa: PLR0124
        found.append(Passed(mean, var, 1 / middle**2 - e if middle else math.inf))
    return found
