# SPDX-License-Identifier: Apache-2.0
"""Model, data and a callback that the projects in this folder share; none has heard of lightning_bn."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Body(nn.Module):
    """A network with BatchNorm.

    Args:
        width: hidden units.
        scale: factor on the inputs; ``nan`` breaks the run.
    """

    def __init__(self, width: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))
        self.scale = scale

    def forward(self, x):
        return self.layers(x * self.scale)


class Steps:
    """The steps of a classifier, for a LightningModule of either package."""

    def __init__(self, width: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.body = Body(width, scale)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.body(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Loaders:
    """Random numbers, for a LightningDataModule of either package."""

    def _loader(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, 4, generator=generator)
        return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8)

    def train_dataloader(self):
        return self._loader()

    def val_dataloader(self):
        return self._loader()


class Diary:
    """Writes down who is there when training begins, for a Callback of either package."""

    def on_fit_start(self, trainer, pl_module):
        names = [type(callback).__name__ for callback in trainer.callbacks]
        Path("diary.txt").write_text("\n".join(names))
