# SPDX-License-Identifier: Apache-2.0
"""The same project on ``pytorch_lightning``: it too has never heard of lightning_bn."""

from pytorch_lightning import Callback, LightningDataModule, LightningModule
from pytorch_lightning.cli import LightningCLI
from shop import Diary, Loaders, Steps


class Net(Steps, LightningModule):
    """A classifier with BatchNorm."""


class Data(Loaders, LightningDataModule):
    """Random numbers."""


class Log(Diary, Callback):
    """Writes down who is there."""


if __name__ == "__main__":
    LightningCLI(Net, Data)
