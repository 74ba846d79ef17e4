# SPDX-License-Identifier: Apache-2.0
"""Perceptrons with BatchNorm in some places or in all, and how far a training turns their weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_bn.demo.data import CLASSES
from lightning_bn.demo.models import PIXELS
from lightning_bn.studies.seeds import mean
from lightning_bn.studies.starts import BATCH, LN_C, OPTIMIZERS, Digits, rounded, train
from lightning_bn.studies.study import Row

WIDTH = 128


def network(*, depth: int, gap: int = 1, first: bool = False, last: bool = False) -> nn.Sequential:
    """A perceptron with ReLU on the digits.

    Args:
        depth: hidden layers of ``WIDTH`` units.
        gap: BatchNorm stands behind every so manieth of them; 0 for none.
        first: whether one stands on the input as well.
        last: whether one stands behind the last layer as well.
    """
    layers: list[nn.Module] = [nn.Flatten(), *([nn.BatchNorm1d(PIXELS)] if first else [])]
    for place in range(1, depth + 1):
        layers.append(nn.Linear(PIXELS if place == 1 else WIDTH, WIDTH))
        layers += [nn.BatchNorm1d(WIDTH)] if gap and place % gap == 0 else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES), *([nn.BatchNorm1d(CLASSES)] if last else []))


@torch.no_grad()
def heard(net: nn.Sequential, images: Tensor, dtype: torch.dtype) -> tuple[int | None, list[Tensor], Tensor]:
    """One forward pass: place of the first linear layer that is not finite, output of each norm, logits."""
    x, place, ends, normed = images.to(dtype), 0, None, []
    for layer in net.to(dtype).train():
        x = layer(x)
        place += isinstance(layer, nn.Linear)
        if ends is None and isinstance(layer, nn.Linear) and not bool(x.isfinite().all()):
            ends = place
        if isinstance(layer, nn.BatchNorm1d):
            normed.append(x)
    return ends, normed, x


def silence_of(norms: Sequence[nn.BatchNorm1d], outputs: Sequence[Tensor]) -> Row:
    """Shares of channels whose output is 0 for the whole batch, and of those with an infinite running variance."""
    zero = [(output == 0).all(0).float().mean().item() for output in outputs]
    infinite = [norm.running_var.isinf().float().mean().item() for norm in norms if norm.running_var is not None]
    return {"silent": rounded(mean(zero)), "running_var_inf": rounded(mean(infinite))}


def trainings(net: nn.Sequential, data: Digits, seed: int, factors: Mapping[str, float] | None = None) -> Row:
    """The first loss, and a training with each optimizer.

    Args:
        net: the network as it starts; copies of it are trained.
        data: the digits.
        seed: seed of the order of the images.
        factors: by layer, how many times wider than under He its weights were drawn. Behind a norm the gradient of a
            weight is as many times smaller, so that Adam needs a learning rate that many times larger to turn it as
            far, and SGD one that many times larger squared. None leaves all learning rates alone.
    """
    used = copy.deepcopy(net).train()
    loss = cross_entropy(used(data.images[:BATCH]), data.labels[:BATCH])
    row: Row = {"loss_ratio": rounded(loss.item() / LN_C)}
    for name in OPTIMIZERS:
        trained = copy.deepcopy(net)
        optimizer = optimizer_of(trained, name, factors or {})
        loss = cross_entropy(trained.train()(data.images[:BATCH]), data.labels[:BATCH])
        torch.autograd.backward(loss)
        optimizer.step()
        row[f"{name}_update"] = rounded(moved(net, trained))
        trained = copy.deepcopy(net)
        done = train(trained, optimizer_of(trained, name, factors or {}), data, seed=seed)
        row[name], row[f"{name}_nan_step"] = rounded(done.accuracies[-1]), done.nan_step
        row[f"{name}_change"] = rounded(moved(net, trained))
    return row


def optimizer_of(net: nn.Module, name: str, factors: Mapping[str, float]) -> torch.optim.Optimizer:
    """An optimizer whose learning rate for the weight of each named layer is raised by its factor, for SGD squared."""
    named = dict(net.named_parameters())
    optimizer = OPTIMIZERS[name]([{"params": [parameter]} for parameter in named.values()])
    for path, group in zip(named, optimizer.param_groups, strict=True):
        group["lr"] *= factors.get(path.removesuffix(".weight"), 1.0) ** (2 if name == "sgd" else 1)
    return optimizer


@torch.no_grad()
def moved(before: nn.Module, after: nn.Module) -> float:
    """How far the weights of the linear layers went, relative to their norm, in the mean over the layers."""
    pairs = zip(before.modules(), after.modules(), strict=True)
    return mean(
        [
            ((new.weight.double() - old.weight.double()).norm() / old.weight.double().norm()).item()
            for old, new in pairs
            if isinstance(old, nn.Linear) and isinstance(new, nn.Linear)
        ]
    )
