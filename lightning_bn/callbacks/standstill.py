# SPDX-License-Identifier: Apache-2.0
"""BatchNorm layers that updated their running statistics at first and do so no longer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_bn.rules.statistics_stopped import Stop

FEWEST = 3
"""Batches that were heard in which a layer has to stand still."""


@dataclass
class Still:
    """A layer that stands still.

    Args:
        stop: as it was seen first.
        statistics: copies of its running mean and variance at that time, ``(C,)`` each.
        batches: batches since in which it was heard.
    """

    stop: Stop
    statistics: tuple[Tensor, ...]
    batches: int = 1


class Standstill:
    """Knows by the flags of each call whether a layer updates its statistics; nothing is read on the host.

    A layer that is called several times in a batch updates them if one call does. That it did so earlier is known from
    a call that was heard, or from what the statistics were at the start.

    Args:
        model: the network.
        layers: its BatchNorm layers that can be heard, by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, _BatchNorm]) -> None:
        self._around = _around(model, layers)
        self._layers = layers
        self._calls: dict[str, Stop | None] = {}  # of this batch: how a layer stands still, None where it does not
        self._start: dict[str, tuple[Tensor, ...]] | None = None  # of layers that were not heard to update
        self._moved: set[str] = set()
        self._still: dict[str, Still] = {}

    def begin(self) -> None:
        """Copy the statistics of the start, before the first batch."""
        if self._start is None:
            known = {name: layer for name, layer in self._layers.items() if not any(map(is_lazy, layer.buffers()))}
            self._start = {name: _statistics(layer) for name, layer in known.items()}

    def hear(self, name: str, module: nn.Module) -> None:
        """A layer was called in a training step."""
        if not isinstance(module, _BatchNorm) or module.running_mean is None:
            return
        by_batch = module.training and (not module.track_running_stats or module.momentum == 0)
        if module.training and not by_batch:
            self._calls[name] = None
        elif name not in self._calls:
            self._calls[name] = self._stop(name, module, by_batch=by_batch)

    def end_batch(self, step: int) -> None:
        """A batch that was heard is over.

        Args:
            step: its optimizer step.
        """
        for name, stop in self._calls.items():
            if stop is None:
                self._moved.add(name)
                self._still.pop(name, None)
                (self._start or {}).pop(name, None)
            elif name in self._still:
                self._still[name].batches += 1
            else:
                self._still[name] = Still(Stop(**{**vars(stop), "step": step}), _statistics(self._layers[name]))
        self._calls = {}

    def stops(self) -> list[Stop]:
        """Layers that stand still, and whose statistics are what they were when that was first seen; reads the host."""
        return [
            still.stop
            for name, still in self._still.items()
            if still.batches >= FEWEST
            and self._has_moved(name)
            and all(map(torch.equal, _statistics(self._layers[name], copy=False), still.statistics))
        ]

    def _has_moved(self, name: str) -> bool:
        start = (self._start or {}).get(name)
        now = _statistics(self._layers[name], copy=False)
        return name in self._moved or (start is not None and not all(map(torch.equal, start, now)))

    def _stop(self, name: str, module: nn.Module, *, by_batch: bool) -> Stop:
        around = self._around[name]
        own = list(module.parameters(recurse=False))
        frozen = bool(own) and not any(x.requires_grad for x in own)
        learning = any(x.requires_grad for x in around.parameters())
        return Stop(name, 0, by_batch, around.training, frozen, learning)


def _statistics(layer: _BatchNorm, *, copy: bool = True) -> tuple[Tensor, ...]:
    values = (x.detach() for x in (layer.running_mean, layer.running_var) if x is not None)
    return tuple(x.clone() if copy else x for x in values)


def _around(model: nn.Module, layers: Mapping[str, _BatchNorm]) -> dict[str, nn.Module]:
    """For each layer the nearest module around it that holds parameters of others than BatchNorm; else the model."""
    affine = {id(x) for layer in layers.values() for x in layer.parameters(recurse=False)}
    chains: dict[nn.Module, tuple[nn.Module, ...]] = {model: ()}
    for module in model.modules():
        for child in module.children():
            chains.setdefault(child, (module, *chains[module]))
    return {
        name: next((top for top in chains[layer] if any(id(x) not in affine for x in top.parameters())), model)
        for name, layer in layers.items()
    }
