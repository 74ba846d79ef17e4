# SPDX-License-Identifier: Apache-2.0
"""How far the γ and β of BatchNorm layers have moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_bn.stats.moments import wide_dtype

TINY = 1e-6  # a γ this small, root mean square, is a deliberate zero start and no unit to measure in


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


def scale_of(gamma: Tensor) -> Tensor:
    """The unit in which drift is measured: ‖γ‖, or √C where γ starts at zero on purpose.

    Args:
        gamma: ``(C,)``.

    Returns:
        scalar, the dtype of ``gamma``. √C is the norm of the usual start γ = 1.
    """
    root = gamma.new_tensor(float(gamma.numel())).sqrt()
    norm = torch.linalg.vector_norm(gamma)
    return torch.where(norm > TINY * root, norm, root)


def drift(now: Sequence[Affine], start: Sequence[Affine]) -> Tensor:
    """Relative distance of γ and β from a start, layer by layer.

    Args:
        now: present values, one for each layer.
        start: values to compare with, same order and shapes.

    Returns:
        ``(layers, 2)``, float32: ‖γ − γ₀‖/s and ‖β − β₀‖/s with s = ‖γ₀‖ (√C where γ₀ = 0). Both are in
        the unit of γ₀, since β adds to what γ scales. Nothing is read on the host.

    Example:
        >>> one, moved = torch.ones(4), torch.full((4,), 1.5)
        >>> drift([Affine(moved, torch.zeros(4))], [Affine(one, torch.zeros(4))])
        tensor([[0.5000, 0.0000]])
    """
    rows = []
    for here, there in zip(now, start, strict=True):
        unit = scale_of(there.gamma.float())
        gamma = torch.linalg.vector_norm(here.gamma.float() - there.gamma.float()) / unit
        beta = torch.linalg.vector_norm(here.beta.float() - there.beta.float()) / unit
        rows.append(torch.stack([gamma, beta]))
    return torch.stack(rows)


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
class Scale:
    """What a BatchNorm layer does behind the normalisation.

    Args:
        gamma: ``(C,)`` or None for 1.
        beta: ``(C,)`` or None for 0.
        eps: its ε.
    """

    gamma: Tensor | None
    beta: Tensor | None
    eps: float


def batch_statistics(output: Tensor, eps: float) -> Batch | None:
    """Batch mean and variance that a BatchNorm layer left in the autograd graph: nothing is computed again.

    To be called before the backward pass frees the graph, best in a forward hook.

    Args:
        output: what the layer put out, ``(N, C, *)``.
        eps: the layer's ε.

    Returns:
        ``(C,)`` each, float32, without a graph; over all ranks for SyncBatchNorm. None where the graph does not hold
        them: in eval mode, without gradients, under ``torch.compile``, and within hooks on saved tensors
        (checkpointing), where a look would compute the layer again.

    Example:
        >>> norm, x = torch.nn.BatchNorm1d(1), torch.tensor([[0.0], [2.0]])
        >>> batch_statistics(norm(x), norm.eps).mean.tolist()
        [1.0]
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
    if mean is None or mean.numel() == 0:  # eval mode
        return None
    mean, inverse = mean.detach(), inverse.detach()
    return Batch(mean, inverse.square().reciprocal() - eps)


def batch_statistics_from_running(before: Batch, after: Batch, *, factor: float, count: int) -> Batch:
    """Batch statistics from what one training forward pass did to the running ones.

    Args:
        before: running mean and (unbiased) running variance before the pass.
        after: the same after it.
        factor: weight of the new value: the layer's momentum, or 1 / batches seen where that is None.
        count: values per channel of the batch, N·H·W, at least 2.

    Returns:
        Batch mean and biased variance, ``(C,)`` each. Of several passes between the two looks: their exponentially
        weighted mean, if ``factor`` is 1 − (1 − momentum)^k.

    Raises:
        ValueError: where ``factor`` is not positive or ``count`` below 2.
    """
    if not factor > 0 or count < 2:  # noqa: PLR2004  (one value has no variance)
        raise ValueError(f"factor must be positive and count at least 2, got {factor} and {count}")
    mean = before.mean + (after.mean - before.mean) / factor
    var = (before.var + (after.var - before.var) / factor) * ((count - 1) / count)
    return Batch(mean, var)


def output_moments(batches: Sequence[Batch], layers: Sequence[Scale]) -> Tensor:
    """Mean and variance of the whole output of BatchNorm layers in training, all layers in the same few operations.

    They follow from γ, β and the batch variance v: each channel has mean β and variance γ²·v/(v + ε), and as many
    values as every other (Ioffe & Szegedy 2015, alg. 1).

    Args:
        batches: what each layer computed from its batch; all on one device.
        layers: γ, β and ε of each.

    Returns:
        ``(layers, 2)``: mean and biased variance over all values, float64 (float32 on MPS). No host read.
    """
    wide, sizes = wide_dtype(batches[0].var.device), [len(batch.var) for batch in batches]
    var = torch.cat([batch.var for batch in batches]).to(wide)
    eps = _spread([layer.eps for layer in layers], sizes, var)
    gamma = torch.cat([_or(layer.gamma, batch.var, 1.0) for layer, batch in zip(layers, batches, strict=True)]).to(wide)
    beta = torch.cat([_or(layer.beta, batch.var, 0.0) for layer, batch in zip(layers, batches, strict=True)]).to(wide)
    # A variance beyond float32 leaves (x - mean) · 0: the channel is constant. NaN stays NaN.
    scale = gamma.square() * torch.where(var == torch.inf, 0.0, var.clamp(min=0) / (var + eps))
    trouble = torch.cat([batch.mean for batch in batches]).to(wide) * 0  # NaN where a value was not finite
    flat = torch.stack([beta + trouble, scale + beta.square()])
    if len(set(sizes)) == 1:
        mean, square = flat.view(2, len(sizes), -1).mean(2)
    else:
        mean, square = torch.stack([part.mean(1) for part in torch.split(flat, sizes, dim=1)], dim=1)
    return torch.stack([mean, (square - mean.square()).clamp(min=0)], dim=1)


def _spread(values: Sequence[float], sizes: Sequence[int], like: Tensor) -> Tensor | float:
    """One value a layer, for each of its channels."""
    if len(set(values)) == 1:
        return values[0]
    return torch.cat([like.new_full((size,), value) for value, size in zip(values, sizes, strict=True)])


def _or(values: Tensor | None, like: Tensor, default: float) -> Tensor:
    return torch.full_like(like, default) if values is None else values.detach().to(like.dtype)
