# SPDX-License-Identifier: Apache-2.0
"""Runs of overfitting.py whose illness is known: networks, data, optimizers, and what has to be said of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (torch's own name for it)
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import TensorDataset

from lightning_bn import find_batchnorm

DRIVEN, ELSEWHERE, STATISTICS, HEALTHY, OPEN = "driven", "elsewhere", "statistics", "healthy", "open"
Sets = tuple[TensorDataset, TensorDataset]


def spoil(targets: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Draw a share of the labels anew."""
    drawn = torch.randint(classes, (len(targets),), generator=generator)
    return torch.where(torch.rand(len(targets), generator=generator) < share, drawn, targets)


def digits(seed: int, size: int, noise: float, *, images: bool = False) -> Sets:
    """scikit-learn's digits: ``size`` of 1100 to train on, 600 to validate, standardised by the 1100."""
    generator = torch.Generator().manual_seed(seed)
    loaded = load_digits()
    order = torch.randperm(len(loaded.target), generator=generator)
    x, y = torch.tensor(loaded.data, dtype=torch.float32)[order], torch.tensor(loaded.target)[order]
    mean, std = x[:1100].mean(0), x[:1100].std(0).clamp(min=0.5)  # some pixels are 0 in almost every image
    x = (x - mean) / std
    x = x.view(-1, 1, 8, 8) if images else x
    train = TensorDataset(x[:size], spoil(y[:size], noise, 10, generator))
    return train, TensorDataset(x[1100:1700], y[1100:1700])


def teacher(seed: int, size: int, noise: float) -> Sets:
    """Gaussian inputs of 32 features, labelled by a random network with one hidden layer; 600 to validate."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(size + 600, 32, generator=generator)
    hidden = torch.tanh(x @ torch.randn(32, 16, generator=generator) / 32**0.5 * 2)
    y = (hidden @ torch.randn(16, 5, generator=generator)).argmax(1)
    return TensorDataset(x[:size], spoil(y[:size], noise, 5, generator)), TensorDataset(x[size:], y[size:])


def mlp(
    inputs: int = 64,
    classes: int = 10,
    *,
    depth: int = 2,
    width: int = 128,
    dropout: float = 0.0,
    momentum: float = 0.1,
) -> nn.Module:
    """Linear, BatchNorm, ReLU, He's weights."""
    layers: list[nn.Module] = []
    for place in range(depth):
        linear = nn.Linear(width if place else inputs, width)
        nn.init.kaiming_normal_(linear.weight)
        layers += [linear, nn.BatchNorm1d(width, momentum=momentum), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(width, classes))


def cnn(width: int = 16) -> nn.Module:
    """Two convolutions with BatchNorm on 8x8 images."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 10),
    )


class Block(nn.Module):
    """A residual block with two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.second, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Skip connection and branch."""
        return torch.relu(x + self.norm2(self.second(torch.relu(self.norm1(self.first(x))))))


def resnet(width: int = 16) -> nn.Module:
    """Two residual blocks on 8x8 images."""
    stem = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, Block(width), Block(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def affine(model: nn.Module) -> list[nn.Parameter]:
    """γ and β of all BatchNorm layers."""
    return [x for layer in find_batchnorm(model).values() for x in layer.parameters(recurse=False)]


def others(model: nn.Module) -> list[nn.Parameter]:
    """All other parameters."""
    known = {id(x) for x in affine(model)}
    return [x for x in model.parameters() if id(x) not in known]


def adam(rate: float) -> Callable[[nn.Module], Optimizer]:
    """Everything at one learning rate."""
    return lambda model: Adam([x for x in model.parameters() if x.requires_grad], lr=rate)


def sgd(rate: float) -> Callable[[nn.Module], Optimizer]:
    """Everything at one learning rate, with momentum."""
    return lambda model: SGD([x for x in model.parameters() if x.requires_grad], lr=rate, momentum=0.9)


def split(weights: float, gammas: float) -> Callable[[nn.Module], Optimizer]:
    """γ and β at a learning rate of their own; weights at 0 are frozen."""

    def build(model: nn.Module) -> Optimizer:
        for x in others(model) if not weights else []:
            x.requires_grad_(False)
        groups = [{"params": affine(model), "lr": gammas}, {"params": others(model), "lr": weights}]
        return Adam(groups if weights else groups[:1])

    return build


def only_weights(rate: float) -> Callable[[nn.Module], Optimizer]:
    """γ and β frozen."""

    def build(model: nn.Module) -> Optimizer:
        for x in affine(model):
            x.requires_grad_(False)
        return Adam(others(model), lr=rate)

    return build


@dataclass(frozen=True)
class Case:
    """One kind of run.

    Args:
        truth: what has to be said.
        net: builds the network.
        optimizer: builds the optimizer.
        sets: training and validation set of a seed.
        batch: batch size.
        epochs: number of epochs.
    """

    truth: str
    net: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer]
    sets: Callable[[int], Sets]
    batch: int
    epochs: int


class Classifier(LightningModule):
    """Cross-entropy; nothing is planted here.

    Args:
        net: maps inputs to logits.
        optimizer: builds the optimizer.
    """

    def __init__(self, net: nn.Module, optimizer: Callable[[nn.Module], Optimizer]) -> None:
        super().__init__()
        self.net, self.build = net, optimizer

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Cross-entropy of a batch."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """The same, logged."""
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Optimizer:
        """As asked for."""
        return self.build(self)


def few(seed: int) -> Sets:
    """A hundred digits, three tenths of the labels drawn anew."""
    return digits(seed, 100, 0.3)


def few_images(seed: int) -> Sets:
    """The same as images."""
    return digits(seed, 100, 0.3, images=True)


def few_taught(seed: int) -> Sets:
    """Two hundred of the teacher's, three tenths of the labels drawn anew."""
    return teacher(seed, 200, 0.3)


