# SPDX-License-Identifier: Apache-2.0
"""How far the γ and β of BatchNorm layers have moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
