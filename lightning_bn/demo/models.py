# SPDX-License-Identifier: Apache-2.0
"""A multilayer perceptron and a small residual network for the digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_bn.demo.data import CLASSES

Norm = Literal["batch", "group", "layer", "none"]
Activation = Literal["relu", "tanh", "sigmoid", "gelu"]

PIXELS = 64
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
}
GROUPS = 8


class Classifier(LightningModule):
    """Cross-entropy training of a network that maps images to ten logits; logs loss and accuracy.

    Args:
        net: the network.
        lr: learning rate of Adam.
    """

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net = net
        self.lr = lr
        self.loss = nn.CrossEntropyLoss()
        self.val_acc = MulticlassAccuracy(CLASSES, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, 10)`` of images ``(N, 1, 8, 8)``."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002  (Lightning's signature)
        """Loss of one batch."""
        images, labels = batch
        loss: Tensor = self.loss(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002  (the same)
        """Loss and accuracy of one batch."""
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", self.loss(logits, labels), prog_bar=True, sync_dist=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on all parameters."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class DigitsMLP(Classifier):
    """A multilayer perceptron: ``depth`` times linear, norm, activation and, if asked for, dropout; then a linear head.

    Args:
        norm: ``batch``, ``group``, ``layer`` or ``none``.
        depth: number of hidden layers, at least 1.
        width: units of each hidden layer; with ``group`` a multiple of 8.
        activation: ``relu``, ``tanh``, ``sigmoid`` or ``gelu``.
        dropout: share of the units that are dropped behind each activation, from 0 to below 1; of all but the last one
            the output goes into the next norm.
        lr: learning rate of Adam.

    Raises:
        ValueError: if ``dropout`` is out of its range.
    """

    def __init__(
        self,
        norm: Norm = "batch",
        *,
        depth: int = 2,
        width: int = 128,
        activation: Activation = "relu",
        dropout: float = 0.0,
        lr: float = 1e-3,
    ) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {dropout}")
        layers: list[nn.Module] = [nn.Flatten()]
        for place in range(depth):
            layers.append(nn.Linear(width if place else PIXELS, width))
            layers.extend(norm_layer(norm, width, spatial=False))
            layers.append(ACTIVATIONS[activation]())
            layers.extend([nn.Dropout(dropout)] if dropout else [])
        super().__init__(nn.Sequential(*layers, nn.Linear(width, CLASSES)), lr)


class DigitsResNet(Classifier):
    """A small residual network: a stem, two stages of basic blocks, global average pooling, a linear head.

    Args:
        norm: ``batch``, ``group``, ``layer`` (over channels and pixels) or ``none``.
        depth: basic blocks in each of the two stages, at least 1.
        width: channels of the first stage, the second has twice as many; with ``group`` a multiple of 8.
        activation: ``relu``, ``tanh``, ``sigmoid`` or ``gelu``.
        lr: learning rate of Adam.
    """

    def __init__(
        self,
        norm: Norm = "batch",
        *,
        depth: int = 2,
        width: int = 16,
        activation: Activation = "relu",
        lr: float = 1e-3,
    ) -> None:
        stem = nn.Sequential(_conv(1, width), *norm_layer(norm, width, spatial=True), ACTIVATIONS[activation]())
        stages = [
            _Block(
                width if stage == 0 or (stage == 1 and block == 0) else 2 * width,
                width * (stage + 1),
                stride=2 if stage and not block else 1,
                norm=norm,
                activation=activation,
            )
            for stage in range(2)
            for block in range(depth)
        ]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES)]
        super().__init__(nn.Sequential(stem, *stages, *head), lr)


class _Block(nn.Module):
    """Two convolutions with a skip connection, which is projected where the shape changes (He et al. 2016)."""

    def __init__(self, inner: int, outer: int, *, stride: int, norm: Norm, activation: Activation) -> None:
        super().__init__()
        self.conv1 = _conv(inner, outer, stride=stride)
        self.norm1 = nn.Sequential(*norm_layer(norm, outer, spatial=True))
        self.act1 = ACTIVATIONS[activation]()
        self.conv2 = _conv(outer, outer)
        self.norm2 = nn.Sequential(*norm_layer(norm, outer, spatial=True))
        self.act2 = ACTIVATIONS[activation]()
        same = inner == outer and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inner, outer, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        out: Tensor = self.act2(branch + self.skip(x))
        return out


def norm_layer(norm: Norm, width: int, *, spatial: bool) -> list[nn.Module]:
    """The normalisation layer for ``(N, C, *)`` as a list, which is empty for ``none``.

    Raises:
        ValueError: if ``norm`` is none of the four.
    """
    layers: dict[str, Any] = {
        "batch": nn.BatchNorm2d if spatial else nn.BatchNorm1d,
        "group": lambda channels: nn.GroupNorm(GROUPS, channels),
        "layer": (lambda channels: nn.GroupNorm(1, channels)) if spatial else nn.LayerNorm,
    }
    if norm == "none":
        return []
    if norm not in layers:
        raise ValueError(f"norm must be batch, group, layer or none, got {norm!r}")
    return [layers[norm](width)]


def _conv(inner: int, outer: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=False)
