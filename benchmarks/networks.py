# SPDX-License-Identifier: Apache-2.0
"""The networks that are measured on: healthy ones, and sick ones with one planted fault each."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

CLASSES = 10
VOCABULARY = 1000
STEPS = 100_000
FEATURES, WIDTH = 16, 32
"""Sizes of the sick networks."""


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

    def loader(self) -> DataLoader[Any]:
        """One and the same batch, more often than any fit asks for."""
        batch = (self.inputs(self.batch), torch.randint(CLASSES, (self.batch,)))
        return DataLoader([batch] * STEPS, batch_size=None, pin_memory=torch.cuda.is_available())


def mlp() -> nn.Sequential:
    """Two hidden layers of 64 with BatchNorm."""
    hidden = [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(64, CLASSES))


class Validated(Trained):
    """The same with a validation."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # noqa: ARG002  (Lightning's signature)
        """Loss of one batch."""
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


def fit(
    subject: Subject, callbacks: list[Callback], device: str = "cpu", *, validates: bool = False, **options: Any
) -> None:
    """Train a network on one batch, over and over, until a callback or an option of the trainer ends it.

    Args:
        subject: the network.
        callbacks: for the trainer.
        device: where.
        validates: whether a validation of that batch, eight times, ends the fit.
        options: further ones of the trainer.
    """
    seed_everything(1, verbose=False)
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):  # what the callbacks print
        trainer = Trainer(
            accelerator=device,
            devices=1,
            precision="bf16-mixed" if device == "cuda" else "32-true",
            logger=False,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=callbacks,
            **{"max_epochs": 1, **options},
        )
        loader, model = subject.loader(), (Validated if validates else Trained)(subject.build())
        trainer.fit(model, loader, DataLoader(loader.dataset[:8], batch_size=None) if validates else None)


ON_CPU = {
    "MLP, 2 x 64": Subject(mlp, lambda size: torch.randn(size, 64), batch=32, block=50),
    "ResNet-18": Subject(lambda: resnet([2, 2, 2, 2]), lambda size: torch.randn(size, 3, 32, 32), batch=16, block=1),
    "transformer, 3 x 128": Subject(
        lambda: Encoder(128, 3, 64), lambda size: torch.randint(VOCABULARY, (size, 64)), batch=16, block=2
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


class Classifier(LightningModule):
    """Classifies with cross-entropy; nothing is planted here.

    Args:
        net: maps inputs to logits.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Logits in float32."""
        logits: Tensor = self.net(x.to(next(self.parameters()).dtype))
        return logits.float()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002  (Lightning's signature)
        """Loss of one batch."""
        return self.loss(self(batch[0]), batch[1])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of logits; NaN where all labels are -100."""
        return nn.functional.cross_entropy(logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class LogOfProbability(Classifier):
    """Takes the logarithm of probabilities that saturate."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """NaN where a probability is exactly 0."""
        p = torch.softmax(200 * logits, 1)
        return -(torch.log(p) * nn.functional.one_hot(labels, logits.shape[1])).sum(1).mean()


class Distances(Classifier):
    """Adds the distances of all outputs to the first one, its own among them."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Finite, with a gradient that is not."""
        apart = logits[:1] - logits
        return super().loss(logits, labels) + 0.01 * torch.sqrt((apart * apart).sum(1)).mean()


class Between(nn.Module):
    """Its own code, between two submodules, makes NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """NaN wherever the first submodule puts out something negative."""
        y: Tensor = self.b(torch.log(self.a(x)))
        return y


class Attention(nn.Module):
    """Attention over the tokens of a sequence that are no padding, which is all zero."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(FEATURES, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The mean over the tokens; NaN for a sequence of padding alone."""
        padding = (x == 0).all(-1).unsqueeze(1)
        scores = self.queries(x) @ self.keys(x).transpose(1, 2) / WIDTH**0.5
        weights = torch.softmax(scores.masked_fill(padding, float("-inf")), -1)
        y: Tensor = self.out(weights @ self.values(x))
        return y.mean(1)


class _Magnitude(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.abs()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x / x.abs())


class Magnitude(nn.Module):
    """The distance to the first sample; its own backward pass divides 0 by 0."""

    def forward(self, x: Tensor) -> Tensor:
        """The distance, value by value."""
        y: Tensor = _Magnitude.apply(x - x[:1])
        return y
