# SPDX-License-Identifier: Apache-2.0
"""Units of an activation layer that pass no gradient: dead ones of ReLU, saturated ones of tanh and sigmoid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TANH, SIGMOID, SOFTSIGN = 0.99, 0.49, 0.9
"""Where a squashed value counts as saturated: |tanh| > 0.99 and sigmoid beyond 0.01 or 0.99 pass less than 4 % of the
gradient that they pass at 0; a softsign of 0.9 passes 1 %."""
RARELY = 0.01
"""A unit that passes gradient for less than this share of its values is saturated."""

Passes = Callable[[Tensor], Tensor]
"""1 where the unit passes gradient, 0 where it passes none; values in, values of the same shape and dtype out."""


@dataclass(frozen=True)
class Kind:
    """What an activation module does to the gradient, as far as its output tells.

    Args:
        name: its name in the field.
        bounded: whether it saturates at both ends; otherwise it is dead at one.
        passes: tells values that pass gradient from those that do not. NaN passes none.
    """

    name: str
    bounded: bool
    passes: Passes


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of an activation module; None where the output does not tell the gradient, as for GELU.

    Example:
        >>> kind_of(nn.ReLU()).name, kind_of(nn.GELU())
        ('relu', None)
    """
    if isinstance(module, nn.Hardtanh):
        low, high = module.min_val, module.max_val
        name = "relu6" if isinstance(module, nn.ReLU6) else "hardtanh"
        return Kind(name, name == "hardtanh", lambda y: ((y > low) & (y < high)).to(y.dtype))
    return next((kind for plain, kind in _KINDS.items() if isinstance(module, plain)), None)


_KINDS: dict[type[nn.Module], Kind] = {
    nn.ReLU: Kind("relu", False, torch.sign),  # no value is below 0
    nn.Tanh: Kind("tanh", True, lambda y: (y.abs() <= TANH).to(y.dtype)),
    nn.Sigmoid: Kind("sigmoid", True, lambda y: ((y - 0.5).abs() <= SIGMOID).to(y.dtype)),
    nn.Hardsigmoid: Kind("hardsigmoid", True, lambda y: ((y > 0) & (y < 1)).to(y.dtype)),
    nn.Softsign: Kind("softsign", True, lambda y: (y.abs() <= SOFTSIGN).to(y.dtype)),
}


def active_counts(y: Tensor, kind: Kind, axis: int) -> Tensor:
    """How many values of each unit pass gradient.

    Args:
        y: float32 output of the activation, ``(N, C, *)`` or ``(N, *, C)``, without a graph.
        kind: the activation.
        axis: 1 or -1, where C is; tensors of one dimension are one unit each.

    Returns:
        ``(C,)``, on the device of ``y``. Nothing is read on the host.
    """
    if y.dim() < 2:  # noqa: PLR2004  (no batch axis)
        return kind.passes(y.reshape(1, -1)).sum(0)
    axis = axis % y.dim()
    return kind.passes(y).sum([other for other in range(y.dim()) if other != axis])
