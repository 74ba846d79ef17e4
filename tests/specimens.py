# SPDX-License-Identifier: Apache-2.0
"""Networks with one known illness each, and a healthy twin."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES, WIDTH = 12, 4, 16


def loader(size=32, batch_size=8, features=FEATURES, seed=0, plant=None):
    """A shuffled-free loader of normal inputs and random labels; ``plant`` may change the inputs in place."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, features, generator=generator)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    if plant:
        plant(inputs)
    return DataLoader(TensorDataset(inputs, labels), batch_size)


def network(norm=True, depth=2, width=WIDTH):
    """Linear, BatchNorm, ReLU, ``depth`` times, and a linear head."""
    layers = []
    for place in range(depth):
        layers += [
            nn.Linear(width if place else FEATURES, width),
            *([nn.BatchNorm1d(width)] if norm else []),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


class Healthy(LightningModule):
    """Trains, validates and logs as most projects do."""

    def __init__(self, net=None, lr=1e-2):
        super().__init__()
        self.net = net or network()
        self.loss = nn.CrossEntropyLoss()
        self.lr = lr

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class BuiltInSetup(Healthy):
    """Builds its layers in ``setup``."""

    def __init__(self):
        super().__init__()
        self.net = None

    def setup(self, stage):
        self.net = self.net or network()


class BuiltInConfigureModel(BuiltInSetup):
    """Builds its layers in ``configure_model``."""

    def setup(self, stage):
        pass

    def configure_model(self):
        self.net = self.net or network()


class LogOfNegative(nn.Module):
    """A module that turns finite inputs into NaN."""

    def forward(self, x):
        return torch.log(-x.abs() - 1)


class BetweenModules(nn.Module):
    """Its own code, between two submodules, makes NaN: the second one is the victim."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.after(torch.log(-self.before(x).abs()))


def with_module(module):
    """A network with a module planted between its hidden layer and its head."""
    return nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), module, nn.Linear(WIDTH, CLASSES))


class LogOfZeroInLoss(Healthy):
    """Every module is finite; the loss takes log(0)."""

    def training_step(self, batch, batch_idx):
        p = torch.softmax(self(batch[0]), 1)
        p = torch.cat([torch.zeros_like(p[:, :1]), p[:, 1:]], 1)
        return -(torch.log(p) * nn.functional.one_hot(batch[1], CLASSES)).sum()


class MaskedAttention(nn.Module):
    """Healthy: scores are masked with -inf on purpose, in a module of their own."""

    class Mask(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((WIDTH, WIDTH), float("-inf")).triu(1))

        def forward(self, scores):
            return scores + self.mask

    def __init__(self):
        super().__init__()
        self.mask = self.Mask()
        self.softmax = nn.Softmax(-1)

    def forward(self, x):
        scores = x.unsqueeze(2) * x.unsqueeze(1)
        return (self.softmax(self.mask(scores)) @ x.unsqueeze(2)).squeeze(2)


class MaskedLabels(Healthy):
    """Healthy: missing targets are NaN in the batch and masked in the loss."""

    def training_step(self, batch, batch_idx):
        x = torch.nan_to_num(batch[0])
        return self.loss(self(x), batch[1])


def variance_overflow():
    """A first weight so large that BatchNorm's variance overflows: the output is constant and finite."""
    net = network()
    with torch.no_grad():
        net[0].weight.mul_(1e20)
    return net


class NoHostRead(TorchDispatchMode):
    """Raises as soon as a value is brought to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value was read on the host")
        return func(*args, **(kwargs or {}))
