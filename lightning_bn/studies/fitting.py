# SPDX-License-Identifier: Apache-2.0
"""A quiet Trainer for studies: nothing on the screen, nothing left on disk, and what each validation logged."""

from __future__ import annotations

import io
import logging
import signal
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
"""What Lightning says goes through the last of its packages that was imported."""


class _Curve(Callback):
    """Keeps what each validation logged."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002  (Lightning's signature)
        self.values.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def batches(data: TensorDataset, size: int, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """A loader that takes each batch from the tensors at once, which is faster than sample by sample.

    Args:
        data: the set.
        size: samples of a batch; the last one may have fewer.
        shuffle: whether the order is drawn anew in each epoch, from torch's global generator.
    """
    order = RandomSampler(data) if shuffle else SequentialSampler(data)
    return DataLoader(data, batch_size=None, sampler=BatchSampler(order, size, drop_last=False))


def fit(
    model: LightningModule,
    train: DataLoader[tuple[Tensor, ...]],
    valid: DataLoader[tuple[Tensor, ...]],
    *,
    epochs: int,
    callbacks: Sequence[Callback] = (),
) -> list[dict[str, float]]:
    """Train on the CPU, with a validation after each epoch and none before the first.

    Args:
        model: the network; seed it before, as nothing is seeded here.
        train: training batches.
        valid: validation batches.
        epochs: number of epochs.
        callbacks: monitors, for example; what they print and write is dropped, what they keep is not.

    Returns:
        What was logged, by name, one entry for each epoch.

    Raises:
        KeyboardInterrupt: where the user ended the fit.
    """
    curve = _Curve()
    with silence(), tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            callbacks=[*callbacks, curve],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        handler = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(model, train, valid)
        except SystemExit:  # Lightning's answer to Ctrl-C, after which it ignores the key
            signal.signal(signal.SIGINT, handler)
        if trainer.interrupted:
            raise KeyboardInterrupt
    return curve.values


@contextmanager
def silence() -> Iterator[None]:
    """Keep log lines, warnings and the standard error stream off the screen; exceptions pass."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(redirect_stderr(io.StringIO()))
        for logger in map(logging.getLogger, LOGGERS):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield
