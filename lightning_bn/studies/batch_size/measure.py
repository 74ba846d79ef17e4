# SPDX-License-Identifier: Apache-2.0
"""BatchNorm against GroupNorm and LayerNorm by batch size, with the effective samples that BatchNorm normalises by."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from statistics import median
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_bn.callbacks.noise import Noise, effective
from lightning_bn.demo import DigitsData, DigitsMLP, DigitsResNet
from lightning_bn.demo.models import Norm
from lightning_bn.precise import precise_statistics
from lightning_bn.stats.batchnorm import Affine, drift
from lightning_bn.studies.batch_size.figure import draw
from lightning_bn.studies.batch_size.report import summary, tables
from lightning_bn.studies.batch_size.rows import ACCUMULATED, BATCHES, FEWER, SAME, USUAL
from lightning_bn.studies.batch_size.verdicts import verdicts
from lightning_bn.studies.starts import Digits
from lightning_bn.studies.study import Row, Setting, Study, Value

IMAGES = 400
EPOCHS = {"mlp": 25, "conv": 15}
RATES = {"mlp": 3e-3, "conv": 5e-3}
NORMS: tuple[Norm, ...] = ("batch", "group", "layer")


class Score(NamedTuple):
    """Mean cross-entropy and accuracy on the validation images."""

    loss: float
    accuracy: float


def settings(seeds: Sequence[int]) -> list[Setting]:
    """All runs of a seed, those with small batches first, as they take longest."""
    runs: list[Setting] = []
    for seed in seeds:
        for batch in BATCHES:
            norms = NORMS if batch in FEWER else NORMS[:2]
            runs += [_setting(network, norm, batch, seed) for network in ("conv", "mlp") for norm in norms]
            runs += [_setting("mlp", norm, batch, seed, rule="same") for norm in NORMS[:2] if batch in SAME]
        batch, accumulate = ACCUMULATED
        runs += [_setting("conv", "batch", batch, seed, accumulate=accumulate)]
        runs += [_setting("mlp", norm, batch, seed, accumulate=accumulate) for norm in NORMS[:2]]
    return runs


def _setting(network: str, norm: str, batch: int, seed: int, *, accumulate: int = 1, rule: str = "root") -> Setting:
    row: dict[str, Value] = {"network": network, "norm": norm, "batch": batch, "accumulate": accumulate}
    return {**row, "rule": rule, "seed": seed}


def measure(setting: Setting) -> Row:
    """Train one network and evaluate it with the running statistics and with re-estimated ones."""
    network, batch, seed = str(setting["network"]), int(setting["batch"] or 0), int(setting["seed"] or 0)
    accumulate, data = int(setting["accumulate"] or 1), digits(seed)
    torch.manual_seed(seed)
    net = network_of(network, cast("Norm", setting["norm"]))
    start, noise = affine_of(net), Noise(net)
    rate = RATES[network] * ((batch * accumulate / USUAL) ** 0.5 if setting["rule"] == "root" else 1)
    losses = train(net, noise, data, batch=batch, accumulate=accumulate, rate=rate, epochs=EPOCHS[network], seed=seed)
    found = score(net.eval(), data)
    moved = drift(affine_of(net), start)
    row: Row = {"rate": rate, "train_loss": losses, "val_loss": found.loss, "val_acc": found.accuracy}
    row |= {"gamma_mean": torch.cat([layer.gamma for layer in affine_of(net)]).mean().item()}
    row |= {"gamma_drift": moved[:, 0].median().item(), "beta_drift": moved[:, 1].median().item()}
    row |= batchnorm_only(net, noise, data, batch) if setting["norm"] == "batch" else dict.fromkeys(BATCHNORM_ONLY)
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}


BATCHNORM_ONLY = (
    "m_eff",
    "m_eff_min",
    "pairs",
    "precise_loss",
    "precise_acc",
    "whole_loss",
    "batch_loss",
)
"""Columns that only BatchNorm has: effective samples, and the validation loss with other statistics."""


def batchnorm_only(net: nn.Module, noise: Noise, data: Digits, batch: int) -> Row:
    """How noisy the batch statistics were, and the validation loss with re-estimated ones and with the batch's own."""
    samples, pairs = effective(noise.to_plain())
    with precise_statistics(net, torch.split(data.images, batch)).applied(net):
        precise = score(net, data)
    with precise_statistics(net, [data.images]).applied(net):
        whole = score(net, data)
    values = (median(samples.values()), min(samples.values()), pairs, *precise, whole.loss)
    return dict(zip(BATCHNORM_ONLY, (*values, loss_by_batch(net, data, batch)), strict=True))


