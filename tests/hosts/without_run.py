# SPDX-License-Identifier: Apache-2.0
"""A project that takes its objects from LightningCLI and fits by itself."""

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from shop import Diary, Loaders, Steps


class Net(Steps, LightningModule):
    """A classifier with BatchNorm."""


class Data(Loaders, LightningDataModule):
    """Random numbers."""


class Log(Diary, Callback):
    """Writes down who is there."""


if __name__ == "__main__":
    cli = LightningCLI(Net, Data, run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
