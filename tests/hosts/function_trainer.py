# SPDX-License-Identifier: Apache-2.0
"""A project whose trainer comes from a function that takes no callbacks."""

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from shop import Diary, Loaders, Steps


class Net(Steps, LightningModule):
    """A classifier with BatchNorm."""


class Data(Loaders, LightningDataModule):
    """Random numbers."""


class Log(Diary, Callback):
    """Writes down who is there."""


def build(max_epochs: int = 2) -> Trainer:
    """A trainer of which only the length can be chosen."""
    return Trainer(max_epochs=max_epochs, accelerator="cpu", enable_progress_bar=False, callbacks=[Log()])


if __name__ == "__main__":
    LightningCLI(Net, Data, trainer_class=build)
