# SPDX-License-Identifier: Apache-2.0
"""A project whose parser has a default list of callbacks, which a config may replace."""

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from shop import Diary, Loaders, Steps


class Net(Steps, LightningModule):
    """A classifier with BatchNorm."""


class Data(Loaders, LightningDataModule):
    """Random numbers."""


class Log(Diary, Callback):
    """Writes down who is there."""


class Cli(LightningCLI):
    """The log is a default."""

    def add_arguments_to_parser(self, parser):
        parser.set_defaults({"trainer.callbacks": [{"class_path": f"{Log.__module__}.Log"}]})


if __name__ == "__main__":
    Cli(Net, Data)
