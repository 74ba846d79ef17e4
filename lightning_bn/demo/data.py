# SPDX-License-Identifier: Apache-2.0
"""scikit-learn's handwritten digits as a LightningDataModule."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 10
VALIDATION = 600


class DigitsData(LightningDataModule):
    """Handwritten digits of scikit-learn: 1797 grey images of 8 × 8 pixels, split at random, standardised.

    Args:
        batch_size: images in a batch, at least 1.
        train_size: images to train on, 1 to 1197; 600 others are kept for validation.
        label_noise: share of the training labels that are drawn anew at random, 0 to 1.
        seed: seed of the split and of the label noise.

    Raises:
        ValueError: if an argument is out of its range.
        ImportError: in ``setup``, if scikit-learn is missing.
    """

    def __init__(
        self, batch_size: int = 64, *, train_size: int = 1100, label_noise: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 1 <= train_size <= 1797 - VALIDATION:
            raise ValueError(f"train_size must be from 1 to {1797 - VALIDATION}, got {train_size}")
        if not 0 <= label_noise <= 1:
            raise ValueError(f"label_noise must be from 0 to 1, got {label_noise}")
        self.batch_size = batch_size
        self.train_size = train_size
        self.label_noise = label_noise
        self.seed = seed
        self.train_set: TensorDataset | None = None
        self.val_set: TensorDataset | None = None

    def setup(self, stage: str) -> None:  # noqa: ARG002  (Lightning's signature)
        """Load, split and standardise; called by Lightning."""
        images, labels = _load_digits()
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(images), generator=generator)
        train, val = order[: self.train_size], order[-VALIDATION:]
        noisy = torch.rand(self.train_size, generator=generator) < self.label_noise
        redrawn = torch.randint(CLASSES, (self.train_size,), generator=generator)
        mean, std = images[train].mean(), images[train].std()
        images = (images - mean) / std
        self.train_set = TensorDataset(images[train], torch.where(noisy, redrawn, labels[train]))
        self.val_set = TensorDataset(images[val], labels[val])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches ``(image, label)`` of shapes ``(N, 1, 8, 8)`` and ``(N,)``."""
        return DataLoader(self._loaded(self.train_set), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The 600 validation images in fixed order, 300 at a time."""
        return DataLoader(self._loaded(self.val_set), VALIDATION // 2)

    @staticmethod
    def _loaded(data_set: TensorDataset | None) -> TensorDataset:
        if data_set is None:
            raise RuntimeError("DigitsData.setup has to run first; a Trainer does that")
        return data_set


def _load_digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  (an optional dependency)
    except ImportError as error:
        raise ImportError("the demo needs scikit-learn: pip install 'lightning-bn[demo]'") from error
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target)
