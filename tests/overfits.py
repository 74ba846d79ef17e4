# SPDX-License-Identifier: Apache-2.0
"""Small fits whose illness is known: overfitting through γ and β, through all weights, stale statistics, or none."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import BatchNormMonitor, find_batchnorm

FEATURES, CLASSES, NOISE = 16, 4, 0.6
DRIVEN, ELSEWHERE, NONE, UNKNOWN = (
    "affine-driven-overfitting",
    "overfitting-elsewhere",
    "no-overfitting",
    "not-assessed",
)
STATISTICS = "wrong-running-statistics"
VERDICTS = (DRIVEN, "shared-overfitting", ELSEWHERE, NONE, UNKNOWN, STATISTICS)


def sets(size=48, noise=NOISE, validation=240, seed=0):
    """A linear teacher's labels; ``noise`` of those to train on are drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size + validation, FEATURES, generator=generator)
    y = (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(1)
    drawn = torch.randint(CLASSES, (size,), generator=generator)
    y[:size] = torch.where(torch.rand(size, generator=generator) < noise, drawn, y[:size])
    return TensorDataset(x[:size], y[:size]), TensorDataset(x[size:], y[size:])


def loaders(size=48, noise=NOISE, validation=240, *, batch=8, val_batch=64, seed=0):
    """Loaders of :func:`sets` for training, shuffled, and for validation."""
    training, valid = sets(size, noise, validation, seed)
    return DataLoader(training, batch, shuffle=True, drop_last=True), DataLoader(valid, val_batch)


def net(width=64, depth=2, momentum=0.1):
    """Linear, BatchNorm, ReLU, ``depth`` times, and a linear head."""
    layers = []
    for place in range(depth):
        layers += [nn.Linear(width if place else FEATURES, width), nn.BatchNorm1d(width, momentum=momentum), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


class Overfits(LightningModule):
    """Learns noisy labels by heart, through all weights; with few samples it overfits within a dozen epochs."""

    def __init__(self, network=None, lr=0.01):
        super().__init__()
        self.net, self.lr, self.loss = network or net(), lr, nn.CrossEntropyLoss()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        return self.report(self.loss(self(batch[0]), batch[1]))

    def report(self, loss):
        """Log the validation loss."""
        self.log("val_loss", loss)

    def configure_optimizers(self):
        return torch.optim.Adam([x for x in self.parameters() if x.requires_grad], self.lr)


class ThroughAffine(Overfits):
    """The same with γ and β alone trained."""

    def __init__(self):
        super().__init__(net(width=128, depth=3), lr=0.1)
        affine = {id(x) for layer in find_batchnorm(self).values() for x in layer.parameters()}
        for x in self.parameters():
            x.requires_grad_(id(x) in affine)


def run(trainer, build=Overfits, data=None, **options):
    """Build a model from the seed, and train it."""
    seed_everything(0)
    model = build()
    trainer.fit(model, *(data or loaders()), **options)
    return model


def verdict(monitor: BatchNormMonitor):
    """What a monitor says of overfitting and of running statistics, in this order."""
    return [finding.rule for finding in monitor.findings if finding.rule in VERDICTS]
