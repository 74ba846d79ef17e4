# SPDX-License-Identifier: Apache-2.0
"""A project with a Trainer class of its own."""

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from shop import Diary, Loaders, Steps


class Net(Steps, LightningModule):
    """A classifier with BatchNorm."""


class Data(Loaders, LightningDataModule):
    """Random numbers."""


class Log(Diary, Callback):
    """Writes down who is there."""


class Loud(Trainer):
    """Says when it is made."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        print("a trainer is made")  # noqa: T201  (it is loud)


if __name__ == "__main__":
    LightningCLI(Net, Data, trainer_class=Loud)
