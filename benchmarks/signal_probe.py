# SPDX-License-Identifier: Apache-2.0
"""Measure with plain forward hooks, in one forward pass, the numbers that the rules of the signal take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

RECTIFIERS = (nn.ReLU, nn.ReLU6)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)
CONSUMERS = (*WEIGHTED, _BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.LSTM)
BOUNDS = {nn.Tanh: (-0.99, 0.99), nn.Sigmoid: (0.01, 0.99), nn.Softsign: (-0.9, 0.9)}
"""Outputs beyond which the gradient is about a hundredth of its largest value: softsign's is (1 - |y|)²."""
EDGES = {nn.Hardtanh: (-1.0, 1.0), nn.Hardsigmoid: (0.0, 1.0)}


@dataclass(frozen=True)
class Saturation:
    """What the rule about saturated units takes.

    Args:
        kind: the nonlinearity.
        share: share of the values that pass almost no gradient.
        saturated: units of whose values at least 99 % are such.
        units: all units.
        last: whether it is the last nonlinearity, or its output leaves a part that the network calls by itself.
        gate: whether the output is no layer's input as it is.
    """

    kind: str
    share: float
    saturated: int
    units: int
    last: bool
    gate: bool


@dataclass
class Reading:
    """One forward pass in numbers, by module path in the order of the run.

    Args:
        stds: standard deviation of the output of each layer with weights, over the whole tensor.
        varied: the same, over the samples alone: the root of the mean over units of their variances.
        dead: units that were never active, units, and samples, of each rectifier.
        saturation: of each bounded nonlinearity.
        variances: median over the channels of the batch variance of each BatchNorm layer's input, and its epsilon.
    """

    stds: dict[str, float] = field(default_factory=dict)
    varied: dict[str, float] = field(default_factory=dict)
    dead: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    saturation: dict[str, Saturation] = field(default_factory=dict)
    variances: dict[str, tuple[float, float]] = field(default_factory=dict)


class Probe:
    """Hooks on every module for the time of one forward pass.

    Args:
        model: the network, in training mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parts = {id(part) for part in model.children() if any(isinstance(x, WEIGHTED) for x in part.modules())}
        self._outputs: dict[str, tuple[nn.Module, list[Tensor]]] = {}
        self._consumed: set[int] = set()
        self._ended: set[int] = set()
        self._kept: list[Any] = []
        self._reading = Reading()
        self._final: str | None = None

    @torch.no_grad()
    def read(self, x: Tensor) -> Reading:
        """Run once, leave buffers and random numbers as they were, and give the numbers."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        handles = [
            module.register_forward_hook(lambda m, i, o, name=name: self._hear(name, m, i, o))
            for name, module in self.model.named_modules()
        ]
        try:
            with torch.random.fork_rng(devices=[]):
                self.model(x)
        finally:
            for handle in handles:
                handle.remove()
            for buffer, value in buffers:
                buffer.copy_(value)
        self._final = next((n for n, (m, _) in reversed(self._outputs.items()) if not isinstance(m, WEIGHTED)), None)
        for name, (module, outputs) in self._outputs.items():
            self._judge(name, module, outputs)
        return self._reading

    def _hear(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            self._kept.append(inputs[0])  # so that no other tensor gets its place in memory
            if isinstance(module, CONSUMERS):
                self._consumed.add(inputs[0].data_ptr())
            if isinstance(module, _BatchNorm):
                dims = [d for d in range(inputs[0].dim()) if d != 1]
                var = inputs[0].float().var(dims, correction=0).median().item()
                self._reading.variances.setdefault(name, (var, module.eps))
        if not isinstance(output, Tensor):
            return
        self._kept.append(output)
        part = module is self.model or (id(module) in self.parts and not isinstance(self.model, nn.Sequential))
        if part:
            self._ended.add(output.data_ptr())
        if isinstance(module, (nn.Dropout, nn.MaxPool2d)) and inputs[0].data_ptr() != output.data_ptr():
            self._consumed.add(inputs[0].data_ptr())
        if isinstance(module, (*RECTIFIERS, *BOUNDS, *EDGES, *WEIGHTED)):
            self._outputs.setdefault(name, (module, []))[1].append(output)

    def _judge(self, name: str, module: nn.Module, outputs: list[Tensor]) -> None:
        rows = torch.cat([_units_last(y) for y in outputs])
        if isinstance(module, WEIGHTED):
            first = _units_last(outputs[0]).double()
            self._reading.stds[name] = first.std(correction=0).item()
            self._reading.varied[name] = math.sqrt(first.var(0, correction=0).mean().item())
        elif isinstance(module, RECTIFIERS):
            dead = int((rows <= 0).all(0).sum())
            self._reading.dead[name] = (dead, rows.shape[1], sum(len(y) for y in outputs))
        else:
            low, high = BOUNDS.get(type(module)) or EDGES[type(module)]
            outside = (rows <= low) | (rows >= high)
            shares = outside.double().mean(0)
            ended = name == self._final or any(y.data_ptr() in self._ended for y in outputs)
            gate = not any(y.data_ptr() in self._consumed for y in outputs)
            kind = type(module).__name__.lower()
            full = int((shares >= 0.99).sum())  # noqa: PLR2004  (the rule's definition)
            self._reading.saturation[name] = Saturation(
                kind, shares.mean().item(), full, len(shares), last=ended, gate=gate and not ended
            )


def _units_last(y: Tensor) -> Tensor:
    """(N, C), (N, T, C) or (N, C, H, W) to rows of units."""
    return (y.movedim(1, -1) if y.dim() == 4 else y).flatten(0, -2)  # noqa: PLR2004  (images)
