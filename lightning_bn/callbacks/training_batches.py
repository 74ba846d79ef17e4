# SPDX-License-Identifier: Apache-2.0
"""A bounded sample of the batches that training sees, kept as they pass by, and steps on them without a trace."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks.kept import Kept, keep
from lightning_bn.callbacks.rehearsal import apart, arguments, cannot_rehearse, cannot_unwrap
from lightning_bn.norms import find_batchnorm
from lightning_bn.precise import measure
from lightning_bn.quarantine import lazy_tensors
from lightning_bn.stats.population import Population
from lightning_bn.writes import Writes

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

GIGABYTE = 1e9
TINY = 1e-12


class TrainingBatches:
    """Keeps a random sample of an epoch's batches in host memory.

    The loader is never asked: a second iterator would restart persistent workers in the middle of an epoch, drain an
    iterable dataset and draw from the global random streams. Each batch of an epoch is equally likely to be kept
    (reservoir sampling: Vitter 1985; which one is the next to be kept is drawn in advance, as in Li 1994), so that a
    loader that does not shuffle is represented as well. In the first batches of a new epoch those of the last one are
    still among them. A batch that is not kept costs nothing, and of n batches K·(1 + ln(n/K)) are copied for the K that
    stay. The random stream is its own.

    Args:
        num_samples: keep about so many samples: as many batches of the first one's length as it takes.
        max_bytes: never more than this, but for a single batch.
        seed: of the choice.
        every: take those of every so many epochs: a short epoch is kept whole, and each of its batches copied.
    """

    def __init__(self, num_samples: int, max_bytes: float, seed: int = 0, every: int = 1) -> None:
        self._wanted, self._max_bytes, self._every = num_samples, max_bytes, every
        self._epochs = 0
        self._rests = False
        self._random = random.Random(seed)  # noqa: S311  (no cryptography)
        self._seen, self._next = 0, 1  # batches of this epoch, and the number of the next one that is to be kept
        self._most = 0  # batches of the longest epoch before this one
        self._room = 0  # batches to keep at most
        self._limited = False  # by memory
        self.kept: list[Kept] = []
        self.nbytes = 0
        """Memory that they take."""

    @property
    def is_cut(self) -> bool:
        """Whether there were more batches, and memory rather than ``num_samples`` left them out."""
        return self._limited and max(self._most, self._seen) > self._room

    @property
    def samples(self) -> int:
        """Samples in the kept batches."""
        return sum(entry.samples for entry in self.kept)

    def begin_epoch(self) -> None:
        """Let the batches of a new epoch take the place of the old ones, one by one, if it is its turn."""
        self._most = max(self._most, self._seen)
        self._seen, self._next = 0, 1
        self._rests = bool(self.kept) and self._epochs % self._every != 0
        self._epochs += 1

    def offer(self, batch: Any, number: int) -> bool:
        """Keep a batch or not; copies it if so.

        Args:
            batch: what ``training_step`` is about to get.
            number: its ``batch_idx``.

        Returns:
            Whether it was kept.

        Raises:
            TypeError: where it cannot be copied.
        """
        self._seen += 1
        if self._rests or self._seen < self._next:
            return False
        room = max(self._room, 1)
        place = self._seen - 1 if self._seen <= room else self._random.randrange(room)
        entry, old = keep(batch, number), self.kept[place : place + 1]
        self.kept[place : place + 1] = [entry]
        self.nbytes += entry.nbytes - sum(other.nbytes for other in old)
        self._bound()
        self._next = self._seen + 1 + self._gap()
        return True

    def _gap(self) -> int:
        """How many batches are passed over: each later one, the n-th, is kept with probability K/n.

        That is as if each had a random number, and the K smallest stayed: the largest of K among n has a beta
        distribution with K and n - K + 1, independent of who was kept before, and a batch is kept that lies below it.
        """
        if self._seen < self._room:
            return 0
        largest = self._random.betavariate(self._room, self._seen - self._room + 1)
        rest = math.log1p(-min(max(largest, TINY), 1 - TINY))
        return int(math.log(1 - self._random.random()) / rest)

    def _bound(self) -> None:
        """Decide on the room at the first batch, and drop batches where later ones are larger."""
        if not self._room:
            first = self.kept[0]
            wanted = math.ceil(self._wanted / max(first.samples, 1))
            self._room = max(1, min(wanted, int(self._max_bytes // max(first.nbytes, 1))))
            self._limited = self._room < wanted
        while len(self.kept) > 1 and self.nbytes > self._max_bytes:
            self.nbytes -= self.kept.pop(0).nbytes
            self._room, self._limited = len(self.kept), True


def cannot_reestimate(trainer: Trainer, pl_module: LightningModule) -> tuple[str, str]:
    """Why training steps cannot be run again for statistics, in words, and what to do; both empty where they can."""
    by_hand = "call lightning_bn.precise_statistics with a forward of your own"
    if not find_batchnorm(pl_module):
        return "the model has no BatchNorm layer", ""
    wrapped = cannot_unwrap(trainer)
    if wrapped is not None:
        return wrapped, by_hand
    reason = cannot_rehearse(pl_module)
    if reason is None or (lazy_tensors(pl_module) and not trainer.global_step):  # they may see data in the first batch
        return "", ""
    return reason, by_hand


def trained_layers(pl_module: LightningModule, modes: Mapping[nn.Module, bool]) -> dict[str, _BatchNorm]:
    """The BatchNorm layers whose running statistics training updates, by path."""
    trained = {name: layer for name, layer in find_batchnorm(pl_module).items() if modes.get(layer)}
    return {name: layer for name, layer in trained.items() if layer.track_running_stats and _has_statistics(layer)}


def measure_steps(
    trainer: Trainer,
    pl_module: LightningModule,
    batches: Sequence[Kept],
    modes: Mapping[nn.Module, bool],
    layers: Mapping[str, _BatchNorm],
    *,
    dropout: bool,
) -> dict[str, Population]:
    """Run ``training_step`` on kept batches without a trace, and measure what BatchNorm layers get.

    Gradients are switched on, as a step may differentiate; there is no backward pass of the loss. Also weights that the
    step itself writes to, such as a teacher's moving average, are put back.

    Args:
        trainer: the trainer, between the hooks of a fit.
        pl_module: its model.
        batches: what to run.
        modes: each module's mode in training.
        layers: the layers to measure, in training mode; the others of the model are in the mode of ``modes``.
        dropout: whether all other modules keep the mode of ``modes``; see :class:`.PreciseBatchNorm`.

    Returns:
        What each layer got, of this process; a layer that was not called is missing.
    """
    step = pl_module.training_step
    with apart(trainer, pl_module), _weights_kept(pl_module), measure(layers) as sums:
        for entry in batches:
            _set_modes(modes, layers, dropout=dropout)
            args, kwargs = arguments(step, entry.again(), entry.number)
            with trainer.precision_plugin.train_step_context():
                step(*args, **kwargs)
    return sums


def _has_statistics(layer: _BatchNorm) -> bool:
    return layer.running_mean is not None and layer.running_var is not None


def _set_modes(modes: Mapping[nn.Module, bool], layers: Mapping[str, _BatchNorm], *, dropout: bool) -> None:
    # Modules of the user's own that hold others keep their mode: many compute another thing in eval mode, such as a
    # detector that returns boxes in place of losses.
    measured = set(layers.values())
    for module, mode in modes.items():
        part = next(module.children(), None) is None or type(module).__module__.startswith("torch.nn.")
        module.training = mode and (dropout or not part or module in measured)


@contextmanager
def _weights_kept(pl_module: LightningModule) -> Iterator[None]:
    writes, homes = Writes(), [(x, x.data) for x in pl_module.parameters()]
    for x, _ in homes:
        writes.keep(x)
    try:
        yield
    finally:
        writes.put_back()
        for x, home in homes:
            if x.data_ptr() != home.data_ptr():  # another tensor was put in its place
                x.data = home
