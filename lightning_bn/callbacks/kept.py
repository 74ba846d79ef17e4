# SPDX-License-Identifier: Apache-2.0
"""Copies of batches on the host, whatever is in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_bn.precise import length_of

HOST = torch.device("cpu")
PLAIN = frozenset([type(None), bool, int, float, complex, str, bytes])
"""Types of what a copy may share with its original."""


@dataclass
class Kept:
    """One batch on the host.

    Args:
        batch: the copy; not to be given to a step, which may change it.
        number: its ``batch_idx``.
        samples: its length, by the first axis of its first tensor.
        nbytes: what its tensors take.
        homes: the devices that its tensors came from, in the order of copying.
    """

    batch: Any
    number: int
    samples: int
    nbytes: int
    homes: Sequence[torch.device]

    def again(self) -> Any:
        """A new copy, each tensor on the device that it had."""
        homes = iter(self.homes)
        return _copied(self.batch, lambda x: next(homes, x.device)).batch


def keep(batch: Any, number: int) -> Kept:
    """A copy of a batch on the host.

    Args:
        batch: anything that can be copied.
        number: its ``batch_idx``.

    Raises:
        TypeError: where it cannot be copied.
    """
    copied = _copied(batch, lambda _: HOST)
    return Kept(copied.batch, number, length_of(copied.batch), copied.nbytes, copied.homes)


@dataclass
class _Copied:
    """A deep copy, the devices of the tensors in the order of copying, and what they take."""

    batch: Any
    homes: Sequence[torch.device]
    nbytes: int


def _copied(batch: Any, place: Callable[[Tensor], torch.device]) -> _Copied:
    mode = _Moving(place)
    try:
        with torch.no_grad():
            try:
                twin = _plain_copy(batch, mode.move, {})
            except _NotPlainError:
                mode = _Moving(place)
                with mode:
                    twin = copy.deepcopy(batch)
    except Exception as error:
        raise TypeError(f"batch must be what copy.deepcopy can copy, got {type(batch).__name__} ({error})") from error
    return _Copied(twin, mode.homes, mode.nbytes)


class _NotPlainError(Exception):
    """There is more in a batch than tensors, plain values and the usual containers."""


def _plain_copy(batch: Any, move: Callable[[Tensor], Tensor], known: dict[int, Tensor | None]) -> Any:
    """What ``copy.deepcopy`` makes of tensors in tuples, lists and dicts, in half of its time.

    Args:
        batch: a batch.
        move: copies a tensor.
        known: copies by id of the original; None for containers.
    """
    kind, place = type(batch), id(batch)
    if kind in PLAIN:
        return batch
    if kind is Tensor:
        twin = known.get(place)
        if twin is None:
            twin = known[place] = move(batch)
        return twin
    if kind not in {tuple, list, dict} or place in known:  # twice in the batch, or within itself
        raise _NotPlainError
    known[place] = None
    if kind is dict:
        if not PLAIN.issuperset(map(type, batch)):
            raise _NotPlainError
        return {key: _plain_copy(entry, move, known) for key, entry in batch.items()}
    return kind(_plain_copy(entry, move, known) for entry in batch)


class _Moving(TorchFunctionMode):
    """Puts the tensors of a deep copy on a device, however deep in objects of other libraries they are.

    Args:
        place: the device for each tensor.
    """

    def __init__(self, place: Callable[[Tensor], torch.device]) -> None:
        super().__init__()
        self._place = place
        self.homes: list[torch.device] = []
        self.nbytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Copy and move in one, where a tensor, or a subclass in its own way, copies itself."""
        if func is not torch.Tensor.__deepcopy__ and func is not torch.Tensor.clone:
            return func(*args, **(kwargs or {}))
        return self.move(args[0])

    def move(self, x: Tensor) -> Tensor:
        """A copy of a tensor on its place."""
        self.homes.append(x.device)
        self.nbytes += x.numel() * x.element_size()
        # To the host without waiting: into pinned memory, behind what the GPU has still to do.
        return x.detach().to(self._place(x), non_blocking=True, copy=True).requires_grad_(x.requires_grad)