def all_digits(seed: int) -> Sets:
    """1100 digits."""
    return digits(seed, 1100, 0.0)


def all_images(seed: int) -> Sets:
    """The same as images."""
    return digits(seed, 1100, 0.0, images=True)


def all_taught(seed: int) -> Sets:
    """4000 of the teacher's."""
    return teacher(seed, 4000, 0.0)


def wide() -> nn.Module:
    """Three layers of 256."""
    return mlp(depth=3, width=256)


def pupil() -> nn.Module:
    """Learns from the teacher."""
    return mlp(32, 5, depth=3, width=128)


CASES: dict[str, Case] = {
    "only γ, β trained": Case(DRIVEN, wide, split(0, 0.05), few, 8, 80),
    "lr of γ, β x 1000": Case(DRIVEN, wide, split(5e-5, 0.05), few, 8, 80),
    "lr of γ, β x 200": Case(OPEN, wide, split(2e-4, 0.04), few, 8, 80),
    "lr of γ, β x 30": Case(OPEN, wide, split(1e-3, 0.03), few, 8, 60),
    "ordinary": Case(ELSEWHERE, mlp, adam(1e-3), few, 8, 60),
    "ordinary, lr 0.01": Case(ELSEWHERE, mlp, adam(1e-2), few, 8, 60),
    "ordinary, SGD": Case(ELSEWHERE, mlp, sgd(0.02), few, 8, 60),
    "γ, β frozen": Case(ELSEWHERE, mlp, only_weights(1e-2), few, 8, 60),
    "teacher, only γ, β trained": Case(DRIVEN, pupil, split(0, 0.05), few_taught, 8, 60),
    "teacher, lr of γ, β x 1000": Case(DRIVEN, pupil, split(5e-5, 0.05), few_taught, 8, 60),
    "teacher, ordinary": Case(ELSEWHERE, pupil, adam(1e-3), few_taught, 16, 40),
    "CNN, ordinary": Case(ELSEWHERE, cnn, adam(3e-3), few_images, 8, 60),
    "CNN, γ, β frozen": Case(ELSEWHERE, cnn, only_weights(3e-3), few_images, 8, 60),
    "ResNet, ordinary": Case(ELSEWHERE, resnet, adam(3e-3), few_images, 16, 60),
    "momentum 0.001": Case(STATISTICS, lambda: mlp(momentum=0.001), adam(1e-3), all_digits, 64, 15),
    "momentum 0.9, batch 8": Case(STATISTICS, lambda: mlp(momentum=0.9), adam(1e-3), all_digits, 8, 10),
    "teacher, momentum 1, batch 4": Case(
        STATISTICS, lambda: mlp(32, 5, momentum=1.0), adam(1e-3), lambda seed: teacher(seed, 1000, 0.0), 4, 6
    ),
    "healthy": Case(HEALTHY, mlp, adam(1e-3), all_digits, 64, 15),
    "healthy, dropout 0.3": Case(HEALTHY, lambda: mlp(dropout=0.3), adam(1e-3), all_digits, 64, 25),
    "healthy, 60 epochs": Case(HEALTHY, mlp, adam(1e-3), all_digits, 64, 60),
    "healthy, few, dropout 0.5": Case(HEALTHY, lambda: mlp(dropout=0.5), adam(1e-3), few, 8, 40),
    "healthy, batch 4": Case(HEALTHY, mlp, adam(1e-3), lambda seed: digits(seed, 400, 0.0), 4, 8),
    "healthy CNN": Case(HEALTHY, cnn, adam(1e-3), all_images, 32, 15),
    "healthy CNN, batch 2": Case(HEALTHY, cnn, adam(1e-3), lambda seed: digits(seed, 400, 0.0, images=True), 2, 6),
    "healthy ResNet": Case(HEALTHY, resnet, adam(1e-3), all_images, 32, 12),
    "ResNet, all digits, lr 0.003": Case(OPEN, resnet, adam(3e-3), all_images, 32, 12),
    "healthy, teacher": Case(HEALTHY, pupil, adam(1e-3), all_taught, 64, 8),
}
