# SPDX-License-Identifier: Apache-2.0
"""A project whose command line always has an EarlyStopping of its own section."""

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningCLI
from shop import Diary, Loaders, Steps


class Net(Steps, LightningModule):
    """A classifier with BatchNorm."""


class Data(Loaders, LightningDataModule):
    """Random numbers."""


class Log(Diary, Callback):
    """Writes down who is there."""


class Cli(LightningCLI):
    """Early stopping has a section of its own in the config."""

    def add_arguments_to_parser(self, parser):
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.set_defaults({"early_stopping.monitor": "val_loss", "early_stopping.patience": 5})


if __name__ == "__main__":
    Cli(Net, Data)
