# SPDX-License-Identifier: Apache-2.0
"""The state in which a batch finds a model: buffers and random streams, kept at a cost that nobody notices."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

SMALL = 1 << 16
"""Number of elements up to which a buffer is copied at each step."""


@dataclass
class Streams:
    """Where the global random streams stood.

    Args:
        cpu: torch's own, of the CPU, as ``torch.get_rng_state`` gives it.
        cuda: that of the model's GPU; None without one.
        python: that of ``random``; None where no step draws from it.
        numpy: that of ``numpy.random``; the same.
    """

    cpu: Tensor | None = None
    cuda: Tensor | None = None
    python: Any = None
    numpy: Any = None

    def rewind(self, device: torch.device | None) -> None:
        """Set the streams to where they stood; for use in a quarantine, which sets them forward again."""
        if self.cpu is not None:
            torch.set_rng_state(self.cpu)
        if self.cuda is not None and device is not None:
            torch.cuda.set_rng_state(self.cuda, device)
        if self.python is not None:
            random.setstate(self.python)
        if self.numpy is not None and "numpy.random" in sys.modules:
            sys.modules["numpy.random"].set_state(self.numpy)

    def to_plain(self) -> dict[str, Any]:
        """Tensors, numbers and plain containers."""
        numpy = None
        if self.numpy is not None and "key" in self.numpy["state"]:
            numpy = {**self.numpy, "state": {**self.numpy["state"], "key": self.numpy["state"]["key"].tolist()}}
            numpy["state"]["pos"] = int(numpy["state"]["pos"])
        return {"cpu": self.cpu, "cuda": self.cuda, "python": self.python, "numpy": numpy}

    @classmethod
    def from_plain(cls, row: dict[str, Any]) -> Streams:
        """What :meth:`to_plain` gave."""
        numpy = row["numpy"]
        if numpy is not None and "numpy" in sys.modules:
            key = sys.modules["numpy"].array(numpy["state"]["key"], dtype="uint32")
            numpy = {**numpy, "state": {**numpy["state"], "key": key}}
        return cls(row["cpu"], row["cuda"], row["python"], numpy)


class Snapshot:
    """Remember the state before the present batch, so that its step can be run again, or undone.

    A large buffer is copied only where it was written to since the last time; small ones always are, since BatchNorm
    writes its running statistics without telling autograd's version counter. The streams of ``random`` and ``numpy``
    are kept only while steps draw from them, which :meth:`notice` finds out: reading numpy's takes as long as a small
    network's optimizer step. Parameters are not copied: a step is looked into before they change.

    Args:
        model: the network. Memory: a copy of the buffers that change, such as BatchNorm's running statistics.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._entries = [(module, key) for module in model.modules() for key in _keys(module)]
        self._live: list[Tensor | None] = [None] * len(self._entries)
        self._kept: list[Tensor | None] = [None] * len(self._entries)
        self._versions = [-1] * len(self._entries)
        self._uses_python = self._uses_numpy = True
        self.streams = Streams()

    def take(self) -> None:
        """Remember the present state; called before each step."""
        device = self._cuda_device()
        self.streams = Streams(
            torch.get_rng_state(),
            None if device is None else torch.cuda.get_rng_state(device),
            random.getstate() if self._uses_python else None,
            _numpy_state() if self._uses_numpy else None,
        )
        changed = [place for place, (x, version) in enumerate(self._now()) if self._may_have_changed(place, x, version)]
        if changed:
            self._copy(changed)

    def notice(self) -> None:
        """Find out which streams a step draws from; called in a step whose start kept them all."""
        then, now = self.streams, _numpy_state()
        self._uses_python = then.python is not None and random.getstate() != then.python
        self._uses_numpy = then.numpy is not None and now is not None and not _same(now, then.numpy)

    def look_closer(self) -> None:
        """Keep all streams of the next step, for :meth:`notice`."""
        self._uses_python = self._uses_numpy = True

    def put_back(self) -> None:
        """Write the remembered values into the buffers that the model has now, be they stand-ins of a quarantine."""
        with torch.no_grad():
            for (module, key), kept in zip(self._entries, self._kept, strict=True):
                x = _buffer(module, key)
                if x is not None and kept is not None and x.shape == kept.shape:
                    x.copy_(kept)

    def rewind(self) -> None:
        """Set the random streams to where they stood; for use in a quarantine, which sets them forward again."""
        self.streams.rewind(self._cuda_device())

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the remembered buffers by path."""
        by_entry = {(id(module), key): kept for (module, key), kept in zip(self._entries, self._kept, strict=True)}
        found = {
            f"{path}.{key}" if path else key: by_entry.get((id(module), key))
            for path, module in self._model.named_modules()
            for key in _keys(module)
        }
        return {path: kept.clone() for path, kept in found.items() if kept is not None}

    def _may_have_changed(self, place: int, x: Tensor | None, version: int) -> bool:
        small = x is not None and not is_lazy(x) and x.numel() <= SMALL
        return small or self._versions[place] != version or x is not self._live[place]

    def _now(self) -> Iterator[tuple[Tensor | None, int]]:
        for module, key in self._entries:
            x = _buffer(module, key)
            lazy = x is None or is_lazy(x) or x.is_inference()
            yield x, -1 if lazy or x is None else x._version  # noqa: SLF001  (no public name)

    def _copy(self, places: list[int]) -> None:
        fresh: list[Tensor] = []
        kept: list[Tensor] = []
        for place in places:
            module, key = self._entries[place]
            x, old = _buffer(module, key), self._kept[place]
            self._live[place] = x
            if x is None or is_lazy(x) or x.is_inference():
                self._kept[place] = None
                continue
            self._versions[place] = x._version  # noqa: SLF001  (the same)
            if old is None or old.shape != x.shape or old.dtype != x.dtype or old.device != x.device:
                self._kept[place] = x.detach().clone()
            else:
                fresh.append(x.detach())
                kept.append(old)
        if fresh:
            with torch.no_grad():
                torch._foreach_copy_(kept, fresh)

    def _cuda_device(self) -> torch.device | None:
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return None
        device = next((x.device for x in self._model.parameters()), torch.device("cpu"))
        return device if device.type == "cuda" else None


def _keys(module: nn.Module) -> list[str]:
    return [key for key, _ in module.named_buffers(recurse=False)]


def _buffer(module: nn.Module, key: str) -> Tensor | None:
    x = getattr(module, key, None)  # a ScriptModule keeps its buffers out of sight
    return x if isinstance(x, Tensor) else None


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy.random")
    return None if numpy is None else numpy.get_state(legacy=False)


def _same(a: Any, b: Any) -> bool:
    """Whether two states of numpy's global stream are the same."""
    one, other = a["state"], b["state"]
    return bool(one["pos"] == other["pos"] and (one["key"] == other["key"]).all()) if "key" in one else one == other