def network_of(name: str, norm: Norm) -> nn.Module:
    """The perceptron of two hidden layers of 128 units, or the residual network of one block in each of two stages."""
    return DigitsMLP(norm).net if name == "mlp" else DigitsResNet(norm, depth=1).net


def affine_of(net: nn.Module) -> list[Affine]:
    """γ and β of all normalisation layers."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
    return [Affine.of(layer.weight, layer.bias) for layer in net.modules() if isinstance(layer, kinds)]


def train(
    net: nn.Module, noise: Noise, data: Digits, *, batch: int, accumulate: int, rate: float, epochs: int, seed: int
) -> float:
    """Train by Adam with a learning rate that falls linearly to 0; an epoch ends with its last whole step.

    Args:
        net: the network.
        noise: hears the batch statistics, as in ``BatchNormMonitor``.
        data: the images.
        batch: images of a forward pass.
        accumulate: forward passes of a step.
        rate: learning rate of the first step.
        epochs: passes over the images.
        seed: of their order, which is the same for all networks.

    Returns:
        Mean training loss over the last epoch.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, fused=True)
    steps = epochs * (len(data.images) // (batch * accumulate))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    order = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        losses = []
        for rows in whole_steps(torch.randperm(len(data.images), generator=order), batch * accumulate):
            optimizer.zero_grad()
            for part in torch.split(rows, batch):
                heard = noise.begin_batch()
                with noise.listening(noise.hear) if heard else nullcontext():
                    loss = cross_entropy(net(data.images[part]), data.labels[part])
                torch.autograd.backward(loss / accumulate)
                if heard:
                    noise.end()
                losses.append(loss.detach())
            optimizer.step()
            schedule.step()
    return torch.stack(losses).mean().item()


def whole_steps(order: Tensor, size: int) -> Iterator[Tensor]:
    """The places of each step of an epoch, all of one size."""
    yield from torch.split(order[: len(order) // size * size], size)


@torch.no_grad()
def score(net: nn.Module, data: Digits) -> Score:
    """Loss and accuracy on the validation images in the mode that the network is in."""
    logits = net(data.val_images)
    right = (logits.argmax(1) == data.val_labels).float().mean().item()
    return Score(cross_entropy(logits, data.val_labels).item(), right)


@torch.no_grad()
def loss_by_batch(net: nn.Module, data: Digits, batch: int) -> float:
    """Validation loss where each batch is normalised by its own statistics, as in training."""
    net = copy.deepcopy(net).train()
    parts = whole_steps(torch.arange(len(data.val_images)), batch)
    losses = [cross_entropy(net(data.val_images[part]), data.val_labels[part]) for part in parts]
    return torch.stack(losses).mean().item()


@lru_cache(maxsize=4)
def digits(seed: int) -> Digits:
    """400 images to train on and 600 others to validate, split by a seed."""
    data = DigitsData(train_size=IMAGES, seed=seed)
    data.setup("fit")
    if data.train_set is None or data.val_set is None:
        raise RuntimeError("the digits need to be there after setup, and are not")
    return Digits(*data.train_set.tensors, *data.val_set.tensors)


STUDY = Study("batch_size", settings, measure, tables, verdicts, summary, draw, seeds=3)
