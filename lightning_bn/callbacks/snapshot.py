# SPDX-License-Identifier: Apache-2.0
"""The state in which a batch finds a model: buffers and random streams, kept at a cost that nobody notices."""

from __future__ import annotations

import random
import sys
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
        self._homes = [_home(module) for module, _ in self._entries]
        self._live: list[Tensor | None] = [None] * len(self._entries)
        self._kept: list[Tensor | None] = [None] * len(self._entries)
        self._large: dict[int, int] = {}  # place: version
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []  # copies and small buffers, by dtype and device
        self._waits = False  # for lazy buffers to get their shape
        self._uses_python = self._uses_numpy = True
        self.looks_closer = True
        """Whether all streams of the present step are kept, so that :meth:`notice` can tell which it draws from."""
        self.streams = Streams()

    def take(self) -> None:
        """Remember the present state; called before each step."""
        device = self._cuda_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
        self.streams = Streams(
            torch.get_rng_state(),
            None if device is None else torch.cuda.get_rng_state(device),
            random.getstate() if self._uses_python else None,
            _numpy_state() if self._uses_numpy else None,
        )
        for (_, key), home, known in zip(self._entries, self._homes, self._live, strict=True):
            if home.get(key) is not known or self._waits:
                self._begin()
                return
        for kept, live in self._pairs:
            torch._foreach_copy_(kept, live)
        for place, version in self._large.items():
            self._copy_large(place, version)

    def notice(self) -> None:
        """Find out which streams a step draws from; called in a step whose start kept them all."""
        self.looks_closer = False
        then, now = self.streams, _numpy_state()
        self._uses_python = then.python is not None and random.getstate() != then.python
        self._uses_numpy = then.numpy is not None and now is not None and not _same(now, then.numpy)

    def look_closer(self) -> None:
        """Keep all streams of the next step, for :meth:`notice`."""
        self._uses_python = self._uses_numpy = self.looks_closer = True

    def put_back(self) -> None:
        """Write the remembered values into the buffers that the model has now, be they stand-ins of a quarantine."""
        with torch.no_grad():
            for (module, key), kept in zip(self._entries, self._kept, strict=True):
                x = _home(module).get(key)
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

    def _begin(self) -> None:
        """Copy everything: at the first time, and where a buffer was replaced by another tensor."""
        self._live = [home.get(key) for (_, key), home in zip(self._entries, self._homes, strict=True)]
        self._kept, self._large, self._waits = [], {}, False
        groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
        for place, x in enumerate(self._live):
            if x is None or is_lazy(x) or x.is_inference():
                self._kept.append(None)
                self._waits = self._waits or (x is not None and is_lazy(x))
                continue
            copy = x.detach().clone()
            self._kept.append(copy)
            if x.numel() > SMALL or x.requires_grad:
                self._large[place] = x._version  # noqa: SLF001  (no public name)
            else:
                pair = groups.setdefault((x.dtype, x.device), ([], []))
                pair[0].append(copy)
                pair[1].append(x)
        self._pairs = list(groups.values())

    def _copy_large(self, place: int, version: int) -> None:
        x, kept = self._live[place], self._kept[place]
        if x is not None and kept is not None and x._version != version:  # noqa: SLF001  (the same)
            self._large[place] = x._version  # noqa: SLF001  (the same)
            kept.copy_(x.detach())

    def _cuda_device(self) -> torch.device | None:
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return None
        device = next((x.device for x in self._model.parameters()), torch.device("cpu"))
        return device if device.type == "cuda" else None


def _keys(module: nn.Module) -> list[str]:
    return [key for key, _ in module.named_buffers(recurse=False)]


class _OutOfSight:
    """The buffers of a ScriptModule, which are attributes alone."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def get(self, key: str) -> Tensor | None:
        x = getattr(self._module, key, None)
        return x if isinstance(x, Tensor) else None


def _home(module: nn.Module) -> Any:
    return _OutOfSight(module) if isinstance(module, torch.jit.ScriptModule) else module._buffers  # noqa: SLF001  (theirs)


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy.random")
    return None if numpy is None else numpy.get_state(legacy=False)


def _same(a: Any, b: Any) -> bool:
    """Whether two states of numpy's global stream are the same."""
    one, other = a["state"], b["state"]
    return bool(one["pos"] == other["pos"] and (one["key"] == other["key"]).all()) if "key" in one else one == other
