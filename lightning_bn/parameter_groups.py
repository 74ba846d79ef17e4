# SPDX-License-Identifier: Apache-2.0
"""What the parameter groups of optimizers train of a model: γ and β, weights, and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam

from lightning_bn.norms import find_batchnorm


@dataclass(frozen=True)
class Group:
    """One parameter group of an optimizer.

    Args:
        optimizer: name of the optimizer's class.
        lr: learning rate before any schedule; None where the group has none.
        decay: weight decay.
        law: how the decay acts: ``adamw`` on the parameter itself, beside a step of Adam; ``adam`` and ``sgd`` through
            the gradient that such an optimizer uses; empty for any other optimizer.
        momentum: momentum of ``sgd``.
        affine: number of γ and β values that it trains.
        weights: number of values of weight matrices and kernels that it trains.
        other: number of all other values that it trains.
        layers: BatchNorm layers whose γ it trains, by path.
    """

    optimizer: str
    lr: float | None
    decay: float = 0.0
    law: str = ""
    momentum: float = 0.0
    affine: int = 0
    weights: int = 0
    other: int = 0
    layers: tuple[str, ...] = ()


def groups_of(model: nn.Module, optimizers: Iterable[Optimizer]) -> list[Group]:
    """The parameter groups of all optimizers, each with what it trains of a model."""
    homes = {id(layer.weight): name for name, layer in find_batchnorm(model).items() if layer.weight is not None}
    affine = {id(x) for layer in find_batchnorm(model).values() for x in layer.parameters(recurse=False)}
    return [_group(optimizer, group, homes, affine) for optimizer in optimizers for group in optimizer.param_groups]


def trained(model: nn.Module, optimizers: Sequence[Optimizer]) -> set[int] | None:
    """Ids of the parameters of a model that an optimizer holds; None where none holds any, as under sharding."""
    held = {id(x) for optimizer in optimizers for group in optimizer.param_groups for x in group["params"]}
    mine = {id(x) for x in model.parameters()} & held
    return mine or None


def _group(optimizer: Optimizer, group: Mapping[str, Any], homes: Mapping[int, str], affine: set[int]) -> Group:
    mine = [x for x in group["params"] if x.requires_grad and not is_lazy(x)]
    weights = sum(x.numel() for x in mine if id(x) not in affine and x.dim() > 1)
    scale = sum(x.numel() for x in mine if id(x) in affine)
    lr = group.get("initial_lr", group.get("lr"))
    return Group(
        type(optimizer).__name__,
        None if lr is None else float(lr),
        float(group.get("weight_decay") or 0),
        _law(optimizer, group),
        float(group.get("momentum") or 0),
        affine=scale,
        weights=weights,
        other=sum(x.numel() for x in mine) - weights - scale,
        layers=tuple(homes[id(x)] for x in mine if id(x) in homes),
    )


def _law(optimizer: Optimizer, group: Mapping[str, Any]) -> str:
    if isinstance(optimizer, SGD):
        return "sgd"
    if not isinstance(optimizer, Adam | AdamW | NAdam | RAdam):
        return ""
    return "adamw" if isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay") else "adam"
