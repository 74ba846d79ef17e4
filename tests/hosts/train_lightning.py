# SPDX-License-Identifier: Apache-2.0
"""A project of somebody else's, on ``lightning.pytorch``: it has never heard of lightning_bn."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    """A network with BatchNorm.

    Args:
        width: hidden units.
        scale: factor on the inputs; ``nan`` breaks the run.
    """

    def __init__(self, width: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))
        self.scale = scale

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.body(batch[0] * self.scale), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.body(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(LightningDataModule):
    """Random numbers."""

    def _loader(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, 4, generator=generator)
        return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8)

    def train_dataloader(self):
        return self._loader()

    def val_dataloader(self):
        return self._loader()


if __name__ == "__main__":
    LightningCLI(Net, Data)
