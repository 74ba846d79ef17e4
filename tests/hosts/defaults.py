# SPDX-License-Identifier: Apache-2.0
"""A project that gives callbacks as defaults of the trainer, which no config shows."""

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
    LightningCLI(Net, Data, trainer_defaults={"callbacks": [Log()]})
