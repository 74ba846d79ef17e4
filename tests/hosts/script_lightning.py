# SPDX-License-Identifier: Apache-2.0
"""A training script with a Trainer, on ``lightning.pytorch``, without a command line."""

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from shop import Diary, Loaders, Steps


class Net(Steps, LightningModule):
    """A classifier with BatchNorm."""


class Data(Loaders, LightningDataModule):
    """Random numbers."""


class Log(Diary, Callback):
    """Writes down who is there."""


if __name__ == "__main__":
    Trainer(max_epochs=2, accelerator="cpu", enable_progress_bar=False, callbacks=Log()).fit(Net(), Data())
