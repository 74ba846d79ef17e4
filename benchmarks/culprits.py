# SPDX-License-Identifier: Apache-2.0
"""Whom three tools blame for NaN: ten planted faults side by side, and what each tool costs.

Run:     OMP_NUM_THREADS=1 python benchmarks/culprits.py [--seeds 3] [--rounds 7]
Output:  a markdown table. An answer is right where it names the planted module, the planted source line, or for bad
         data the tensor and the sample; naming something else is wrong. The last row is the time of a step with the
         tool over that of a plain one, paired, on ResNet-18. DebugUnderflowOverflow needs Hugging Face transformers.
"""

from __future__ import annotations

import argparse
import io
import linecache
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from networks import ON_CPU, Switch, fit, present
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import NaNGuard, Severity

try:
    from transformers.debug_utils import DebugUnderflowOverflow
except ImportError:
    DebugUnderflowOverflow = None

FEATURES, CLASSES, WIDTH, TOKENS = 16, 5, 32, 6
BATCH, BATCHES, BAD_BATCH, BAD_SAMPLE = 16, 6, 3, 5
NOWHERE = "finite"


class _Model(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.to(next(self.parameters()).dtype))
        return logits.float()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002  (Lightning's signature)
        return self.loss(self(batch[0]), batch[1])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class _LogOfProbability(_Model):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = torch.softmax(200 * logits, 1)  # saturates
        return -(torch.log(p) * nn.functional.one_hot(labels, CLASSES)).sum(1).mean()


class _Distances(_Model):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        apart = logits[:1] - logits  # the first one's is 0
        return super().loss(logits, labels) + 0.01 * torch.sqrt((apart * apart).sum(1)).mean()


class _Between(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.log(self.a(x)))
        return y


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(FEATURES, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
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


class _Absolute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Magnitude.apply(x)
        return y


def _mlp(*middle: nn.Module) -> nn.Sequential:
    hidden = [nn.Linear(FEATURES, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()]
    return nn.Sequential(*hidden, *middle, nn.Linear(WIDTH, CLASSES))


def _drawn_wide(depth: int, dtype: torch.dtype) -> nn.Sequential:
    sizes = [FEATURES, *[WIDTH] * (depth - 1), CLASSES]
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=1000)
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).to(dtype)


def _scaled_first(net: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        net[0].weight.mul_(1e20)
    return net


@dataclass(frozen=True)
class Fault:
    """A planted fault and the right answers to it.

    Args:
        planted: where it was planted, for the table.
        build: makes the model.
        layers: modules that are a right answer.
        code: pieces of the source lines that are a right answer.
        words: what an answer about bad data has to say.
        spoil: changes one batch in place.
        shape: of one sample.
        limit: of an overflow the largest value that fits: the right answer is the first layer to go beyond it.
    """

    planted: str
    build: Callable[[], _Model]
    layers: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    spoil: Callable[[Tensor, Tensor], object] | None = None
    shape: tuple[int, ...] = (FEATURES,)
    limit: float | None = None

    def batches(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        """What is trained on."""
        torch.manual_seed(seed)
        found = [(torch.randn(BATCH, *self.shape), torch.randint(CLASSES, (BATCH,))) for _ in range(BATCHES)]
        if self.spoil:
            self.spoil(*found[BAD_BATCH])
        return found

    def places(self, model: _Model, x: Tensor) -> set[str]:
        """Modules and source lines that are right, of an overflow by a float64 pass of its own."""
        source = linecache.getlines(__file__)
        lines = {
            f"{number}" for number, line in enumerate(source, 1) for code in self.code if code in line[: len(line)]
        }
        return lines | set(self.layers) | ({self._first_beyond(model, x)} if self.limit else set())

    def _first_beyond(self, model: _Model, x: Tensor) -> str:
        y, net = x.double(), model.net.double()
        for name, layer in net.named_children():
            y = layer(y)
            if y.abs().max() > (self.limit or 0):
                return f"net.{name}"
        return ""
