# SPDX-License-Identifier: Apache-2.0
"""What an assessment of overfitting needs, collected while a fit runs: batches, losses, and the weights of its best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bn.callbacks.best_weights import Weights, fingerprint, is_same
from lightning_bn.callbacks.material import Material
from lightning_bn.callbacks.training_batches import GIGABYTE, TrainingBatches
from lightning_bn.rules.affine_drift import Watched

RENEWED = 8
"""Epochs after which the kept training batches are taken anew: of a small data set every batch is copied to the host
for that."""
QUEUE = 64
"""Losses that are added up together: an operation for each would cost a small network a percent of its step."""


class MeanLoss:
    """Mean of the losses of many steps; nothing is read on the host before it is asked for."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._queue: list[Tensor] = []
        self.steps = 0
        """Losses so far."""

    def add(self, loss: Tensor) -> None:
        """Add one, ``()`` or of one element."""
        loss = loss.detach() if loss.requires_grad else loss
        self._queue.append(loss.reshape(()) if loss.dim() else loss)
        self.steps += 1
        if len(self._queue) >= QUEUE:
            self._fold()

    def mean(self) -> float:
        """The mean; reads the host."""
        self._fold()
        return float(self._sum) / self.steps

    def _fold(self) -> None:
        if self._queue:
            self._sum = self._sum + torch.stack(self._queue).sum(dtype=torch.float32)
            self._queue = []


class Evidence:
    """Keeps a sample of training and validation batches, and what each validation is compared with.

    Args:
        num_samples: about so many samples of each kind, on this process.
        max_gigabytes: most memory for each kind, in 10⁹ bytes.
        seed: of the choice.
        state: what :meth:`state_dict` gave in the run that goes on; empty in a new one.
    """

    def __init__(self, num_samples: int, max_gigabytes: float, seed: int, state: Mapping[str, Any]) -> None:
        self._bounds = (num_samples, max_gigabytes * GIGABYTE, seed)
        self._training = TrainingBatches(*self._bounds, every=RENEWED)
        self._validation: dict[int, TrainingBatches] = {}
        self._offered = 0
        self._modes: dict[nn.Module, bool] = {}
        self._complete = False  # a whole validation has passed by
        self._trained = False  # since the last validation
        self._marks = (torch.zeros(0), torch.zeros(0))  # fingerprints of weights and buffers at the last validation
        self._begins = 2  # batches of the epoch in which modes are still looked at: some are set in the first one
        self._loss = MeanLoss()
        self.best: Weights | None = None
        """Weights of the best validation."""
        self.since_best = 0
        """Validations since then."""
        self.validations = 0
        """Validations of the whole fit."""
        self.train_best = self.train_last = float("nan")
        """Mean training loss in front of the best validation, and in front of the last one."""
        if state:
            self.best = Weights.from_state(state["best"]) if state["best"] else None
            self.since_best, self.validations = state["since_best"], state["validations"]
            self.train_best, self.train_last = state["train"]

    def begin_epoch(self) -> None:
        """Begin to keep the batches of another epoch."""
        self._training.begin_epoch()
        self._begins = 2

    def train_batch(self, model: nn.Module, batch: Any, number: int) -> None:
        """Keep a training batch or not; raises TypeError where it cannot be copied."""
        self._trained = True
        if self._begins:
            self._modes = {module: module.training for module in model.modules()}
            self._begins -= 1
        self._training.offer(batch, number)

    def train_loss(self, outputs: Any) -> None:
        """Add the loss of a step; nothing is read on the host."""
        value = outputs.get("loss") if type(outputs) is dict or isinstance(outputs, Mapping) else outputs
        if isinstance(value, Tensor) and value.numel() == 1:
            self._loss.add(value)

    def validation_batch(self, batch: Any, number: int, loader: int) -> None:
        """Keep a batch of the first whole validation or not; raises TypeError where it cannot be copied."""
        if not self._complete:
            if loader not in self._validation:
                self._validation[loader] = TrainingBatches(*self._bounds)
            self._validation[loader].offer(batch, number)
            self._offered += 1

    def end_validation(self, model: nn.Module, *, is_best: bool) -> float:
        """A validation is over: keep the weights where it was the best; gives :attr:`train_last`; reads the host.

        Args:
            model: the network.
            is_best: whether no validation before had a smaller loss.
        """
        self._complete = self._complete or bool(self._validation)
        if self._loss.steps:
            self.train_last = self._loss.mean()
        self._loss = MeanLoss()
        self._trained, self._marks = False, _marks(model)
        self.since_best += 1
        self.validations += 1
        if is_best:
            self.best, self.since_best, self.train_best = Weights.of(model), 0, self.train_last
        return self.train_last

    @property
    def train_now(self) -> float:
        """Mean training loss to compare with that in front of the best validation; reads the host."""
        if not self._loss.steps or self.since_best:
            return self.train_last
        return self._loss.mean()  # no other validation came after the best one

    def material(self, model: nn.Module, watched: Watched) -> Material | str:
        """What to assess with; in words why not, where something is missing.

        Args:
            model: the network.
            watched: the validation loss.
        """
        if not self._complete:
            return "no validation has run"
        if not self._training.kept:
            return "no training batch was kept since this run began"
        if self.best is None or not self.best.fits(model):
            return "the parameters are not those of the best validation, or not whole on this process"
        weights, buffers = map(is_same, self._marks, _marks(model))
        if not self._trained and not weights:
            return (
                "the weights are not those that were validated last, though no step came in between: others were put "
                "in their place, such as averaged ones"
            )
        kept = [(loader, entry) for loader, batches in self._validation.items() for entry in batches.kept]
        return Material(
            watch=watched.name,
            best_value=watched.best,
            last_value=None if self._trained or not buffers else watched.last,
            best=self.best,
            is_best=not self.since_best and not self._trained,
            validations=self.validations,
            training=tuple(self._training.kept),
            validation=tuple(kept),
            complete=len(kept) == self._offered,
            modes=self._modes,
        )

    def drop_batches(self) -> None:
        """Give back the memory of the batches; the weights of the best validation stay."""
        self._training, self._validation = TrainingBatches(*self._bounds, every=RENEWED), {}
        self._modes = {}

    def state_dict(self) -> dict[str, Any]:
        """Plain types and CPU tensors; batches are kept anew."""
        weights = self.best.state_dict() if self.best is not None else None
        counts = {"since_best": self.since_best, "validations": self.validations}
        return {"best": weights, **counts, "train": [self.train_best, self.train_last]}


def _marks(model: nn.Module) -> tuple[Tensor, Tensor]:
    return fingerprint(model.parameters()), fingerprint(model.buffers())
