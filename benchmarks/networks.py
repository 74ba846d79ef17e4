# SPDX-License-Identifier: Apache-2.0
"""The networks that the costs of NaNGuard are measured on, and batches that never end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

CLASSES = 10
VOCABULARY = 1000


class Trained(LightningModule):
    """Cross-entropy training of a network, as most projects write it.

    Args:
        net: maps inputs to logits.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002  (Lightning's signature)
        """Loss of one batch."""
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum, the cheapest update in use: whatever else runs shows most beside it."""
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


class Endless(IterableDataset[Any]):
    """One and the same batch for ever: loading costs nothing.

    Args:
        batch: the batch.
    """

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        """The batch, again and again."""
        return repeat(self.batch)


class Residual(nn.Module):
    """Sum of a branch and a shortcut, with a rectifier behind.

    Args:
        branch: the convolutions.
        shortcut: what carries the input past them.
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return torch.relu(self.branch(x) + self.shortcut(x))


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps or divides the size of the picture, and its BatchNorm."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


def block(inputs: int, width: int, stride: int, *, bottleneck: bool) -> Residual:
    """Two convolutions of 3 x 3, or a bottleneck of three, beside a shortcut."""
    outputs = width * (4 if bottleneck else 1)
    if bottleneck:
        layers = [convolution(inputs, width, 1), convolution(width, width, 3, stride), convolution(width, outputs, 1)]
    else:
        layers = [convolution(inputs, width, 3, stride), convolution(width, outputs, 3)]
    branch = nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.ReLU())), layers[-1])
    plain = stride == 1 and inputs == outputs
    return Residual(branch, nn.Identity() if plain else convolution(inputs, outputs, 1, stride))


def resnet(depths: Sequence[int], *, bottleneck: bool = False, imagenet: bool = False) -> nn.Sequential:
    """A ResNet as in He et al. 2015, for pictures of 32 x 32 (no pooling at the start) or of 224 x 224.

    Args:
        depths: blocks in each stage.
        bottleneck: blocks of three convolutions.
        imagenet: the start for large pictures.
    """
    if imagenet:
        layers: list[nn.Module] = [convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    else:
        layers = [convolution(3, 64, 3), nn.ReLU()]
    channels = 64
    for stage, depth in enumerate(depths):
        for place in range(depth):
            stride = 2 if stage and not place else 1
            layers.append(block(channels, 64 << stage, stride, bottleneck=bottleneck))
            channels = (64 << stage) * (4 if bottleneck else 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


class Encoder(nn.Module):
    """Encoder layers over tokens and places, with a head on the mean.

    Args:
        width: model width.
        depth: number of layers.
        tokens: length of the sequences.
    """

    def __init__(self, width: int, depth: int, tokens: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, width), nn.Parameter(0.02 * torch.randn(tokens, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of sequences."""
        logits: Tensor = self.head(self.layers(self.token(tokens) + self.place).mean(1))
        return logits


@dataclass(frozen=True)
class Subject:
    """A network to measure on.

    Args:
        build: makes it.
        inputs: makes a batch of inputs of a given size.
        batch: the size.
        block: training steps between two switches.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch: int
    block: int

    def model(self) -> Trained:
        """The network with its loss and optimizer."""
        return Trained(self.build())

    def loader(self) -> DataLoader[Any]:
        """Batches without end."""
        batch = (self.inputs(self.batch), torch.randint(CLASSES, (self.batch,)))
        return DataLoader(Endless(batch), batch_size=None)


def mlp() -> nn.Sequential:
    """Two hidden layers of 128 with BatchNorm."""
    hidden = [nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, CLASSES))


ON_CPU = {
    "MLP, 2 x 128": Subject(mlp, lambda size: torch.randn(size, 64), batch=64, block=50),
    "ResNet-18": Subject(lambda: resnet([2, 2, 2, 2]), lambda size: torch.randn(size, 3, 32, 32), batch=8, block=4),
    "transformer, 3 x 128": Subject(
        lambda: Encoder(128, 3, 64), lambda size: torch.randint(VOCABULARY, (size, 64)), batch=16, block=10
    ),
}
ON_GPU = {
    "ResNet-50": Subject(
        lambda: resnet([3, 4, 6, 3], bottleneck=True, imagenet=True),
        lambda size: torch.randn(size, 3, 224, 224),
        batch=64,
        block=20,
    )
}
