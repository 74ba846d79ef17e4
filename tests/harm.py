# SPDX-License-Identifier: Apache-2.0
"""Models that use everything a monitor could disturb, and a comparison that nothing escapes."""

from __future__ import annotations

import random

import numpy as np
import torch
from specimens import Healthy, network
from torch import nn
from torchmetrics.classification import MulticlassAccuracy


class Busy(Healthy):
    """Draws from every random stream, keeps a metric, and uses dropout in front of BatchNorm."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.2), network()[1:]))
        self.accuracy = MulticlassAccuracy(4)

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = 1e-3 * (random.random() + np.random.default_rng(0).normal() + np.random.rand())  # noqa: NPY002
        logits = self(x + noise * torch.randn_like(x))
        self.accuracy(logits, y)
        self.log("train_acc", self.accuracy)
        loss = self.loss(logits, y)
        self.log("train_loss", loss)
        return loss


class Manual(Healthy):
    """Manual optimisation with two optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            loss = self.loss(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[0].parameters(), 0.01), torch.optim.Adam(self.net[1:].parameters())]


def everything_after(trainer, model):
    """Weights, buffers, optimizer states, random streams and logged numbers at the end of a fit."""
    return {
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "torch": torch.get_rng_state(),
        "numpy": [np.random.get_state()[1].tolist(), *np.random.get_state()[2:]],  # noqa: NPY002
        "python": random.getstate(),
        "metrics": {name: value.clone() for name, value in trainer.callback_metrics.items()},
        "step": trainer.global_step,
    }


def assert_identical(a, b, path="state"):
    """Two nested structures are equal bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_identical(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for place, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_identical(one, other, f"{path}[{place}]")
    else:
        assert a == b, path
