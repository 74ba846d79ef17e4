# SPDX-License-Identifier: Apache-2.0
"""The networks that costs are measured on, and fits of them in which what costs comes and goes."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn.callbacks.base import callbacks_of

CLASSES = 10
VOCABULARY = 1000
STEPS = 100_000

Variant = AbstractContextManager[object]
"""What is there in some blocks of steps and not in the others; entered once for each such block."""


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

    def model(self) -> Trained:
        """The network with its loss and optimizer."""
        return Trained(self.build())

    def loader(self) -> DataLoader[Any]:
        """One and the same batch, more often than any fit asks for."""
        batch = (self.inputs(self.batch), torch.randint(CLASSES, (self.batch,)))
        return DataLoader([batch] * STEPS, batch_size=None, pin_memory=torch.cuda.is_available())


def mlp() -> nn.Sequential:
    """Two hidden layers of 64 with BatchNorm."""
    hidden = [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(64, CLASSES))


@dataclass
class Pairs:
    """Seconds of a step, round by round: without a variant, and with it."""

    plain: list[float] = field(default_factory=list)
    with_it: list[float] = field(default_factory=list)

    def row(self) -> str:
        """Plain step, extra time, ratio, the middle half and the range of the ratios, as cells of a table."""
        ratios = [b / a for a, b in zip(self.plain, self.with_it, strict=True)]
        extra = median(b - a for a, b in zip(self.plain, self.with_it, strict=True))
        low, _, high = quantiles(ratios, n=4)
        shown = f"{1e3 * median(self.plain):.2f} ms | {1e6 * extra:+.0f} µs | {median(ratios):.3f}"
        return f"{shown} | {low:.3f} to {high:.3f} | {min(ratios):.3f} to {max(ratios):.3f}"


class Switch(Callback):
    """Lets variants come and go within one fit: without, with, with, without, a block of steps each.

    Args:
        variants: makes the block of each variant anew; the trainer's callbacks may be changed in it.
        block: steps in a block.
        rounds: how often all variants take their turn.
        warm_up: steps before the first block, which run with every callback that the trainer was given.
    """

    def __init__(
        self, variants: Mapping[str, Callable[[Trainer], Variant]], *, block: int, rounds: int, warm_up: int = 5
    ) -> None:
        self.pairs = {name: Pairs() for name in variants}
        self._variants = variants
        turns = [(name, there) for _ in range(rounds) for name in variants for there in (False, True, True, False)]
        self._turns = iter(turns)
        self._now: tuple[str, bool] | None = None
        self._open: Variant = nullcontext()
        self._all: list[Callback] = []
        self._block, self._left = block, warm_up
        self._spent: list[float] = []
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, *_: object) -> None:
        """Remember which callbacks there are."""
        self._all = callbacks_of(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Count, and switch at the end of a block; the last callback of the trainer, so that all others are done."""
        self._left -= 1
        if self._left:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._note(time.perf_counter() - self._started)
        self._open.__exit__(None, None, None)
        self._now = next(self._turns, None)
        trainer.callbacks = self._all if self._now is None else [self]  # type: ignore[attr-defined]  # declared nowhere
        trainer.should_stop = self._now is None
        name, there = self._now or ("", False)
        self._open = self._variants[name](trainer) if there else nullcontext()
        self._open.__enter__()
        self._left = self._block
        self._started = time.perf_counter()

    def _note(self, seconds: float) -> None:
        if self._now is None:
            return
        self._spent.append(seconds / self._block)
        if len(self._spent) == 4:  # noqa: PLR2004  (without, with, with, without)
            first, second, third, last = self._spent
            self.pairs[self._now[0]].plain.append((first + last) / 2)
            self.pairs[self._now[0]].with_it.append((second + third) / 2)
            self._spent = []


def present(callback: Callback) -> Callable[[Trainer], Variant]:
    """A variant: one more callback."""

    @contextmanager
    def there(trainer: Trainer) -> Iterator[None]:
        trainer.callbacks = [callback, *callbacks_of(trainer)]  # type: ignore[attr-defined]  # the same
        yield

    return there


def fit(subject: Subject, callbacks: list[Callback], device: str = "cpu", **options: Any) -> None:
    """Train a network on one batch, over and over, until a callback or an option of the trainer ends it."""
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
        trainer.fit(subject.model(), subject.loader())


ON_CPU = {
    "MLP, 2 x 64": Subject(mlp, lambda size: torch.randn(size, 64), batch=32, block=50),
    "ResNet-18": Subject(lambda: resnet([2, 2, 2, 2]), lambda size: torch.randn(size, 3, 32, 32), batch=16, block=2),
    "transformer, 3 x 128": Subject(
        lambda: Encoder(128, 3, 64), lambda size: torch.randint(VOCABULARY, (size, 64)), batch=16, block=5
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
