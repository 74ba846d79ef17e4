# SPDX-License-Identifier: Apache-2.0
"""What the studies of initialisation measure: the first forward pass, and a short training on the digits."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import ParamsT

from lightning_bn.demo import DigitsData
from lightning_bn.first_signal import stages
from lightning_bn.gains import followers
from lightning_bn.initialization import Report
from lightning_bn.outlook import predicted_overflow
from lightning_bn.studies.seeds import mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIMIZERS: dict[str, Callable[[ParamsT], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
}
BATCH, EPOCHS = 64, 5
LN_C = math.log(10)
CHANCE = 0.1  # accuracy of a network that knows nothing, of ten classes
TRAINED = 0.8
"""Accuracy from which a network is said to train; with a healthy start it has .95 and more after five epochs."""


class Digits(NamedTuple):
    """The digits as tensors: images ``(N, 1, 8, 8)``, standardised, and labels ``(N,)``."""

    images: Tensor
    labels: Tensor
    val_images: Tensor
    val_labels: Tensor


class FirstPass(NamedTuple):
    """What one forward pass in training mode shows.

    Args:
        ends: place of the first linear layer, counted from 1, whose output is not finite; None where all are.
        std: standard deviation of what the last linear layer gets.
        loss: mean cross-entropy, computed in float32.
    """

    ends: int | None
    std: float
    loss: float


class Training(NamedTuple):
    """What a short training shows.

    Args:
        accuracies: accuracy on the validation images after each epoch; NaN from the epoch on in which the loss is NaN.
        losses: mean loss of the training batches over each epoch, with batch statistics; NaN likewise.
        nan_step: the first step, counted from 1, whose loss is NaN; None where none is.
    """

    accuracies: list[float]
    losses: list[float]
    nan_step: int | None


@lru_cache(maxsize=8)
def digits(seed: int) -> Digits:
    """1100 images to train on and 600 others to validate, split by a seed."""
    data = DigitsData(seed=seed)
    data.setup("fit")
    if data.train_set is None or data.val_set is None:
        raise RuntimeError("the digits need to be there after setup, and are not")
    return Digits(*data.train_set.tensors, *data.val_set.tensors)


@torch.no_grad()
def first_pass(net: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> FirstPass:
    """Send images ``(N, *)`` through a network that is held in a dtype, layer by layer.

    Args:
        net: its children are the layers; they are put into training mode and the dtype, and back into float32.
        images: a batch.
        labels: its classes, ``(N,)``.
        dtype: what weights and activations are held in.
    """
    x, place, ends, std = images.to(dtype), 0, None, math.nan
    for layer in net.to(dtype).train().children():
        if isinstance(layer, nn.Linear):
            place, std = place + 1, x.double().std().item()
        x = layer(x)
        if ends is None and isinstance(layer, nn.Linear) and not bool(x.isfinite().all()):
            ends = place
    net.float()
    return FirstPass(ends, std, cross_entropy(x.float(), labels).item())


def predicted_end(model: nn.Module, report: Report, dtype: torch.dtype) -> int | None:
    """Place of the linear layer, counted from 1, whose output is predicted not to be finite, from the weights alone."""
    ahead = predicted_overflow(stages(model, report, followers(model)), dtype)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return linear.index(ahead.layer) + 1 if ahead and ahead.layer in linear else None


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: Digits, *, seed: int) -> Training:
    """Train for ``EPOCHS`` epochs in batches of 64; a run whose loss is NaN ends there, as its weights are NaN too."""
    order = torch.Generator().manual_seed(seed)
    done, steps = Training([math.nan] * EPOCHS, [math.nan] * EPOCHS, None), 0
    for epoch in range(EPOCHS):
        net.train()
        losses = []
        for rows in torch.split(torch.randperm(len(data.images), generator=order), BATCH):
            steps += 1
            optimizer.zero_grad()
            loss = cross_entropy(net(data.images[rows]), data.labels[rows])
            if bool(loss.isnan()):
                return done._replace(nan_step=steps)
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        done.accuracies[epoch], done.losses[epoch] = accuracy(net, data), mean(losses)
    return done


@torch.no_grad()
def accuracy(net: nn.Module, data: Digits) -> float:
    """Share of the validation images that a network gets right, in evaluation mode."""
    net.eval()
    right: Tensor = net(data.val_images).argmax(1) == data.val_labels
    return right.float().mean().item()


def rounded(value: float) -> float:
    """A value to five figures: a result needs no more."""
    return float(f"{value:.5g}")
